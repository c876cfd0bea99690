"""The stand-in in this process, on a Unix socket in a temporary directory, and a plain client for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllmd.simengine.app import App
from vllmd.simengine.context import Context
from vllmd.simengine.device import FakeGpu
from vllmd.simengine.http import Connection
from vllmd.simengine.options import Options
from vllmd.simengine.state import EngineState

LIMIT = 60.0  # seconds: no step of a test takes so long unless something hangs
HELLO = [{"role": "user", "content": "hello big world"}]


@dataclass(frozen=True)
class Reply:
    """An answer, its body complete."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events, decoded; "[DONE]" as it is."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Wire:
    """One connection to an engine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        lines = {"host": "engine", "content-type": "application/json", "content-length": str(len(data))} | named
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def reply(self) -> Reply:
        status, headers = await self.head()
        if "content-length" in headers:
            return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return Reply(status, headers, body)

    def close(self) -> None:
        self.writer.close()


class Rig:
    """A running stand-in and what a test does with it."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        self.state = EngineState(options, [FakeGpu(file) for file in options.device_file])
        self.context = Context(options, self.state)

    async def wire(self) -> Wire:
        return Wire(*await asyncio.open_unix_connection(str(self.path)))

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        wire = await self.wire()
        wire.request(method, path, body, **headers)
        try:
            async with asyncio.timeout(LIMIT):
                return await wire.reply()
        finally:
            wire.close()

    async def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return await self.call("POST", path, body, **headers)

    async def chat(self, **more: Any) -> Reply:
        return await self.post("/v1/chat/completions", {"messages": HELLO} | more)

    async def stream(self, **more: Any) -> Wire:
        """A started chat whose events a test reads itself."""
        wire = await self.wire()
        wire.request("POST", "/v1/chat/completions", {"messages": HELLO, "stream": True} | more)
        return wire


@contextlib.asynccontextmanager
async def rig(tmp_path: Path, **options: Any) -> AsyncIterator[Rig]:
    """A stand-in that is loaded and serves."""
    one = Rig(tmp_path / "engine.sock", replace(Options(quiet=True), **options))
    one.state.hold(one.options.memory)
    connections: set[Connection] = set()
    app = App(one.context)
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: Connection(app, connections, one.options.keep_alive), str(one.path))
    try:
        yield one
    finally:
        server.close()
        for connection in list(connections):
            connection.finish()


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else go on until the condition holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110  the engine offers no event for every state, nor should it
            await asyncio.sleep(0)
