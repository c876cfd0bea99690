"""What is searched by a pattern, or decoded, is what a stranger sent: it takes work that grows with its bytes.

A pattern that begins anew at each byte of a run takes the square of it: a head of 64 KiB held the loop, and everybody
else, for minutes. Each text here is so long that the square of it would take hours, and its length milliseconds; what
is counted is the processor's time, of which there is plenty.
"""

from __future__ import annotations

import asyncio
import gzip
import signal
from collections.abc import Iterator

import pytest

from tests.proxy.fakes import get, reply, stage
from vllmd.config.types import ModelConfig
from vllmd.daemon import keys
from vllmd.engines import engine_of
from vllmd.errors import BadRequest
from vllmd.proxy import decoding, paths, peek, response_heads
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.large import in_turns
from vllmd.proxy.model_requests import MAX_NAME_SEGMENTS

LONG = 1 << 20
PLENTY = 30.0  # seconds of the processor
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")  # of zstd


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it takes more work than it has bytes")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, PLENTY)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    signal.signal(signal.SIGVTALRM, before)


def test_a_key_with_many_spaces_in_it() -> None:
    """Before anybody has shown a key."""
    assert keys._bearer("a" + " " * LONG + "b") == ""
    assert keys._bearer("Bearer" + " " * LONG + "key") == "key"
    assert keys._bearer("key" + " " * LONG + "bearer") == "key"


@pytest.mark.parametrize("more", ["/v1/a", "/api/a", "/api", "/v1", "/", "/openai"])
def test_a_path_that_means_nothing(more: str) -> None:
    """Likewise."""
    assert paths.alternative_for(more * (LONG // len(more)) + "/v1/nothing") == ""


@pytest.mark.parametrize("more", [rb"\"", b'"', b"\\", b' name="', b" name", b" "])
def test_the_disposition_of_a_forms_part(more: bytes) -> None:
    """An escaped quote in what no quote ends is the beginning of nothing."""
    line = b';name="a"; filename="' + more * (LONG // len(more))
    for quoted in peek.QUOTED:
        peek.has_one_name(line, quoted)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1  200 x%by\r\n\r\n",
        b"HTTP/1.1  200%by\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: b\r\n c%by\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nq :b\r\na%by\r\n\r\n",
    ],
)
def test_an_engines_head(head: bytes) -> None:
    """Whatever the engine is; a remote one is a stranger's."""
    response_heads.normalize_head(head % (b" " * LONG))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("more", [".bin", ".bin: 1% ", ".safetensors: "])
def test_a_line_of_an_engines_log(kind: str, more: str) -> None:
    """Many of them come, and a model's code may write whatever it likes."""
    engine_of(ModelConfig("m", engine=kind)).progress(more * (LONG // len(more)))


@pytest.mark.parametrize(("coding", "nothing"), [("zstd", EMPTY_FRAME), ("gzip", gzip.compress(b""))],
                         ids=["zstd", "gzip"])  # fmt: skip
def test_a_body_of_very_many_parts_with_nothing_in_them(coding: str, nothing: bytes) -> None:
    """Others have their turn in between, and it comes to an end."""
    work = decoding.decode_body(nothing * 100_000, coding, LONG, lambda size: None)
    turns = iter(range(LONG))
    with pytest.raises(BadRequest, match="more than 10000"):
        any(next(turns) < 0 for _ in work)
    assert next(turns) >= 10_000


def test_a_body_of_several_parts() -> None:
    """However they are cut: of ours, one ends where the next piece begins."""
    text = bytes(range(256)) * 1000
    members = [gzip.compress(text[at : at + 999], 0) for at in range(0, len(text), 999)]
    assert asyncio.run(in_turns(decoding.decode_body(b"".join(members), "gzip", LONG, lambda size: None))) == text


def test_a_path_below_upstream_is_looked_up_so_many_times() -> None:
    """Each of its segments might end a model's name: each look-up compares with every name that there is."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            asked: list[str] = []
            resolve = act.gate.resolve
            act.gate.resolve = lambda name, caller=ANYBODY: (asked.append(name), resolve(name, caller))[1]  # type: ignore[method-assign]
            client = await act.client()
            client.send(get("/upstream/" + "a/" * 5000))
            assert (await client.answer()).status == 404
            assert len(asked) <= MAX_NAME_SEGMENTS

    asyncio.run(play())
