"""Whatever is between two sockets takes n bytes in work that grows with n, however they are cut.

The same bytes go through each reader in pieces of one byte and of 64 KiB, and its work is counted, not its time:

- bytes copied: what a piece allocates at once beyond a small amount, as ``tracemalloc`` sees it. Who joins what is held
  to each piece allocates all of it again each time;
- bytes searched: ``bytearray.find`` and the patterns of the reader's module are replaced by ones that count what they
  look at; ``sum`` by one that counts what it adds up.
"""

from __future__ import annotations

import asyncio
import builtins
import re
import tracemalloc
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllmd.client import sse
from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.proxy import answer, forward, framing, heads, reader, response_heads, rewrite, tunnel, upstream
from vllmd.proxy.account import Account
from vllmd.proxy.limits import Limits
from vllmd.simengine import http as sim_http

SMALL = 2048  # bytes that a piece may allocate without being counted: a bounded rest of a line, a match
CRUMBED = 8 << 10  # bytes fed one by one; who starts anew at each byte does 4,096 times the work for them
LUMPED = 192 << 10  # bytes fed in pieces of ``LUMP``
LUMP = 64 << 10
FACTOR = 40
MODULES = (answer, forward, framing, heads, reader, response_heads, rewrite, tunnel, upstream, sse, sim_http)


class Work:
    """What was searched and added up."""

    done = 0


class CountingBuffer(bytearray):
    """A bytearray whose searches are counted."""

    def find(self, sub: Any, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        stop = len(self) if end is None else min(end, len(self))
        found = super().find(sub, start, stop)
        Work.done += max(0, (stop if found < 0 else found) - start)
        return found

    def __iadd__(self, other: Any) -> CountingBuffer:  # type: ignore[misc,override]
        Work.done += len(other)
        self.extend(other)
        return self


class CountingPattern:
    """A pattern whose searches are counted."""

    def __init__(self, pattern: re.Pattern[Any]) -> None:
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pattern, name)
        if name not in ("search", "match", "fullmatch"):
            return method

        def counted(text: Any, pos: int = 0, end: int | None = None) -> Any:
            stop = len(text) if end is None else min(end, len(text))
            found = method(text, pos, stop)
            Work.done += max(0, (found.end() if found else stop if name == "search" else pos + 1) - pos)
            return found

        return counted


def counting_sum(values: Iterable[Any], start: int = 0) -> Any:
    """As ``sum``."""
    listed = list(values)
    Work.done += len(listed)
    return builtins.sum(listed, start)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(module: ModuleType) -> None:
        monkeypatch.setattr(module, "bytearray", CountingBuffer, raising=False)
        monkeypatch.setattr(module, "sum", counting_sum, raising=False)
        for name, value in list(vars(module).items()):
            if isinstance(value, re.Pattern):
                monkeypatch.setattr(module, name, CountingPattern(value))

    for module in MODULES:
        patch(module)


def work(feed: Callable[[bytes], object], data: bytes, size: int) -> int:
    """What it takes to feed ``data`` in pieces of ``size`` bytes."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    Work.done, copied = 0, 0
    tracemalloc.start(1)
    try:
        for piece in pieces:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            feed(piece)
            more = tracemalloc.get_traced_memory()[1] - before
            copied += more if more > max(SMALL, 4 * size) else 0
    finally:
        tracemalloc.stop()
    return copied + Work.done


# -- the readers: each makes a new one, and gives the function that takes its bytes


def requests() -> Callable[[bytes], object]:
    """A client's connection."""
    source = reader.RequestReader(Limits(ServerConfig(max_head=2 * LUMPED)))
    waiting = [False]

    def feed(data: bytes) -> None:
        source.feed(data)
        while True:
            if not waiting[0]:
                if source.head() is None:
                    return
                waiting[0] = True
            if source.body() is None:
                return
            waiting[0] = False
            if not source.pending:
                return

    return feed


class Wire:
    """A transport, a sink and an exchange that do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def engine() -> Callable[[bytes], object]:
    """An engine's connection, its answer going nowhere."""
    connection = upstream.Upstream(Listen(port=1))
    connection.transport = Wire()  # type: ignore[assignment]
    connection.send("GET", b"", (), 0, Wire())
    return connection.data_received


def far_end() -> Callable[[bytes], object]:
    """A WebSocket's other side, before it has agreed."""
    connection = tunnel.FarEnd(Wire())  # type: ignore[arg-type]
    connection.transport = Wire()  # type: ignore[assignment]
    return connection.data_received


