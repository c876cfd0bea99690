"""What a streaming client hears while its model loads or reads the prompt, and how it learns of a failure then.

After ``loading_comment_interval`` seconds of waiting a request that asked for a stream gets its 200 and an SSE
comment, and another one at every further interval, so that no proxy or client on the way gives up (or, where the
configuration says so, a chat client gets reasoning text, which it shows to whoever waits). From then on
a failure can only be told as an event, the way vLLM tells one in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Protocol

from vllmd.errors import VllmdError
from vllmd.proxy.exchange import LAST_CHUNK, Exchange, chunk
from vllmd.proxy.gate import Gate
from vllmd.proxy.heads import write_response_head
from vllmd.proxy.http import error_body
from vllmd.proxy.limits import Limits

EARLY_HEAD = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-store"),
    ("x-accel-buffering", "no"),
)


class LoadingHeartbeat:
    """What a client hears while its request waits for ``model``, which it called ``asked``."""

    def __init__(self, exchange: Exchange, model: str, asked: str, *, stream: bool, limits: Limits, gate: Gate) -> None:
        self.head_sent = False  # the client has a head with status 200 from us, before any of an engine
        self.answer_begun = False  # the client has bytes of the engine's answer
        self._exchange = exchange
        self._model = model
        self._asked = asked
        self._gate = gate
        self._interval = limits.now.loading_comment_interval if stream else 0.0
        self.wanted = self._interval > 0  # whether the client is to hear anything before its answer
        self._as_reasoning = limits.now.loading_as_reasoning
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The wait begins, if it has not."""
        if self.wanted and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._comment)

    def end(self) -> None:
        """The wait for the model has ended: no more comments about it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _comment(self) -> None:
        self.say(self._told(self._gate.loading(self._model) or "waiting"))
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._comment)

    def reading(self) -> None:
        """The engine has the request and has not begun to answer: it reads the prompt."""
        self.say(f": {self._model}: reading the prompt\n\n".encode())

    def say(self, comment: bytes) -> None:
        """Send it, the first time behind a head. HTTP/1.0 has no chunks: there the answer ends with its connection."""
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

    def _told(self, progress: str) -> bytes:
        request = self._exchange.request
        if not self._as_reasoning or request.path != "/v1/chat/completions":
            return f": loading {self._model}: {progress}\n\n".encode()
        text = f"loading {self._model}: {progress}\n"
        delta = {"role": "assistant", "content": "", "reasoning": text, "reasoning_content": text}
        event = {
            "id": f"chatcmpl-{request.id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self._asked,
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        }
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def fail(self, error: VllmdError) -> None:
        """Tell the client, in the way that is left."""
        self._exchange.error, self._exchange.message = type(error).__name__, error.message
        if self.head_sent and not self.answer_begun and not self._exchange.over:
            self.fail_with(json.dumps(error_body(error, self._exchange.request.path)).encode())
        else:
            self._exchange.fail(error)

    def fail_with(self, body: bytes) -> None:
        """End the stream with ``body``, an error as the API has them, as its last event."""
        event = error_event(self._exchange.request.path, body)
        self._exchange.write(self._framed(event) + (LAST_CHUNK if self._exchange.takes_chunks else b""))
        self._exchange.finish()


class Waiting(Protocol):
    """A stream that waits for its engine's first byte."""

    def beat(self) -> None:
        """Give a sign of life."""


class Heartbeats:
    """One timer for all streams whose engines have not begun to answer, so that none costs a timer of its own.

    A stream is given a sign of life at each sweep but the first after it came: after one interval, or two at most.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._new: set[Waiting] = set()
        self._old: set[Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiting: Waiting) -> None:
        """Send this stream comments from now on."""
        self._new.add(waiting)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.now.loading_comment_interval, self._sweep)

    def discard(self, waiting: Waiting) -> None:
        """The stream's first byte has come, or its client has left: no more signs of life."""
        self._new.discard(waiting)
        self._old.discard(waiting)

    def _sweep(self) -> None:
        self._timer = None
        for waiting in list(self._old):
            waiting.beat()
        self._old |= self._new
        self._new.clear()
        if self._old and self._limits.now.loading_comment_interval > 0:  # it may have been switched off meanwhile
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
        told = json.loads(body)
        if told.get("type") == "error":
            return json.dumps(told).encode()
        message = told["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = body.decode("utf-8", "replace")
    return json.dumps({"type": "error", "error": {"type": "api_error", "message": message}}).encode()
