"""WebSockets pass as bytes."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.fakes import Asked, Engine, get, raw, soon, stage, until
from vllmd.engines.base import Listen
from vllmd.proxy import tunnel
from vllmd.proxy.access import EVERYTHING, NOBODY, Caller
from vllmd.proxy.gate import Target
from vllmd.proxy.http import Request

UPGRADE = (
    "Connection: keep-alive, Upgrade",
    "Upgrade: WebSocket",
    "Sec-WebSocket-Key: abc",
    "Sec-WebSocket-Version: 13",
)
AGREED = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: xyz\r\n\r\n"
)


class EchoEngine(Engine):
    """Agrees, greets, then says everything back until it hears ``bye``."""

    def __init__(self) -> None:
        super().__init__(raw())

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.rstrip("\r\n").split("\r\n")
        self.asked.append(Asked(line, dict(field.lower().split(": ", 1) for field in fields), b""))
        writer.write(AGREED + b"hello")
        while (data := await reader.read(65536)) and not data.endswith(b"bye"):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@pytest.mark.parametrize("end", ["engine", "client", "daemon"])
def test_bytes_pass_both_ways_until_one_side_ends(end: str) -> None:
    """The handshake goes to the model of the query under its own name; either end, and the daemon, can end it."""

    async def play() -> None:
        echo = EchoEngine()
        async with stage() as act:
            server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
            act.gate.upstream = Listen(port=server.sockets[0].getsockname()[1])
            act.gate.target = Target("m", "served m")
            client = await act.client()
            client.send(get("/v1/realtime?model=m-alias&a=1", *UPGRADE, "X-Request-Id: mine") + b"early")
            status, headers = await client.head()
            assert headers["x-request-id"] == "mine"
            assert (status, headers["sec-websocket-accept"], headers["upgrade"]) == (101, "xyz", "websocket")
            assert await soon(client.reader.readexactly(10)) == b"helloearly"
            assert echo.asked[0].line == "GET /v1/realtime?a=1&model=served+m HTTP/1.1"
            assert echo.asked[0].headers["sec-websocket-key"] == "abc"
            assert echo.asked[0].headers["x-request-id"] == "mine"
            client.send(b"\x00\xff" * 500_000)
            assert await soon(client.reader.readexactly(1_000_000)) == b"\x00\xff" * 500_000
            if end == "engine":
                client.send(b"bye")
                assert await client.closed()
            elif end == "client":
                client.close()
            else:
                act.gate.permits[0].cut("drained")
                assert await client.closed()
            await soon(echo.ended.wait())
            await soon(act.gate.permits[0].over.wait())
            server.close()
            await until(lambda: not act.server.connections)

    asyncio.run(play())


def test_a_pages_own_socket_is_no_request() -> None:
    """It gets through as its path came, keeps no permit, and loads nothing."""

    async def play() -> None:
        echo = EchoEngine()
        async with stage() as act:
            server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
            act.gate.upstream = Listen(port=server.sockets[0].getsockname()[1])
            act.gate.target = Target("m", "served m", own_api=frozenset({"GET /ws"}))
            client = await act.client()
            client.send(get("/upstream/m/ws?clientId=a%20b&key=k", *UPGRADE))
            assert (await client.head())[0] == 101
            assert echo.asked[0].line == "GET /ws?clientId=a%20b&key=k HTTP/1.1"
            await soon(act.gate.permits[0].over.wait())
            client.send(b"still there")
            assert await soon(client.reader.readexactly(16)) == b"hellostill there"
            client.send(b"bye")
            assert await client.closed()
            act.gate.opened.clear()
            for path, status in (("/upstream/m/ws", 503), ("/upstream/m/other", 403)):
                client = await act.client()
                client.send(get(path, *UPGRADE))
                assert (await client.head())[0] == status
                client.close()
            assert act.gate.waiting == 0
            act.gate.opened.set()
            server.close()
            await until(lambda: not act.server.connections)

    asyncio.run(play())


@pytest.mark.parametrize("models", [frozenset(), frozenset({"another"})])
def test_a_pages_own_socket_ends_with_its_key(models: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be open for days; a key that is revoked, or is for other models by now, has it no longer."""
    monkeypatch.setattr(tunnel, "RECHECK_SECONDS", 0.01)
    callers = [Caller("operator", EVERYTHING, frozenset({"m"}))]

    class Keys:
        def identify(self, request: Request) -> Caller:
            return callers[-1]

    async def play() -> None:
        echo = EchoEngine()
        async with stage() as act:
            server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
            act.router.authenticator = Keys()
            act.gate.upstream = Listen(port=server.sockets[0].getsockname()[1])
            act.gate.target = Target("m", "served m", own_api=frozenset({"GET /ws"}))
            client = await act.client()
            client.send(get("/upstream/m/ws", *UPGRADE))
            assert (await client.head())[0] == 101
            client.send(b"x")
            assert await soon(client.reader.readexactly(6)) == b"hellox"
            callers.append(Caller("operator", EVERYTHING, models) if models else NOBODY)
            assert await client.closed()
            server.close()
            await until(lambda: not act.server.connections)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (raw(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno."), 403),
        (raw(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), 404),
        (raw(b"HTTP/1.1 404 Not Found\nContent-Length: 0\n\n"), 404),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), 502),
        (raw(close=True), 502),
        (raw(b"nonsense\r\n\r\n"), 502),
    ],
)
def test_an_engine_that_refuses_is_told_with_its_own_status(script: object, status: int) -> None:
    """Nothing has been switched, so the client gets HTTP; and no word of where the engine listens."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.send(get("/v1/realtime?model=m", *UPGRADE))
            answer = await client.answer()
            assert answer.status == status
            told = answer.json()["error"]["message"]
            assert str(act.gate.upstream.port) not in told
            assert ("no." in told) == (status == 403)

    asyncio.run(play())


def test_a_key_in_a_sub_protocol_does_not_reach_the_engine() -> None:
    """The other protocols do."""

    async def play() -> None:
        async with stage(raw(AGREED, close=True)) as act:
            client = await act.client()
            protocols = "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.secret, v1"
            client.send(get("/v1/realtime?model=m", *UPGRADE, protocols))
            assert (await client.head())[0] == 101
            assert act.engine.asked[0].headers["sec-websocket-protocol"] == "realtime, v1"
            assert await client.closed()

    asyncio.run(play())


@pytest.mark.parametrize(("method", "version"), [("HEAD", "1.1"), ("GET", "1.0")])
def test_what_cannot_switch_protocols_is_a_400(method: str, version: str) -> None:
    """Only a GET can become a WebSocket (RFC 6455, 4.1), and HTTP/1.0 has no upgrades."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(
                get("/v1/realtime?model=m", *UPGRADE, method=method).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
            )
            assert (await client.head())[0] == 400
            assert not act.engine.connections

    asyncio.run(play())


def test_an_unknown_model_is_a_404() -> None:
    """As everywhere else."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/v1/realtime?model=n", *UPGRADE))
            assert (await client.answer()).status == 404

    asyncio.run(play())
