"""Signs of life for a streaming client while its model loads or reads the prompt, and how it learns of a failure then.

After ``loading_comment_interval`` seconds of waiting a request for a stream gets its 200 and an SSE comment, and
another one at every further interval, so that no proxy or client on the way times out. With ``loading_as_reasoning``
a chat client gets reasoning text instead, which it shows to its user. From the 200 on a failure can only be told as an
event, the way vLLM tells one in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

from vllmd.errors import VllmdError
from vllmd.proxy.exchange import LAST_CHUNK, Exchange, chunk
from vllmd.proxy.gate import Gate, Permit
from vllmd.proxy.heads import write_response_head
from vllmd.proxy.http import error_body
from vllmd.proxy.limits import Limits

EARLY_HEAD = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-store"),
    ("x-accel-buffering", "no"),
)


class LoadingHeartbeat:
    """The comments for one client whose request waits for ``model``; ``client_name``: the client's name for it."""

    def __init__(
        self, exchange: Exchange, model: str, client_name: str, stream: bool, limits: Limits, gate: Gate
    ) -> None:
        self.head_sent = False  # the client has a head with status 200 from us, before any of an engine
        self.answer_begun = False  # the client has bytes of the engine's answer
        self._exchange = exchange
        self._model = model
        self._client_name = client_name
        self._gate = gate
        self._interval = limits.now.loading_comment_interval if stream else 0.0
        self.enabled = self._interval > 0  # whether the client gets comments before its answer
        self._as_reasoning = limits.now.loading_as_reasoning
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The request waits for its model: send comments from now on, if ``enabled``."""
        if self.enabled and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._tell_progress)

    async def during(self, acquiring: Awaitable[Permit]) -> Permit:
        """Await a permit. Comments begin where that calls ``start``, since it has to wait, and end with it."""
        try:
            return await acquiring
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _tell_progress(self) -> None:
        self._send(self._comment(self._gate.loading(self._model) or "waiting"))
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tell_progress)

    def reading_prompt(self) -> None:
        """The engine has the request and has not begun to answer: it reads the prompt."""
        self._send(f": {self._model}: reading the prompt\n\n".encode())

    def _send(self, comment: bytes) -> None:
        """Send a comment, the first one behind a head. HTTP/1.0 has no chunks: the answer ends with its connection."""
        exchange = self._exchange
        if self.head_sent:
            exchange.write(self._framed(comment))
            return
        self.head_sent = True
        if not exchange.takes_chunks:
            exchange.end_with_connection()
        extra = [("x-request-id", exchange.request.id)]
        if exchange.takes_chunks:
            extra.append(("transfer-encoding", "chunked"))
        if not exchange.keep_alive:
            extra.append(("connection", "close"))
        exchange.start(200, write_response_head(200, EARLY_HEAD, extra) + self._framed(comment))

    def _framed(self, data: bytes) -> bytes:
        return chunk(data) if self._exchange.takes_chunks else data

    def _comment(self, progress: str) -> bytes:
        request = self._exchange.request
        if not self._as_reasoning or request.path != "/v1/chat/completions":
            return f": loading {self._model}: {progress}\n\n".encode()
        text = f"loading {self._model}: {progress}\n"
        delta = {"role": "assistant", "content": "", "reasoning": text, "reasoning_content": text}
        event = {
            "id": f"chatcmpl-{request.id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self._client_name,
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        }
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def fail(self, error: VllmdError) -> None:
        """Tell the client of the error: as an event, if the head is out already."""
        self._exchange.error, self._exchange.message = type(error).__name__, error.message
        if self.head_sent and not self.answer_begun and not self._exchange.over:
            self.send_error_event(json.dumps(error_body(error, self._exchange.request.path)).encode())
        else:
            self._exchange.fail(error)

    def send_error_event(self, body: bytes) -> None:
        """End the stream with ``body``, an error as the API has them, as its last event."""
        event = error_event(self._exchange.request.path, body)
        self._exchange.write(self._framed(event) + (LAST_CHUNK if self._exchange.takes_chunks else b""))
        self._exchange.finish()


class Heartbeats:
    """One timer for all streams whose engines have not begun to answer, so that none costs a timer of its own.

    Each stream adds a function that sends a sign of life. It is called at each sweep but the first after it was added:
    after one interval, or two at most.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._new: set[Callable[[], None]] = set()
        self._old: set[Callable[[], None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, beat: Callable[[], None]) -> None:
        """Call ``beat`` from now on."""
        self._new.add(beat)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.now.loading_comment_interval, self._sweep)

    def discard(self, beat: Callable[[], None]) -> None:
        """Call ``beat`` no more: the stream's first byte has come, or its client has disconnected."""
        self._new.discard(beat)
        self._old.discard(beat)

    def _sweep(self) -> None:
        self._timer = None
        for beat in list(self._old):
            beat()
        self._old |= self._new
        self._new.clear()
        if self._old and self._limits.now.loading_comment_interval > 0:  # a reload may have switched comments off
            self._timer = asyncio.get_running_loop().call_later(self._limits.now.loading_comment_interval, self._sweep)


def error_event(path: str, body: bytes) -> bytes:
    """An error as the API at ``path`` puts it in a stream."""
    line = b"data: " + b" ".join(body.split()) + b"\n\n"
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + _anthropic(body) + b"\n\n"
    if path.startswith("/v1/responses"):
        return b"event: error\n" + line
    return line + b"data: [DONE]\n\n"


def _anthropic(body: bytes) -> bytes:
    try:
        error = json.loads(body)
        if error.get("type") == "error":
            return json.dumps(error).encode()
        message = error["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = body.decode("utf-8", "replace")
    return json.dumps({"type": "error", "error": {"type": "api_error", "message": message}}).encode()
