"""A gate, engines and clients for the proxy's tests. Every wait here has a bound."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.errors import UnknownModel, VllmdError
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.account import Tracer
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.forward import Relay
from vllmd.proxy.gate import Target, silent
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.limits import Limits
from vllmd.proxy.models import add_model_routes
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server
from vllmd.proxy.tokens import Tokens
from vllmd.proxy.upstream import OutOfFiles, Unreached

BOUND = 60.0  # seconds that nothing in these tests may take


async def soon(awaitable: Awaitable[Any]) -> Any:
    """The awaitable's result, or a failed test."""
    return await asyncio.wait_for(awaitable, BOUND)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until ``condition`` holds: for effects that nobody announces."""

    async def turn() -> None:
        while not condition():  # noqa: ASYNC110 - there is no event to wait for; that is what this is for
            await asyncio.sleep(0.001)

    await soon(turn())


class FakePermit:
    """Counts its endings."""

    def __init__(self, gate: FakeGate, upstream: Listen, target: Target | None) -> None:
        self.gate = gate
        self.upstream = upstream
        self.target = target
        self.begun = 0
        self.failed = ""
        self.endings: list[int | None] = []
        self.tokens: Tokens | None = None
        self.over = asyncio.Event()
        self.cut: Callable[[str], None] = lambda reason: None

    def answered(self, streamed: bool) -> None:
        """The first byte of a replica's answer."""
        self.begun += 1

    def release(self, tokens: Tokens | None = None, size: int = 0, failed: str = "") -> None:
        """Over."""
        self.endings.append(None if tokens is None or tokens.estimated else tokens.total)
        self.tokens = tokens
        self.failed = failed
        self.over.set()

    async def retry(self, error: VllmdError) -> FakePermit:
        """As the gate says."""
        return await self.gate.retry(self, error)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Remember whom to tell."""
        self.cut = callback


class FakeGate:
    """One model, ``m`` (alias ``m-alias``); ``shut`` makes requests wait, ``refusal`` refuses them."""

    def __init__(self, upstream: Listen) -> None:
        self.upstream = upstream
        self.permits: list[FakePermit] = []
        self.waiting = 0
        self.left = 0
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.opened.set()
        self.refusal: VllmdError | None = None
        self.target = Target("m", "m", own_api=frozenset({"GET /metrics", "GET /version", "GET /files/{rest:path}"}))
        self.names: tuple[str, ...] = ("m", "m-alias")
        self.replicas: list[tuple[Listen, Target]] = []  # where requests go, one after another
        self.only: list[str] = []
        self.kept_alive: list[tuple[str, str, float]] = []

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """``m`` under any of its names."""
        if name not in self.names:
            raise UnknownModel(f"no model {name!r}; there is 'm'", param="model")
        return self.target

    def serves(self, model: str) -> bool:
        """Unless requests wait."""
        return self.opened.is_set()

    async def retry(self, permit: FakePermit, error: VllmdError) -> FakePermit:
        """Where nobody listened, and to the other replicas one after another."""
        if isinstance(error, OutOfFiles):
            raise error
        if self.replicas:
            return await self.acquire("m", "")
        if not isinstance(error, Unreached) or len(self.permits) >= 20:
            raise error
        await asyncio.sleep(0.01)
        return await self.acquire("m", "")

    def try_acquire(
        self,
        model: str,
        key: str,
        only: str = "",
        body: bytes = b"",
        waits: Callable[[], None] = silent,
        offer: str = "",
    ) -> FakePermit | None:
        """Through, if it is open."""
        if not self.opened.is_set():
            return None
        self.only.append(only)
        self.entered.set()
        return self._admitted()

    async def acquire(
        self,
        model: str,
        key: str,
        only: str = "",
        body: bytes = b"",
        waits: Callable[[], None] = silent,
        offer: str = "",
        route: str = "",
    ) -> FakePermit:
        """Through, once it is open."""
        if (permit := self.try_acquire(model, key, only)) is not None:
            return permit
        self.only.append(only)
        waits()
        self.waiting += 1
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.waiting -= 1
        return self._admitted()

    def _admitted(self) -> FakePermit:
        """A new permit. Raises ``refusal``."""
        if self.refusal is not None:
            raise self.refusal
        upstream, target = self.replicas.pop(0) if self.replicas else (self.upstream, None)
        self.permits.append(FakePermit(self, upstream, target))
        return self.permits[-1]

    def loading(self, model: str) -> str:
        """Always the weights."""
        return "weights"

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """Remember it."""
        self.kept_alive.append((model, key, seconds))

    def check(self) -> None:
        """Every permit ended exactly once."""
        assert [len(permit.endings) for permit in self.permits] == [1] * len(self.permits)


@dataclass
class Asked:
    """A request as an engine got it."""

    line: str
    headers: dict[str, str]
    body: bytes
    head: str = ""  # as it came


Script = Callable[["Engine", Asked, asyncio.StreamWriter], Awaitable[None]]


class Engine:
    """An upstream that does what its script says for each request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self.closed = 0
        self.ended = asyncio.Event()  # a connection was closed by the proxy
        self.go = asyncio.Event()  # for scripts that wait for the test
        self.listen = Listen()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            self.ended.set()
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (field.split(":", 1) for field in fields)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        asked = Asked(line, headers, body, head)
        self.asked.append(asked)
        work = asyncio.ensure_future(self.script(self, asked, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = gone.done()
            work.cancel()
            gone.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if left or writer.is_closing():
            raise ConnectionResetError
        if isinstance(results[0], Exception):
            raise results[0]


def reply(body: bytes, head: str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n") -> Script:
    """Answer with ``body`` and its length."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return script


def raw(*pieces: bytes, close: bool = False) -> Script:
    """Send these bytes, each by itself; then close, if asked to."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return script


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Answer:
    """A response as a client got it. ``raw`` is the body with its framing."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes = b""

    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


class Client:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)

    def post(self, path: str = "/v1/chat/completions", body: bytes = b'{"model":"m"}', *fields: str) -> None:
        """Send a JSON request."""
        self.send(post(path, body, *fields))

    async def answer(self, method: str = "POST") -> Answer:
        """Read one whole answer."""
        status, headers = await self.head()
        if status == 100:
            return Answer(status, headers, b"")
        if method == "HEAD" or status in (204, 304):
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body, raw_body = await self.chunks()
            return Answer(status, headers, body, raw_body)
        if "content-length" in headers:
            return Answer(status, headers, await soon(self.reader.readexactly(int(headers["content-length"]))))
        return Answer(status, headers, await self.rest())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read one head."""
        head = (await soon(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        return int(line.split()[1]), dict(field.lower().split(": ", 1) for field in fields)

    async def chunks(self) -> tuple[bytes, bytes]:
        """Read a chunked body: payload, and as it came."""
        payload, everything = b"", b""
        while True:
            line = await soon(self.reader.readuntil(b"\r\n"))
            data = await soon(self.reader.readexactly(int(line, 16) + 2))
            payload, everything = payload + data[:-2], everything + line + data
            if line == b"0\r\n":
                return payload, everything

    async def rest(self) -> bytes:
        """Read to the end of the connection; a reset ends it too."""
        with contextlib.suppress(ConnectionError):
            return bytes(await soon(self.reader.read(-1)))
        return b""

    async def closed(self) -> bool:
        """Whether the server closes with nothing more to say."""
        return await self.rest() == b""

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self.writer.transport.get_write_buffer_size()

    def reset(self) -> None:
        """Leave with a reset instead of an orderly end."""
        reset(self.writer)

    def close(self) -> None:
        """Leave."""
        self.writer.close()


def post(path: str = "/v1/chat/completions", body: bytes = b'{"model":"m"}', *fields: str) -> bytes:
    """A JSON request's bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: vllmd", *fields, f"Content-Length: {len(body)}"]
    if not any(field.lower().startswith("content-type:") for field in fields):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str, *fields: str, method: str = "GET") -> bytes:
    """A bodiless request's bytes."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: vllmd", *fields, "", ""]).encode()


@dataclass
class Stage:
    """A proxy between clients and one engine."""

    server: Server
    relay: Relay
    router: Router
    gate: FakeGate
    engine: Engine
    port: int
    ended: list[Exchange] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        """A new client."""
        client = Client(*await soon(asyncio.open_connection("127.0.0.1", self.port)))
        self.clients.append(client)
        return client

    async def at_rest(self) -> None:
        """Every client left; nothing may be left of them."""
        for client in self.clients:
            client.close()
        await until(lambda: not self.server.connections)
        await until(lambda: self.gate.waiting == 0)
        await until(lambda: all(permit.endings for permit in self.gate.permits))
        self.gate.check()
        assert self.server.memory.held == 0


async def hello(request: Request) -> Response:
    """A local handler that tells what it saw."""
    told = {"method": request.method, "path": request.path, "query": request.query, "body": request.body.decode()}
    return json_response(told)


@contextlib.asynccontextmanager
async def stage(
    script: Script | None = None, limits: Limits | None = None, tracer: Tracer | None = None
) -> AsyncIterator[Stage]:
    """A proxy with a local route ``/hello`` and the model routes, in front of an engine; checked when it ends."""
    engine = Engine(script or reply(b'{"model":"m"}'))
    upstream = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.listen = Listen(port=upstream.sockets[0].getsockname()[1])
    gate = FakeGate(engine.listen)
    limits = limits or Limits(ServerConfig())
    router, relay = Router(), Relay(gate, limits, tracer=tracer)
    for method in ("GET", "POST"):
        router.add(method, "/hello", hello, "open", doc={"requestBody": {}})
    add_model_routes(router, relay)
    ended: list[Exchange] = []
    unheard: list[dict[str, Any]] = []  # what asyncio would have logged: exceptions that nobody caught, lost tasks
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server = Server(router, limits, [listener], ended.append)
        server.start()
        port = listener.getsockname()[1]
        act = Stage(server, relay, router, gate, engine, port, ended)
        try:
            yield act
            await act.at_rest()
        finally:
            await server.close()
            relay.pool.close()
            upstream.close()
            await until(lambda: engine.closed == engine.connections)
        assert unheard == []
