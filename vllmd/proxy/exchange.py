"""One request and its answer, as a handler sees them; ``connection.py`` has the socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from vllmd.errors import VllmdError
from vllmd.proxy.account import Account
from vllmd.proxy.heads import BODYLESS, write_response_head
from vllmd.proxy.http import Pairs, Request, Response, error_response


class Wire(Protocol):
    """The interface of a connection for its present exchange."""

    def finished(self, keep_alive: bool) -> None:
        """The answer is whole: read the next request, or close."""

    def abort(self, *, reset: bool) -> None:
        """Close so that the client sees a broken answer; ``reset``: where an orderly close would look like its end."""

    def tunnel(self, receive: Callable[[bytes], None]) -> None:
        """Hand all further bytes of the client's to ``receive``."""

    def pause_client(self, paused: bool) -> None:
        """Stop reading from the client, or go on."""

    def expire(self, seconds: float) -> None:
        """Set the time limit of the present exchange."""

    def end(self, error: VllmdError) -> None:
        """Answer the present exchange with the error, or break off where its answer has begun; cancel its handler."""

    def charge_body(self, size: int) -> None:
        """Set the memory of the request's body, in bytes. Raises Unavailable if there is no room for it."""


class Exchange:
    """One request and its answer.

    A handler answers either with ``respond``, or with ``start``, ``write``..., then ``finish`` or ``abort``.
    ``on_pause(True)`` is called when the client stops taking data, ``on_pause(False)`` when it goes on.
    """

    def __init__(self, request: Request, wire: Wire, send: Callable[[bytes], None], keep_alive: bool) -> None:
        """``send`` writes to the client's transport."""
        self.request = request
        self.takes_chunks = request.version != "1.0"  # the client understands a chunked body
        self.keep_alive = keep_alive
        self.began, self.at = time.monotonic(), time.time()  # the same moment: to measure by, and as a date
        self.first_byte: float | None = None  # seconds until the answer began
        self.status = 0  # 0 until the answer began
        self.sent = 0  # bytes of the answer, heads and framing included
        self.received = 0  # bytes from the client after an upgrade
        self.model = ""  # the model of the request, once it is known
        self.offer = ""  # its adapter or variant, if the request was for one
        self.error = ""  # the name of the error's class, if the request failed
        self.message = ""  # and its message
        self.account: Account | None = None  # of a request for a model, once it is known which
        self.over = False
        self.ends_with_connection = False  # the answer's head does not say where its body ends
        self.on_pause: Callable[[bool], None] | None = None
        self.paused = False  # the client takes no data for now
        self._wire = wire
        self._send = send
        self._writable: asyncio.Future[None] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the request was whole."""
        return time.monotonic() - self.began

    # -- the steps of an answer

    def start(self, status: int, head: bytes, pieces: Sequence[bytes] = ()) -> None:
        """Send the head, with the bytes of the body that are there already: appended to it, or in ``pieces``."""
        self.status = status
        self.first_byte = time.monotonic() - self.began
        if pieces:
            head = b"".join((head, *pieces))
        self.write(with_fields(head, self.request.answer_fields) if self.request.answer_fields else head)

    def write(self, data: bytes) -> None:
        """Send ``data`` as it is; does nothing once the answer is over."""
        if not self.over:
            self.sent += len(data)
            self._send(data)

    def write_pieces(self, pieces: Sequence[bytes]) -> None:
        """Send the ``pieces``, cut as the engine cut them, which a subclass that translates them may use."""
        self.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def client_left(self) -> None:
        """The connection is closed: drop all further bytes of the answer."""
        self._send = _drop

    def finish(self) -> None:
        """End the answer: its last byte has been written."""
        if not self.over:
            self.over = True
            self._wire.finished(self.keep_alive)

    def abort(self) -> None:
        """Break the answer off, so that the client sees that it is not whole."""
        if not self.over:
            self.over = True
            self._wire.abort(reset=self.ends_with_connection)

    def end_with_connection(self) -> None:
        """The answer's body goes on until the connection is closed."""
        self.ends_with_connection = True
        self.keep_alive = False

    def upgrade(self, receive: Callable[[bytes], None]) -> None:
        """Switch the connection to another protocol: hand all further bytes to ``receive``."""
        self._wire.tunnel(receive)

    def pause_client(self, paused: bool) -> None:
        """Stop reading from the client of an upgraded connection, or go on."""
        self._wire.pause_client(paused)

    def expire(self, seconds: float) -> None:
        """Set the time limit: after ``seconds`` answer 504, or break off, and cancel the handler."""
        self._wire.expire(seconds)

    def cancel(self, error: VllmdError) -> None:
        """End the exchange from outside, unless it is over: at once, with this error, and cancel the handler."""
        if not self.over:
            self._wire.end(error)

    def charge_body(self, size: int) -> None:
        """Set the memory of the request's body, in bytes, as it is decoded. Raises Unavailable if there is no room."""
        self._wire.charge_body(size)

    def fail(self, error: VllmdError) -> None:
        """Answer with the error, or break off if the answer has begun."""
        self.error, self.message = self.error or type(error).__name__, self.message or error.message
        if self.over:
            return
        if self.status:
            self.abort()
            return
        response = error_response(error, self.request.path)
        response.headers = (*response.headers, *getattr(error, "headers", ()))
        if response.status == 401 and "text/html" in self.request.headers.get("accept"):  # a browser, which then asks
            response.headers = (*response.headers, ("www-authenticate", 'Basic realm="vllmd", charset="UTF-8"'))
        self._whole(response, response.body if isinstance(response.body, bytes) else b"")

    # -- answering

    async def respond(self, response: Response) -> None:
        """Send ``response``, a streamed one to its end. Raises what its iterator raises."""
        if isinstance(response.body, bytes):
            self._whole(response, response.body)
            return
        framing = [("content-type", response.content_type)]
        if self.takes_chunks:
            framing.append(("transfer-encoding", "chunked"))
        else:
            self.end_with_connection()
        self.start(response.status, self._head(response, framing))
        if self.request.method != "HEAD":
            await self._send_pieces(response.body)
        self.finish()

    def _whole(self, response: Response, body: bytes) -> None:
        framing: list[tuple[str, str]] = []
        if response.status not in BODYLESS:
            framing = [("content-type", response.content_type), ("content-length", str(len(body)))]
        head = self._head(response, framing)
        self.start(response.status, head if self.request.method == "HEAD" else head + body)
        self.finish()

    async def _send_pieces(self, pieces: AsyncIterator[bytes]) -> None:
        try:
            async for piece in pieces:
                if piece:
                    self.write(chunk(piece) if self.takes_chunks else piece)
                    await self.writable()
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()
        if self.takes_chunks:
            self.write(LAST_CHUNK)

    def _head(self, response: Response, framing: Pairs) -> bytes:
        extra: list[tuple[str, str]] = [("x-request-id", self.request.id), *framing]
        if not self.keep_alive:
            extra.append(("connection", "close"))
        elif self.request.version == "1.0":
            extra.append(("connection", "keep-alive"))
        return write_response_head(response.status, response.headers, extra)

    # -- flow control

    async def writable(self) -> None:
        """Wait until the client takes more."""
        if self.paused:
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable

    def follow_pauses(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback(paused)`` from now on, and at once if the client has stopped taking data."""
        self.on_pause = callback
        if self.paused:
            callback(True)

    def pause(self, paused: bool) -> None:
        """Called by the connection: the client stopped, or went on, taking data."""
        self.paused = paused
        if not paused and self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self.on_pause is not None:
            self.on_pause(paused)


def _drop(data: bytes) -> None:
    """Takes the place of the transport's ``write`` once the connection is closed."""


LAST_CHUNK = b"0\r\n\r\n"


def with_fields(head: bytes, fields: Pairs) -> bytes:
    """``head`` with more fields after its status line."""
    line, rest = head.split(b"\r\n", 1)
    more = "".join(f"{name}: {value}\r\n" for name, value in fields).encode("latin-1")
    return line + b"\r\n" + more + rest


def chunk(data: bytes) -> bytes:
    """``data`` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
