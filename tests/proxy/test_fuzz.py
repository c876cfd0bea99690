"""Any bytes at all: never an exception but a VllmdError, never another meaning in other pieces.

The last test goes on for ``VLLMD_FUZZ_SECONDS``, 5 by default; ``make fuzz`` gives it ten minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.proxy.fakes import get, post, reply, stage, until
from tests.proxy.test_hostile import CASES
from vllmd.config.types import ServerConfig
from vllmd.errors import VllmdError
from vllmd.proxy.framing import BadFraming
from vllmd.proxy.heads import parse_response_head
from vllmd.proxy.limits import Limits
from vllmd.proxy.reader import RequestReader

LIMITS = Limits(ServerConfig(max_head=2000, max_body=3000))
SECONDS = float(os.environ.get("VLLMD_FUZZ_SECONDS", "5"))
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
TOKENS = [
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b";", b",", b"\x00", b"\x0b", b"\xff", b"0", b"5", b"d", b"ffff"),
    *(b"GET ", b"POST ", b"/hello", b"*", b"http://", b"vllmd", b" HTTP/1.1", b" HTTP/1.0", b"Host: ", b"\r\n\r\n"),
    *(
        b"Content-Length: ",
        b"Transfer-Encoding: chunked",
        b"Connection: ",
        b"close",
        b"Expect: 100-continue",
        b"Upgrade",
    ),
    *(b'{"model":"m"}', b'"model"', b"{", b"}", b"[", b'"', b"\\", b"0\r\n\r\n", b"%00", b"../", b"?a=1"),
]
SEEDS = [request[:2000] for request, _ in CASES.values()] + [get("/hello"), post(), post("/v1/responses")]


@st.composite
def traffic(draw: st.DrawFn) -> bytes:
    """Known requests with tokens put in, bytes cut out and pieces swapped."""
    data = b"".join(draw(st.lists(st.sampled_from(SEEDS) | st.sampled_from(TOKENS), min_size=1, max_size=6)))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 6))
        data = data[:at] + draw(st.sampled_from(TOKENS) | st.binary(max_size=3)) + data[at + length :]
    return data


Read = tuple[list[tuple[str, str, bytes]], str]


def read(pieces: list[bytes]) -> Read:
    """The requests that the pieces hold, and the error that ended them."""
    reader, requests, head = RequestReader(LIMITS), [], None
    try:
        for piece in pieces:
            reader.feed(piece)
            while True:
                head = head or reader.head()
                body = reader.body() if head else None
                if head is None or body is None:
                    break
                requests.append((head.method, head.target, body))
                head = None
    except VllmdError as error:
        return requests, type(error).__name__
    return requests, ""


def check_reading(data: bytes, step: int) -> None:
    """In pieces it is the same as at once, but for which error comes first."""
    whole = read([data])
    pieces = read([data[pos : pos + step] for pos in range(0, len(data), step)])
    assert pieces[0] == whole[0]
    assert bool(pieces[1]) == bool(whole[1])


@QUICK
@given(traffic(), st.integers(1, 50))
def test_requests_do_not_depend_on_how_they_are_cut(data: bytes, step: int) -> None:
    """The network cuts as it likes."""
    check_reading(data, step)


@pytest.mark.parametrize("size", range(LIMITS.now.max_head, LIMITS.now.max_head + 8))
def test_the_largest_head_is_taken_however_it_is_cut(size: int) -> None:
    """Its blank line does not count, whole or not."""
    start = b"GET /hello HTTP/1.1\r\nHost: vllmd\r\nX-A: "
    data = start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"
    assert len(read([data])[0]) == (size - 4 <= LIMITS.now.max_head)
    check_reading(data, 1)


@QUICK
@given(st.binary(max_size=100) | traffic(), st.sampled_from(["GET", "HEAD", "POST"]))
def test_any_answer_of_an_engine_is_sound_or_refused(data: bytes, method: str) -> None:
    """Nothing but BadFraming comes out of a bad one."""
    head = b"HTTP/1.1 200 OK\r\n" + data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for candidate in (data, head):
        with contextlib.suppress(BadFraming):
            framing = parse_response_head(candidate, method).framing()
            framing.scan(data)


async def bombard(requests: list[bytes], cut: int) -> None:
    """Send each on a connection of its own, hang up, and see that nothing is left and the next client is served.

    Each is sent in two pieces, the first of ``cut`` bytes, and every third client hangs up with a reset.
    """
    async with stage(reply(b"{}"), LIMITS) as act:
        before = len(asyncio.all_tasks())
        for number, request in enumerate(requests):
            client = await act.client()
            client.send(request[:cut])
            await until(lambda: not client.unsent)  # noqa: B023 - awaited here
            await asyncio.sleep(0)
            client.send(request[cut:])
            if number % 3 == 2:
                client.reset()
                continue
            client.writer.write_eof()
            await client.rest()
            client.close()
        client = await act.client()
        client.send(get("/hello", "Connection: close"))
        assert (await client.answer()).status == 200
        await act.at_rest()
        act.relay.pool.close()
        await until(lambda: len(asyncio.all_tasks()) <= before + 1)  # one is this very wait's


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(traffic(), min_size=1, max_size=20), st.integers(1, 200))
def test_the_server_outlives_any_traffic(requests: list[bytes], cut: int) -> None:
    """No task, connection or byte of reserved memory is left of it, and asyncio has nothing to complain of."""
    asyncio.run(bombard(requests, cut))


def test_for_as_long_as_asked() -> None:
    """The same, on and on, with new traffic every round."""

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(traffic(), min_size=1, max_size=20), st.integers(1, 50))
    def once(requests: list[bytes], step: int) -> None:
        for request in requests:
            check_reading(request, step)
        asyncio.run(bombard(requests, step))

    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        once()
