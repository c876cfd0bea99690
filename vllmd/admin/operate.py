"""What an operator may do: the verbs of ``vllmctl``, each a POST that becomes an event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from vllmd.admin.control import Control
from vllmd.errors import BadRequest, EngineFailed
from vllmd.proxy.http import Request, Response, event_stream, json_response

TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})


class OperatorEndpoints:
    """``/admin/...``; the caller has been found to be an operator."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self, request: Request) -> Response:
        """``GET /admin/status``."""
        return json_response(self._control.status())

    async def load(self, request: Request) -> Response:
        """``POST /admin/models/{model}/load``; ``?wait=true`` answers when it has settled.

        With ``Accept: application/x-ndjson`` each change is a line, the last one when it has settled.
        """
        model = self._model(request)
        await self._control.load(model)
        return await self._follow(request, model)

    async def wake(self, request: Request) -> Response:
        """``POST /admin/models/{model}/wake``: the same as load."""
        return await self.load(request)

    async def unload(self, request: Request) -> Response:
        """``POST /admin/models/{model}/unload``; ``?force=true`` breaks off its requests."""
        model = self._model(request)
        await self._control.unload(model, force=_flag(request, "force"))
        return await self._follow(request, model)

    async def sleep(self, request: Request) -> Response:
        """``POST /admin/models/{model}/sleep?level=1|2|3``."""
        model, level = self._model(request), request.query.get("level", "1")
        if level not in ("1", "2", "3"):
            raise BadRequest(f"level {level!r} is none; use 1, 2 or 3 (stop)", param="level")
        await self._control.sleep(model, int(level))
        return await self._follow(request, model)

    async def pin(self, request: Request) -> Response:
        """``POST /admin/models/{model}/pin`` with ``{"pinned": true}``."""
        model, body = self._model(request), _object(request)
        if not isinstance(body.get("pinned", True), bool):
            raise BadRequest("pinned must be true or false", param="pinned")
        await self._control.pin(model, body.get("pinned", True))
        return self._line(model)

    async def lease(self, request: Request) -> Response:
        """``POST /admin/models/{model}/lease`` with ``{"lease": NAME, "deadline_seconds": N or null}``."""
        model, body = self._model(request), _object(request)
        lease, seconds = body.get("lease"), body.get("deadline_seconds")
        if not isinstance(lease, str) or not lease:
            raise BadRequest("lease must be a name of your choice", param="lease")
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0):
            raise BadRequest("deadline_seconds must be a number of seconds, or null", param="deadline_seconds")
        await self._control.lease(lease, model, seconds)
        return self._line(model)

    async def release(self, request: Request) -> Response:
        """``DELETE /admin/models/{model}/lease?lease=NAME``; ``&stop=true``: the last to go stops the model at once."""
        model, lease = self._model(request), request.query.get("lease", "")
        if not lease:
            raise BadRequest("say which: ?lease=NAME", param="lease")
        await self._control.release(lease, stop=_flag(request, "stop"))
        return self._line(model)

    async def decisions(self, request: Request) -> Response:
        """``GET /admin/decisions``; ``?model=`` one model's."""
        name = request.query.get("model", "")
        return json_response({"decisions": self._control.decisions(self._control.resolve(name) if name else "")})

    async def events(self, request: Request) -> Response:
        """``GET /admin/events``: decisions as server-sent events, as they are made."""
        return event_stream(_framed(self._control.watch()))

    async def log(self, request: Request) -> Response:
        """``GET /admin/logs/{model}``; ``?lines=50&follow=true``. Plain text."""
        lines = request.query.get("lines", "50")
        if not lines.isdecimal() or int(lines) > 10_000:
            raise BadRequest("lines must be a number up to 10000", param="lines")
        text = self._control.log(self._model(request), int(lines), follow=_flag(request, "follow"))
        return Response(200, _lines(text), "text/plain; charset=utf-8", (("x-accel-buffering", "no"),))

    async def reload(self, request: Request) -> Response:
        """``POST /admin/reload``: 400 with every error if the configuration is invalid; then nothing changed."""
        return json_response(await self._control.reload())

    def _model(self, request: Request) -> str:
        return self._control.resolve(request.params["model"])

    def _line(self, model: str) -> Response:
        return json_response(self._status_of(model))

    def _status_of(self, model: str) -> dict[str, Any]:
        return next(line for line in self._control.status()["models"] if line["name"] == model)

    async def _follow(self, request: Request, model: str) -> Response:
        """What became of it: now, when it has settled, or line by line."""
        if "application/x-ndjson" in request.headers.get("accept"):
            return Response(200, _ndjson(self._control.progress(model)), "application/x-ndjson")
        if not _flag(request, "wait"):
            return json_response(self._status_of(model), 202)
        async for line in self._control.progress(model):
            last = line
        if "error" in last:
            raise EngineFailed(last["error"]["message"])
        return json_response(self._status_of(model))


def _flag(request: Request, name: str) -> bool:
    value = request.query.get(name, "").lower()
    if value not in TRUE | FALSE:
        raise BadRequest(f"{name} must be true or false, not {value!r}", param=name)
    return value in TRUE


def _object(request: Request) -> dict[str, Any]:
    body = request.json() if request.body else {}
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


async def _ndjson(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield json.dumps(line, default=str).encode() + b"\n"


async def _framed(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield b": decisions follow\n\n"
    async for event in events:
        yield b"data: " + json.dumps(event, default=str).encode() + b"\n\n"


async def _lines(text: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in text:
        yield line.encode("utf-8", "replace") + b"\n"
