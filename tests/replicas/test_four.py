"""Four replicas, ten thousand requests: one replica is slow, one begins to hang, one dies in the middle of it all."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.engines.installed import Site, daemon

REQUESTS, AT_ONCE = 10_000, 32
LIMIT = 120.0  # seconds that only a defect exceeds
HANGS_AFTER, DIES_AFTER = 400, 800  # requests
QUICK, SLOW = 0.002, 0.4  # seconds to the first byte
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
ANSWER = b'{"id":"c","object":"chat.completion","model":"m","choices":[]}'
EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % n for n in range(4)]


@dataclass
class Replica:
    """A server of OpenAI's protocol on a Unix socket, which may be slow, hang, or die in the middle of its answers."""

    path: Path
    delay: float = QUICK
    hangs_after: float = float("inf")
    dies_after: float = float("inf")
    asked: int = 0
    streaming: int = 0
    cut: int = 0  # streams that it had begun when it died
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def open(self) -> None:
        self.server = await asyncio.start_unix_server(self._serve, self.path, backlog=1024)

    async def die(self) -> None:
        """As when its process is killed: nobody listens, and every connection breaks off."""
        self.cut = self.streaming
        self.server.close()
        self.path.unlink(missing_ok=True)
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        size = LENGTH.search(head)
        body = await reader.readexactly(int(size[1]) if size else 0)
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            return True
        self.asked += 1
        if self.asked > self.hangs_after:
            await reader.read()  # until whoever asked gives it up
            return False
        if self.asked > self.dies_after:
            await self.die()
            return False
        await asyncio.sleep(self.delay)
        if b'"stream": true' in body:
            await self._stream(writer)
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
            writer.write(head + ANSWER)
        return True

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        self.streaming += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in EVENTS:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0.003)
        writer.write(b"0\r\n\r\n")
        self.streaming -= 1


class Client:
    """Asks one request after another on a connection that it keeps, and tells how each ended."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connected = False

    async def ask(self, *, stream: bool) -> str:
        """``answered``, ``cut`` in the middle, or the error."""
        if not self.connected:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.connected = True
        body = b'{"model": "m", "stream": %b, "messages": []}' % (b"true" if stream else b"false")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        size = LENGTH.search(answer)
        if size:
            told = await self.reader.readexactly(int(size[1]))
            return "answered" if answer.startswith(b"HTTP/1.1 200") else told.decode()
        return await self._chunks()

    async def _chunks(self) -> str:
        try:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                await self.reader.readexactly(size + 2)
            await self.reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.writer.close()
            self.connected = False
            return "cut"
        return "answered"


async def load(port: int) -> Counter[str]:
    """So many requests, so many at once, every other one a stream. How they ended."""
    ended: Counter[str] = Counter()
    numbers = iter(range(REQUESTS))

    async def work() -> None:
        client = Client(port)
        for number in numbers:
            ended[await client.ask(stream=number % 2 == 0)] += 1
        client.writer.close()

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return ended


def replicated(folder: Path) -> tuple[dict[str, Replica], dict[str, object]]:
    """The four, and a configuration in which they are one model."""
    stubs = {
        "quick": Replica(folder / "quick.sock"),
        "slow": Replica(folder / "slow.sock", delay=SLOW),
        "hanging": Replica(folder / "hanging.sock", hangs_after=HANGS_AFTER),
        "dying": Replica(folder / "dying.sock", dies_after=DIES_AFTER),
    }
    listed = [
        {"name": name, "engine": "remote", "options": {"url": f"unix:{stub.path}"}} for name, stub in stubs.items()
    ]
    model = {"engine": "remote", "replicas": {"of": listed, "probe_limit": "1s", "retries": 5}}
    return stubs, {"server": {"idle_exit": "never"}, "devices": [], "models": {"m": model}}


async def through(site: Site, stubs: dict[str, Replica]) -> Counter[str]:
    """The load, with the replicas up."""
    for stub in stubs.values():
        await stub.open()
    ended = await load(site.port)
    for stub in stubs.values():
        stub.server.close()
    return ended


def test_nobody_sees_an_error_but_whose_stream_had_begun(tmp_path: Path) -> None:
    """A stream that was cut says so; all else is answered, by somebody. The slow one gets hardly anything."""
    stubs, config = replicated(tmp_path)
    with daemon(tmp_path / "site", config) as site:
        ended = asyncio.run(asyncio.wait_for(through(site, stubs), LIMIT))
        decisions = site.admin.get("/admin/decisions").json()["decisions"]
        failure = site.view("m")["failure"]
    assert sum(ended.values()) == REQUESTS
    assert set(ended) <= {"answered", "cut"}, ended
    assert ended["cut"] == stubs["dying"].cut
    assert stubs["hanging"].asked > HANGS_AFTER, "it was to hang in the middle"
    assert stubs["dying"].asked > DIES_AFTER
    assert stubs["slow"].asked < REQUESTS * 0.05, f"the slow one got {stubs['slow'].asked}"
    told = {(decision["model"], decision["what"]) for decision in decisions}
    assert ("m@hanging", "eject") in told
    assert ("m@dying", "eject") in told
    assert "m@dying" in failure
