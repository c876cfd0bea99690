"""HTTP/1.1 over asyncio, as much of it as an engine on a private socket needs.

A connection serves one request at a time. When the peer goes, the handler's task is
cancelled, whatever it was doing: that is how a client that leaves frees its slot.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_HEAD_LIMIT = 1 << 18
_LINE_LIMIT = 1 << 10  # bytes of a chunk's size line
_TRAILER_LIMIT = 1 << 13
_READ_AHEAD = 1 << 16  # bytes of a pipelined request kept while another is served


class Malformed(Exception):
    """The bytes are no HTTP/1.1 request; the answer is 400 and the connection ends."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its whole body. ``head`` is as it came, ``headers`` have lower-case names."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    head: bytes
    body: bytes = b""
    version: str = "HTTP/1.1"

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    def get(self, name: str, default: str = "") -> str:
        """The first header of that (lower-case) name."""
        return next((value for key, value in self.headers if key == name), default)

    @property
    def keeps_alive(self) -> bool:
        tokens = self.get("connection").lower()
        return "close" not in tokens and (self.version == "HTTP/1.1" or "keep-alive" in tokens)


Handler = Callable[[Request, "Connection"], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One client. The handler answers with ``send``, or with ``start``, ``write`` and ``end``."""

    def __init__(self, handler: Handler, everyone: set[Connection], keep_alive: float) -> None:
        self._handler = handler
        self._everyone = everyone
        self._keep_alive = keep_alive
        self._buffer = bytearray()
        self._scanned = 0  # bytes of an unfinished head already searched
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._transport: Any = None
        self._request: Request | None = None  # whose body is still to come
        self._chunks: Chunks | None = None
        self._continued = False
        self._chunked = self._close = False
        self.status_line = ""  # of the answer under way or just sent, such as "200 OK"; "" before it
        self.closing = False
        self.gone = asyncio.Event()
        self.extra_headers: tuple[tuple[str, str], ...] = ()
        self.raw: asyncio.Queue[bytes] | None = None  # after an upgrade: the peer's bytes, b"" at the end

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._everyone.add(self)
        self._wait_for_next()

    def data_received(self, data: bytes) -> None:
        if self.raw is not None:
            self.raw.put_nowait(data)
            return
        self._buffer += data
        if self._task is None:
            self._next()
        elif len(self._buffer) > _READ_AHEAD:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._everyone.discard(self)
        self.gone.set()
        self._stop_timer()
        if self.raw is not None:
            self.raw.put_nowait(b"")
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    # One request after the other

    def _next(self) -> None:
        try:
            request = self._parse()
        except Malformed as error:
            return self._refuse(str(error))
        if request is not None:
            self._stop_timer()
            self._task = asyncio.ensure_future(self._serve(request))
        return None

    async def _serve(self, request: Request) -> None:
        self._chunked, self.status_line = False, ""
        self._close = not request.keeps_alive
        try:
            await self._handler(request, self)
        except asyncio.CancelledError:
            return
        except Exception:
            self._transport.abort()
            raise
        self._task = None
        if self._close or self.closing or self.raw is not None:
            self._transport.close()
            return
        self._wait_for_next()
        self._transport.resume_reading()
        self._next()

    def finish(self) -> None:
        """No further request on this connection; one under way is answered first."""
        self.closing = True
        if self._task is None:
            self._transport.close()

    def _wait_for_next(self) -> None:
        def expire() -> None:
            if self._task is None and not self._buffer and self._request is None:
                self._transport.close()

        self._timer = asyncio.get_running_loop().call_later(self._keep_alive, expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, why: str) -> None:
        body = f"Invalid HTTP request received: {why}.".encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n"
        self._transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self._transport.close()

    # Reading

    def _parse(self) -> Request | None:
        """The next request once it is complete; None before that. Raises Malformed."""
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
            self._scanned = len(self._buffer) if end < 0 else 0
            if end < 0:
                if len(self._buffer) > _HEAD_LIMIT:
                    raise Malformed("the head is too long")
                return None
            self._request = parse_head(bytes(self._buffer[: end + 4]))
            self._chunks = Chunks() if self._request.get("transfer-encoding").lower() == "chunked" else None
            del self._buffer[: end + 4]
        request = self._request
        body = self._chunks.feed(self._buffer) if self._chunks else self._counted_body(request)
        if body is None:
            if not self._continued and request.get("expect").lower() == "100-continue":
                self._continued = True
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        self._request, self._continued = None, False
        return replace(request, body=body)

    def _counted_body(self, request: Request) -> bytes | None:
        """A body of the length that the head tells, once all of it has come. Raises Malformed."""
        text = request.get("content-length", "0")
        if not (text.isascii() and text.isdigit()):
            raise Malformed(f"content-length {text!r} is no number")
        if len(self._buffer) < int(text):
            return None
        body = bytes(self._buffer[: int(text)])
        del self._buffer[: int(text)]
        return body

    # Writing

    async def send(self, status: int, body: bytes = b"", content_type: str = "application/json") -> None:
        """Send a whole answer, and wait until the client takes it."""
        self._head(status, (("content-type", content_type), ("content-length", str(len(body)))), body)
        await self.drain()

    async def send_json(self, status: int, content: Any) -> None:
        """A whole answer in JSON, compact as vLLM's."""
        await self.send(status, dump(content))

    async def start(self, status: int, content_type: str) -> None:
        """The head of an answer of unknown length."""
        self._chunked = True
        self._head(status, (("content-type", content_type), ("transfer-encoding", "chunked")))
        await self.drain()

    async def write(self, data: bytes) -> None:
        """A piece of a started answer; waits while the peer does not read."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.drain()

    async def end(self) -> None:
        """The end of a started answer."""
        self._transport.write(b"0\r\n\r\n")
        await self.drain()

    def upgrade(self, headers: tuple[tuple[str, str], ...]) -> None:
        """101; from now on ``raw`` has the peer's bytes and ``write_raw`` sends."""
        self.raw = asyncio.Queue()
        self._head(101, (("connection", "Upgrade"), ("upgrade", "websocket"), *headers))
        if self._buffer:
            self.raw.put_nowait(bytes(self._buffer))
            self._buffer.clear()

    def write_raw(self, data: bytes) -> None:
        """Write bytes as they are, for answers that are wrong on purpose."""
        self._transport.write(data)

    def _head(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes = b"") -> None:
        self.status_line = f"{status} {HTTPStatus(status).phrase}"
        lines = [f"HTTP/1.1 {self.status_line}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in (*headers, *self.extra_headers)]
        if self._close and status != 101:
            lines.append("connection: close")
        self._transport.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    @property
    def streaming(self) -> bool:
        """Whether a started answer is under way."""
        return self._chunked

    async def drain(self) -> None:
        """Wait while the peer does not read."""
        if self._room is not None:
            await self._room


def parse_head(head: bytes) -> Request:
    """A request's head. Raises Malformed."""
    lines = head[:-4].decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise Malformed(f"request line {lines[0]!r}")
    headers = []
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Malformed(f"header line {line!r}")
        headers.append((name.lower(), value.strip()))
    return Request(parts[0], parts[1], tuple(headers), head, version=parts[2])


class Chunks:
    """A chunked body as it comes in."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._left = 0  # bytes of this chunk still to come, its CRLF included
        self._last = False

    def feed(self, buffer: bytearray) -> bytes | None:
        """Take from the buffer; the body once it is complete, else None. Raises Malformed."""
        while not self._last:
            if self._left == 0:
                if not self._next_size(buffer):
                    return None
                continue
            piece = buffer[: self._left]
            del buffer[: len(piece)]
            self._data += piece
            self._left -= len(piece)
            if self._left:
                return None
            del self._data[-2:]  # the chunk's CRLF
        # Behind the last chunk come trailers, which are dropped, and an empty line.
        end = 2 if buffer[:2] == b"\r\n" else buffer.find(b"\r\n\r\n") + 4
        if len(buffer) < 2 or end == 3:
            if len(buffer) > _TRAILER_LIMIT:
                raise Malformed("the trailers are too long")
            return None
        del buffer[:end]
        return bytes(self._data)

    def _next_size(self, buffer: bytearray) -> bool:
        """Read a chunk's size line; False: it has not come in full. Raises Malformed."""
        end = buffer.find(b"\r\n", 0, _LINE_LIMIT)
        if end < 0:
            if len(buffer) >= _LINE_LIMIT:
                raise Malformed("a chunk's size line is too long")
            return False
        line = bytes(buffer[:end])
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError:
            raise Malformed(f"chunk size {line[:20]!r}") from None
        del buffer[: end + 2]
        self._last = size == 0
        self._left = size + 2 if size else 0
        return True


def dump(content: Any) -> bytes:
    """Compact JSON in UTF-8; what is no Unicode becomes a question mark."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