def chunks() -> Callable[[bytes], object]:
    """A chunked body whose payload is wanted, as an answer that is framed anew."""
    found = framing.Chunked()
    reframed = answer.Reframed(Wire(), found, None, 200, b"")  # type: ignore[arg-type]
    return lambda data: (found.scan(data), reframed.more(data))


def kept() -> Callable[[bytes], object]:
    """A replica's refusal, kept to be judged."""
    found = framing.Chunked()
    refusal = answer.Refusal(503, found)
    return lambda data: (found.scan(data), refusal.more(data))


def renamed() -> Callable[[bytes], object]:
    """An answer with another name in it."""
    return rewrite.Rewriter("the-engines-name", "an-alias").feed


def usage() -> Callable[[bytes], object]:
    """The meter of tokens."""
    exchange, account = SimpleNamespace(request=SimpleNamespace(path="")), Account(stream=True)
    return forward.AnswerRelay(exchange, account, *[Wire()] * 4).data  # type: ignore[arg-type]


def events() -> Callable[[bytes], object]:
    """The client library's stream."""
    stream = sse.Events()
    return lambda data: list(stream.feed(data))


def stand_in() -> Callable[[bytes], object]:
    """The stand-in engine's connection."""
    connection = sim_http.Connection(None, set(), 1.0)  # type: ignore[arg-type]
    connection._transport = Wire()

    def feed(data: bytes) -> None:
        connection._buffer += data
        connection._parse()

    return feed


GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"id":"1","model":"the-engines-name","choices":[{"delta":{"content":"a"}}]}\n\n'
CRUMB = b"1\r\nx\r\n"


# What each is fed: a beginning, and what follows it again and again.
CASES: list[tuple[Callable[[], Callable[[bytes], object]], bytes, bytes]] = [
    (requests, b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"x"),
    (requests, b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"),
    (requests, b"", GET),
    (requests, b"", POST % 10 + b"0123456789"),
    (requests, POST % (1 << 22), b"x"),
    (requests, b"", CHUNKED + b"5\r\n01234\r\n0\r\n\r\n"),
    (requests, CHUNKED, b"8\r\n01234567\r\n"),
    (requests, CHUNKED + b"400000\r\n", b"x"),
    (engine, OK + b"X: ", b"x"),
    (engine, OK, b"X: y\r\n"),
    (engine, b"", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"),
    (engine, b"", b"\r\n"),
    (engine, OK + b"Transfer-Encoding: chunked\r\n\r\n", CRUMB),
    (far_end, b"HTTP/1.1 101 Switching Protocols\r\nX: ", b"x"),
    (chunks, b"", CRUMB),
    (chunks, b"400000\r\n", b"x"),
    (kept, b"", CRUMB),
    (kept, b"400000\r\n", b"x"),
    (renamed, b"data: ", b"x"),
    (renamed, b"", EVENT),
    (renamed, b"", b'"model":"the-engines-nam'),
    (renamed, b"", b'"'),
    (renamed, b"", b"\\"),
    (usage, b"", b"x"),
    (usage, b"", EVENT),
    (events, b"data: ", b"x"),
    (events, b"", EVENT),
    (events, b"", b"\n"),
    (stand_in, b"GET / HTTP/1.1\r\nX: ", b"x"),
    (stand_in, CHUNKED + b"400000\r\n", b"x"),
    (stand_in, CHUNKED, CRUMB),
]


@pytest.mark.parametrize(
    ("make", "first", "more"), CASES, ids=[f"{make.__name__}-{(first + more)[:24]!r}" for make, first, more in CASES]
)
def test_the_work_grows_with_the_bytes(
    make: Callable[[], Callable[[bytes], object]], first: bytes, more: bytes
) -> None:
    """One byte at a time costs as much per byte as 64 KiB at a time, but for a factor that does not grow."""

    async def of(size: int, piece: int) -> float:
        data = first + more * (size // len(more))
        return work(make(), data, piece) / len(data)

    assert asyncio.run(of(CRUMBED, 1)) <= FACTOR
    assert asyncio.run(of(LUMPED, LUMP)) <= FACTOR


def test_the_count_finds_what_it_is_for() -> None:
    """A reader that joins what it holds to each piece, one that searches it all again, one that adds up its pieces."""
    held = [b""]

    def joins(data: bytes) -> None:
        held[0] = held[0] + data

    buffer = CountingBuffer()

    def searches(data: bytes) -> None:
        buffer.extend(data)
        buffer.find(b"\n")

    pieces: list[bytes] = []

    def adds_up(data: bytes) -> None:
        pieces.append(data)
        counting_sum(map(len, pieces))

    for feed in (joins, searches, adds_up):
        assert work(feed, b"x" * CRUMBED, 1) > 10 * FACTOR * CRUMBED
