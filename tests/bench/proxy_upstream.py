"""The engine's part in ``bench-proxy``: an asyncio Protocol that does as little as it can.

    python -m tests.bench.proxy_upstream PORT

On uvloop where there is one (LiteLLM brings it). A stream's events are written one after another, each by a system
call of its own. What the client says in its message decides how: ``pace N MS`` makes it N events, one every MS
milliseconds, ``idle`` one event and no end, ``at once`` 64 events in a single write; anything else 64 events as fast
as they go.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from typing import cast

EVENTS = 64
ANSWER = (
    b'{"id":"c1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"' + b"word " * 60 + b'"}}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":60,"total_tokens":69}}'
)
MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
EVENT = (
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
DONE = b"e\r\ndata: [DONE]\n\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
PACE = re.compile(rb"pace (\d+) (\d+)")


class UpstreamProtocol(asyncio.Protocol):
    """Answers every POST by JSON or by a stream, every GET by a list of models."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A proxy has come."""
        self._transport = cast(asyncio.Transport, transport)
        self._data = b""

    def data_received(self, data: bytes) -> None:
        """Requests, one after another."""
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        length = LENGTH.search(self._data, 0, end) if end >= 0 else None
        size = end + 4 + (int(length[1]) if length else 0)
        if end < 0 or len(self._data) < size:
            return
        head, body, self._data = self._data[:end], self._data[end + 4 : size], self._data[size:]
        if b'"stream":' in body and b'"stream":false' not in body:
            self._stream(body)
        else:
            answer = ANSWER if head.startswith(b"POST") else MODELS
            self._transport.write(JSON_HEAD % len(answer) + answer)

    def _stream(self, body: bytes) -> None:
        self._transport.write(STREAM_HEAD)
        if pace := PACE.search(body):
            self._paced(int(pace[1]), int(pace[2]) / 1000)
        elif b'"idle"' in body:
            self._transport.write(CHUNK)
        elif b'"at once"' in body:
            self._transport.write(CHUNK * EVENTS + DONE + LAST_CHUNK)
        else:
            for _ in range(EVENTS):
                self._transport.write(CHUNK)
            self._transport.write(LAST_CHUNK)

    def _paced(self, left: int, every: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(CHUNK)
        if left > 1:
            asyncio.get_running_loop().call_later(every, self._paced, left - 1, every)
        else:
            self._transport.write(LAST_CHUNK)


async def serve(port: int) -> None:
    """Until killed."""
    server = await asyncio.get_running_loop().create_server(UpstreamProtocol, "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve(int(sys.argv[1])))
