"""The exchange that the relay gets instead of the client's: it translates the answer, and writes it to the client's.

It speaks HTTP/1.0, which has no chunks: the relay writes a head, and then the plain body. Pauses and the end of the
client are passed on to the relay; the limits of the request (time, memory) are those of the client's exchange.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import cast

from vllmd.errors import UpstreamFailed, VllmdError
from vllmd.ollama.answers import error_text
from vllmd.ollama.lines import Lines
from vllmd.proxy.exchange import LAST_CHUNK, Exchange, Wire, chunk
from vllmd.proxy.heads import write_response_head
from vllmd.proxy.http import Headers, Request, Response, json_response

STREAM_HEAD = (("content-type", "application/x-ndjson"), ("cache-control", "no-store"), ("x-accel-buffering", "no"))
PASSED_ON = ("retry-after", "www-authenticate")  # of an error's head
NOT_KEPT = frozenset((b"content-type", b"content-length", b"content-encoding", b"transfer-encoding", b"accept"))
MAX_WHOLE_BYTES = 64 << 20  # of an answer that is no stream
BROKEN = "the engine broke off its answer"

Whole = Callable[[bytes], bytes]  # an engine's answer that is no stream -> the client's


class Inner(Exchange):
    """The relay's exchange. ``response`` is the translated answer, unless it was streamed to the client already."""

    def __init__(self, outer: Exchange, path: str, lines: Lines | None, whole: Whole, sent: Callable[[], None]) -> None:
        """The client's request at a ``path`` of OpenAI's. ``lines``: of a stream; ``whole``: of any other answer.

        ``sent`` is called when an engine has the request.
        """
        self._on_sent = sent
        super().__init__(_inner(outer.request, path), cast(Wire, None), self.write, keep_alive=True)
        self.response: Response | None = None
        self._outer = outer
        self._task = asyncio.current_task()
        self._lines = lines
        self._translate = whole
        self._opening = ""
        self._body = bytearray()
        self._streams = False
        self._closing = b""  # the last lines, while the engine's own end may still come along with them

    def close(self) -> None:
        """Drop all further bytes, and the references to and from the client's exchange: both are freed at once."""
        self._outer.on_pause = self.on_pause = self._task = None
        self.client_left()

    # -- called by the relay

    def write(self, data: bytes) -> None:
        """Take the head with what comes along with it, or more of the body."""
        if self.over:
            return
        if not self._opening:
            head, _, data = data.partition(b"\r\n\r\n")
            outer = self._outer.request
            outer.answer_fields = (*outer.answer_fields, *self.request.answer_fields)
            self._opening = head.decode("latin-1").lower()
            events = self.status == 200 and "\r\ncontent-type: text/event-stream" in self._opening
            self._streams = events and self._lines is not None
        self._take(data, None)

    def start(self, status: int, head: bytes, pieces: Sequence[bytes] = ()) -> None:
        """Take the head, and then what comes along with it as ``write_pieces`` does."""
        super().start(status, head)
        if pieces:
            self.write_pieces(pieces)

    def write_pieces(self, pieces: Sequence[bytes]) -> None:
        """Take more of the body, cut as the engine cut it."""
        if self._streams and not self.over:
            self._take(b"", pieces)
        else:
            super().write_pieces(pieces)

    def _take(self, data: bytes, pieces: Sequence[bytes] | None) -> None:
        """Take more of the body: ``pieces``, or else ``data``."""
        try:
            if self._streams and self._lines is not None:
                lines = self._lines.feed(data) if pieces is None else self._lines.feed_pieces(pieces)
                if self._lines.over and lines and not self._closing:
                    # The engine's end of the answer mostly comes in the same read: then all goes out as one.
                    self._closing = lines
                    asyncio.get_running_loop().call_soon(self._close)
                else:
                    self._deliver(lines)
            else:
                self._body += data
                if len(self._body) > MAX_WHOLE_BYTES:
                    raise UpstreamFailed(f"the engine's answer has more than {MAX_WHOLE_BYTES} bytes")
        except UpstreamFailed as error:
            self.over = True
            self._outer.fail(error)
            if self._task is not None:
                self._task.cancel()  # the relay closes the engine's connection then, as when a client disconnects

    def finish(self) -> None:
        """The engine's answer is whole: close the client's."""
        if self.over:
            return
        self.over = True
        if self._streams and self._lines is not None:
            self._end_stream(self._lines.end())
        else:
            self.response = self._response(bytes(self._body))

    def abort(self) -> None:
        """The answer broke off. A stream's last line has the error, as Ollama's does."""
        if self.over:
            return
        self.over = True
        if self._streams and self._lines is not None:
            self._end_stream(b"" if self._closing else self._lines.broken(BROKEN))
        else:
            self.response = ollama_error(UpstreamFailed(BROKEN))

    def expire(self, seconds: float) -> None:
        """Set the time limit of the client's exchange."""
        self._outer.expire(seconds)

    def charge_body(self, size: int) -> None:
        """Charge the client's exchange with the body's memory."""
        self._outer.charge_body(size)

    def follow_pauses(self, callback: Callable[[bool], None]) -> None:
        """An engine has the request: have ``callback`` told when the client stalls."""
        super().follow_pauses(callback)
        self._on_sent()

    # -- what goes to the client

    def _deliver(self, lines: bytes, end: bytes = b"") -> None:
        """Send ``lines``, the first along with the head, the last along with the ``end`` of the body."""
        outer = self._outer
        if not (lines or end):
            return
        framed = (chunk(lines) if lines and outer.takes_chunks else lines) + end
        if outer.status:
            outer.write(framed)
            return
        extra = [("x-request-id", outer.request.id)]
        if outer.takes_chunks:
            extra.append(("transfer-encoding", "chunked"))
        else:
            outer.end_with_connection()
        if not outer.keep_alive:
            extra.append(("connection", "close"))
        outer.start(200, write_response_head(200, STREAM_HEAD, extra) + framed)

    def _close(self) -> None:
        lines, self._closing = self._closing, b""
        self._deliver(lines)

    def _end_stream(self, lines: bytes) -> None:
        lines, self._closing = self._closing + lines, b""
        self._deliver(lines, LAST_CHUNK if self._outer.takes_chunks else b"")
        self._outer.finish()

    def _response(self, body: bytes) -> Response:
        if self.status != 200:
            try:
                text = error_text(json.loads(body), "")
            except (ValueError, RecursionError):
                text = ""
            text = text or body[:1000].decode("utf-8", "replace").strip() or f"the engine answered {self.status}"
            fields = [line.partition(": ") for line in self._opening.split("\r\n")[1:]]
            kept = [(name, value) for name, _, value in fields if name in PASSED_ON]
            return json_response({"error": text}, self.status, kept)
        try:
            answer = self._translate(body)
        except VllmdError as error:
            return ollama_error(error)
        return Response(200, answer, "application/json" if self._lines is None else "application/x-ndjson")


def ollama_error(error: VllmdError) -> Response:
    """An error as Ollama's clients expect it."""
    return json_response({"error": error.message}, error.status)


def _inner(request: Request, path: str) -> Request:
    """The client's request as one of OpenAI's at ``path``; the body is the relay's, which it is given apart."""
    fields = [(name, value) for name, value in request.headers.raw if name not in NOT_KEPT]
    return Request(
        method="POST",
        target=path,
        path=path,
        query_string="",
        headers=Headers([*fields, (b"content-type", b"application/json")]),
        peer=request.peer,
        version="1.0",
        id=request.id,
        caller=request.caller,
        route=path,
    )
