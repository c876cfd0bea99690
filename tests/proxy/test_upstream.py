"""Control calls and probes: one request, one answer, one clear error."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.proxy.fakes import EVENTS, Asked, Engine, chunked, raw, reply, soon, until
from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.errors import UpstreamFailed
from vllmd.proxy.limits import Limits
from vllmd.proxy.upstream import WRITE_BYTES, Collector, Pool, Upstream, connect, request


async def asked_of(script: object, path: Path, **options: object) -> tuple[int, bytes, Asked]:
    """Ask an engine on a Unix socket; everything is closed afterwards."""
    engine = Engine(script)  # type: ignore[arg-type]
    server = await asyncio.start_unix_server(engine.serve, path)
    async with server:
        method, target = str(options.pop("method", "GET")), str(options.pop("target", "/health"))
        try:
            status, _, body = await soon(request(Listen(uds=str(path)), method, target, **options))  # type: ignore[arg-type]
            return status, body, engine.asked[0]
        finally:
            await until(lambda: engine.closed == engine.connections)


@pytest.mark.parametrize(
    ("script", "body"),
    [
        (reply(b"ok"), b"ok"),
        (reply(b""), b""),
        (raw(EVENTS + chunked(b"a") + chunked(b"b") + b"0\r\n\r\n"), b"ab"),
        (raw(b"HTTP/1.1 200 OK\r\n\r\n", b"to the ", b"end", close=True), b"to the end"),
        (raw(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nokand more", close=True), b"ok"),
    ],
)
def test_an_answer_of_any_framing_is_collected(script: object, body: bytes, tmp_path: Path) -> None:
    """Status and payload."""
    status, got, asked = asyncio.run(asked_of(script, tmp_path / "s"))
    assert (status, got) == (200, body)
    assert asked.line == "GET /health HTTP/1.1"
    assert asked.headers["connection"] == "close"


def test_a_json_body_is_sent_as_such(tmp_path: Path) -> None:
    """For ``/collective_rpc`` and the like."""
    options = {"method": "POST", "target": "/collective_rpc", "json": {"method": "reload_weights"}}
    _, _, asked = asyncio.run(asked_of(reply(b"{}"), tmp_path / "s", **options))
    assert (asked.body, asked.headers["content-type"]) == (b'{"method": "reload_weights"}', "application/json")


async def silent(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Never answers."""
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        (silent, {"timeout": 0.05}, "not answered within 0.05 s"),
        (raw(close=True), {}, "broke off"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", close=True), {}, "broke off"),
        (raw(b"nonsense\r\n\r\n"), {}, "malformed answer"),
        (reply(b"x" * 100), {"limit": 99}, "larger than 99 bytes"),
    ],
)
def test_a_failure_says_what_was_asked_and_what_happened(
    script: object, options: dict[str, object], says: str, tmp_path: Path
) -> None:
    """Foreign errors end here."""
    with pytest.raises(UpstreamFailed, match=says) as caught:
        asyncio.run(asked_of(script, tmp_path / "s", **options))
    assert caught.value.message.startswith("GET /health to /")


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        (Listen(uds="/nowhere/s"), "no connection to the engine's socket: No such file or directory"),
        (Listen(port=1), "no connection to 127.0.0.1:1: Connection refused"),
    ],
)
def test_nobody_there_is_told_so(listen: Listen, why: str) -> None:
    """Refused and missing, on both kinds of address."""
    with pytest.raises(UpstreamFailed, match=why):
        asyncio.run(request(listen, "GET", "/health"))


def test_a_large_body_is_not_in_memory_twice(tmp_path: Path) -> None:
    """An engine that takes it slowly gets it in pieces, and what it has not taken stays where it is."""
    body = bytes(range(256)) * (40 << 10)
    parts = (memoryview(body)[:5], memoryview(body)[5:])

    async def play() -> None:
        began, go, got = asyncio.Event(), asyncio.Event(), bytearray()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            began.set()
            await go.wait()
            while len(got) < len(body) + 4:
                got.extend(await reader.read(1 << 20))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_unix_server(serve, tmp_path / "s"):
            listen = Listen(uds=str(tmp_path / "s"))
            connection = await connect(listen, 5.0, Upstream(listen))
            sink = Collector(100)
            connection.send("POST", b"head", parts, sum(map(len, parts)), sink)
            await soon(began.wait())
            assert connection.transport.get_write_buffer_size() <= 2 * WRITE_BYTES
            go.set()
            assert (await soon(sink.over)).status == 200
            assert got == b"head" + body
            connection.abort()

    asyncio.run(play())


class Wire(asyncio.Transport):
    """A transport that goes nowhere; ``reading`` is whether it would be read."""

    reading = True

    def pause_reading(self) -> None:
        """As asyncio's."""
        self.reading = False

    def resume_reading(self) -> None:
        """As asyncio's."""
        self.reading = True

    def is_closing(self) -> bool:
        """Never."""
        return False

    def write(self, data: object) -> None:
        """Nobody reads it."""

    def abort(self) -> None:
        """As asyncio's."""

    def get_write_buffer_size(self) -> int:
        """Everything is sent at once."""
        return 0


def test_a_connection_that_was_paused_is_read_again_when_it_is_kept() -> None:
    """Its client took nothing, and the rest of the answer was on its way already: the next request must be answered."""

    async def play() -> None:
        pool, wire, listen = Pool(Limits(ServerConfig())), Wire(), Listen()
        connection = Upstream(listen, pool)
        connection.connection_made(wire)
        connection.send("POST", b"head", (b"",), 0, Collector(100))
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n1")
        connection.pause()
        assert not wire.reading
        connection.data_received(b"2")
        assert (pool.get_idle(listen), wire.reading) == (connection, True)
        pool.close()

    asyncio.run(play())


@pytest.mark.parametrize("late", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", b"\r\n", b""])
def test_what_comes_between_two_requests_is_no_answer_to_the_second(late: bytes, tmp_path: Path) -> None:
    """An engine's second answer to one client, or its end, though the loop has not read it: no other client gets it."""

    async def play() -> None:
        pool, listen = Pool(Limits(ServerConfig())), Listen(uds=str(tmp_path / "s"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(listen.uds)
            listener.listen()
            connection = await pool.connect(listen)
            engine = listener.accept()[0]
            with engine:
                for _ in range(2):  # as long as it keeps quiet in between it is used again
                    sink = Collector(100)
                    connection.send("POST", b"head", (b"",), 0, sink)
                    engine.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    await soon(sink.over)
                    assert pool.get_idle(listen) is connection
                sink = Collector(100)
                connection.send("POST", b"head", (b"",), 0, sink)
                engine.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await soon(sink.over)
                if late:
                    engine.sendall(late)
                else:
                    engine.close()
                assert pool.get_idle(listen) is None
        pool.close()

    asyncio.run(play())


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", b"x"])
def test_a_connection_whose_answer_has_more_than_it_announced_is_not_kept(more: bytes) -> None:
    """The second answer came along with the first: the client has the first, and nobody the second."""

    async def play() -> None:
        pool, listen, sink = Pool(Limits(ServerConfig())), Listen(), Collector(100)
        connection = Upstream(listen, pool)
        connection.connection_made(Wire())
        connection.send("POST", b"head", (b"",), 0, sink)
        connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + more)
        assert (await soon(sink.over)).status == 200
        assert (bytes(sink.body), pool.get_idle(listen), bool(pool.idle())) == (b"ok", None, False)

    asyncio.run(play())
