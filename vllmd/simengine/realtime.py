"""The WebSocket route /v1/realtime: session.created, then an echo of what was committed."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from typing import Any

from vllmd.simengine.context import Context, bad_request
from vllmd.simengine.http import Connection, Request

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10


class Closed(Exception):
    """The peer closed, or went."""


async def realtime(context: Context, request: Request, out: Connection) -> None:
    """GET /v1/realtime with an upgrade; the model comes in the event ``session.update``."""
    key = request.get("sec-websocket-key")
    if request.get("upgrade").lower() != "websocket" or not key:
        raise bad_request("WebSocket upgrade expected")
    accept = base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()
    out.upgrade((("sec-websocket-accept", accept),))
    socket = _Socket(out)
    socket.send({"type": "session.created", "id": context.request_id(request, "sess"), "created": context.created})
    try:
        await _session(context, socket)
    except Closed:
        return


async def _session(context: Context, socket: _Socket) -> None:
    heard, model = bytearray(), ""
    while True:
        event = await socket.receive()
        match event.get("type"):
            case "session.update":
                model = _choose(context, socket, event)
            case "input_audio_buffer.append":
                heard += base64.b64decode(str(event.get("audio", "")))
            case "input_audio_buffer.commit" if not model:
                socket.error("Model not validated. Send a session.update event first.", "model_not_validated")
            case "input_audio_buffer.commit":
                await _transcribe(context, socket, len(heard))
                heard.clear()
            case other:
                socket.error(f"Unknown event type: {other}", "unknown_event")


def _choose(context: Context, socket: _Socket, event: dict[str, Any]) -> str:
    model = str(event.get("model") or "")
    if model in context.options.names:
        return model
    socket.error(f"The model `{model}` does not exist.", "model_not_found")
    return ""


async def _transcribe(context: Context, socket: _Socket, size: int) -> None:
    text = f"heard {size} bytes"
    await context.state.pool(1)
    for word in text.split():
        socket.send({"type": "transcription.delta", "delta": f"{word} "})
    socket.send({"type": "transcription.done", "text": text, "usage": {"prompt_tokens": 1, "completion_tokens": 3}})


class _Socket:
    """WebSocket frames on an upgraded connection."""

    def __init__(self, out: Connection) -> None:
        self._out = out
        self._buffer = bytearray()

    def send(self, event: dict[str, Any]) -> None:
        self._frame(_TEXT, json.dumps(event).encode())

    def error(self, message: str, code: str) -> None:
        self.send({"type": "error", "error": message, "code": code})

    def _frame(self, opcode: int, data: bytes) -> None:
        size = struct.pack("!B", len(data)) if len(data) < 126 else struct.pack("!BH", 126, len(data))
        self._out.write_raw(bytes([0x80 | opcode]) + size + data)

    async def receive(self) -> dict[str, Any]:
        """The next event; pings are answered meanwhile. Raises Closed."""
        while True:
            opcode, data = await self._next()
            if opcode == _CLOSE:
                self._frame(_CLOSE, data[:2])
                raise Closed
            if opcode == _PING:
                self._frame(_PONG, data)
            if opcode == _TEXT:
                try:
                    event = json.loads(data)
                except ValueError:
                    event = None
                return event if isinstance(event, dict) else {"type": "invalid JSON"}

    async def _next(self) -> tuple[int, bytes]:
        first, second = await self._take(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self._take(8))
        mask = await self._take(4) if second & 0x80 else bytes(4)
        data = await self._take(size)
        return first & 0x0F, bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))

    async def _take(self, size: int) -> bytes:
        assert self._out.raw is not None
        while len(self._buffer) < size:
            piece = await self._out.raw.get()
            if not piece:
                raise Closed
            self._buffer += piece
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
