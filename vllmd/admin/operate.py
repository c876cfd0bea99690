"""What an operator may do: the verbs of ``vllmctl``, each a POST that becomes an event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from vllmd.admin import params
from vllmd.admin.control import Control
from vllmd.errors import BadRequest, Conflict, EngineFailed, NotFound
from vllmd.proxy.access import Caller
from vllmd.proxy.http import Request, Response, event_stream, json_response

MOST_LINES = 10_000
LONGEST_PID = 9  # digits
FIRST_LINE = 1.0  # seconds that an answer waits for the first line of a log
LONGEST_PROBE = 3600.0  # seconds
KEEP_ALIVE = 15.0  # seconds between comments in a stream of events


class OperatorEndpoints:
    """``/admin/...``; the caller has been found to be an operator."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self, request: Request) -> Response:
        """``GET /admin/status``."""
        return json_response(of_caller(self._control.status.status(), request.caller))

    async def load(self, request: Request) -> Response:
        """``POST /admin/models/{model}/load``; ``?wait=true`` answers when it has settled.

        With ``Accept: application/x-ndjson`` each change is a line, the last one when it has settled.
        """
        model = self._model(request)
        await self._control.commands.load(model)
        return await self._follow(request, model)

    async def wake(self, request: Request) -> Response:
        """``POST /admin/models/{model}/wake``: the same as load."""
        return await self.load(request)

    async def unload(self, request: Request) -> Response:
        """``POST /admin/models/{model}/unload``; ``?force=true`` breaks off its requests."""
        model = self._model(request)
        await self._control.commands.unload(model, force=params.flag(request, "force"))
        return await self._follow(request, model)

    async def sleep(self, request: Request) -> Response:
        """``POST /admin/models/{model}/sleep?level=1|2|3``. Raises Conflict for one that is not loaded."""
        model, level = self._model(request), request.query.get("level", "1")
        if level not in ("1", "2", "3"):
            raise BadRequest(f"level {level!r} is none; use 1, 2 or 3 (stop)", param="level")
        await self._control.status.opened()
        if level != "3" and (state := self._control.status.line(model)["state"]) in ("stopped", "error"):
            raise Conflict(f"{model} cannot be put to sleep: it is not loaded ({state})")
        await self._control.commands.sleep(model, int(level))
        return await self._follow(request, model)

    async def pin(self, request: Request) -> Response:
        """``POST /admin/models/{model}/pin`` with ``{"pinned": true}``."""
        model = self._model(request)
        await self._control.commands.pin(model, params.truth(params.fields(request, ["pinned"]), "pinned", True))
        return json_response(self._control.status.line(model))

    async def lease(self, request: Request) -> Response:
        """``POST /admin/models/{model}/lease`` with ``{"lease": NAME, "deadline_seconds": N or null}``."""
        model, body = self._model(request), params.fields(request, ["lease", "deadline_seconds"])
        lease = params.text(body, "lease", "a name of your choice, up to 200 printable characters")
        await self._control.commands.lease(lease, model, params.seconds(body, "deadline_seconds"))
        return json_response(self._control.status.line(model))

    async def release(self, request: Request) -> Response:
        """``DELETE /admin/models/{model}/lease?lease=NAME``; ``&stop=true``: the last to go stops the model at once."""
        model, lease = self._model(request), request.query.get("lease", "")
        if not lease:
            raise BadRequest("say which: ?lease=NAME", param="lease")
        await self._control.commands.release(lease, stop=params.flag(request, "stop"))
        return json_response(self._control.status.line(model))

    async def probe(self, request: Request) -> Response:
        """``POST /admin/models/{model}/probe``; ``?all=true`` waits for everybody, up to ``&limit=`` seconds."""
        limit, everybody = params.duration(request, "limit", LONGEST_PROBE), params.flag(request, "all")
        return json_response(await self._control.commands.probe(self._model(request), limit, everybody=everybody))

    async def decisions(self, request: Request) -> Response:
        """``GET /admin/decisions``; ``?model=`` one model's."""
        name = request.query.get("model", "")
        return json_response(
            {
                "decisions": self._control.status.decisions(
                    self._control.status.resolve(name, request.caller) if name else ""
                )
            }
        )

    async def events(self, request: Request) -> Response:
        """``GET /admin/events``: decisions as server-sent events, as they are made."""
        return event_stream(_framed(self._control.following.watch()))

    async def log(self, request: Request) -> Response:
        """``GET /admin/logs/{model}``; ``?lines=50&follow=true``. Plain text."""
        lines = params.number(request, "lines", 50, MOST_LINES)
        follow = params.flag(request, "follow") and request.method != "HEAD"
        text = await _begun(self._control.following.log(self._model(request), lines, follow=follow))
        return Response(200, _lines(text), "text/plain; charset=utf-8", (("x-accel-buffering", "no"),))

    async def kill(self, request: Request) -> Response:
        """``POST /admin/processes/{pid}/kill``; ``?force=true`` a stranger on a GPU, too."""
        pid = process_id(request)
        return json_response(killed(pid, await self._control.commands.kill(pid, force=params.flag(request, "force"))))

    async def drain(self, request: Request) -> Response:
        """``POST /admin/devices/{device}/drain`` with ``{"drained": true}``; the device as it is then."""
        given = request.params["device"]
        if not given.isdecimal():
            raise NotFound(f"there is no device {given!r}: devices have numbers, see vllmctl gpus")
        drained = params.truth(params.fields(request, ["drained"]), "drained", True)
        return json_response(await self._control.commands.drain(int(given), drained))

    async def reload(self, request: Request) -> Response:
        """``POST /admin/reload``: 400 with every error if the configuration is invalid; then nothing changed."""
        return json_response(await self._control.commands.reload())

    def _model(self, request: Request) -> str:
        return self._control.status.resolve(request.params["model"], request.caller)

    async def _follow(self, request: Request, model: str) -> Response:
        """What became of it: now, when it has settled, or line by line."""
        if "application/x-ndjson" in request.headers.get("accept"):
            return Response(200, _ndjson(self._control.following.progress(model)), "application/x-ndjson")
        if not params.flag(request, "wait"):
            return json_response(self._control.status.line(model), 202)
        async for line in self._control.following.progress(model):
            last = line
        if "error" in last:
            raise EngineFailed(last["error"]["message"])
        return json_response(self._control.status.line(model))


def of_caller(status: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """The status as one sees it who may use some models only: without the others, and what is said of them."""
    if caller.models is None:
        return status
    lines = [line for line in status["models"] if caller.may_use(line["name"])]
    own = [{**line, "waiting_for": line["waiting_for"] and "room"} for line in lines]  # it names who holds it
    error = status["configuration"]["error"] and "invalid"
    return {**status, "models": own, "configuration": {**status["configuration"], "error": error}}


def process_id(request: Request) -> int:
    """The pid in the path. Raises NotFound for what cannot be one."""
    text = request.params["pid"]
    if not (text.isascii() and text.isdecimal()) or len(text) > LONGEST_PID:
        raise NotFound(f"there is no process {text!r}")
    return int(text)


def killed(pid: int, what: str) -> dict[str, Any]:
    """The answer when it is gone."""
    return {"pid": pid, "status": "killed", "message": what}


async def _ndjson(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield json.dumps(line, default=str).encode() + b"\n"


async def _framed(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events, and a comment whenever nothing has happened for a while, so that nothing times out."""
    yield b": decisions and what becomes of them\n\n"
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
            if done:
                yield b"data: " + json.dumps(coming.result(), default=str).encode() + b"\n\n"
                coming = asyncio.ensure_future(anext(events))
            else:
                yield b": still here\n\n"
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await _close(events)


async def _begun(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """``lines`` with the first one fetched, if it comes soon: whatever is wrong is an error and not a broken answer."""
    first = asyncio.ensure_future(anext(lines, None))
    await asyncio.wait({first}, timeout=FIRST_LINE)
    return _from(first, lines) if not first.done() or first.result() is not None else _from(None, lines)


async def _from(first: asyncio.Future[str | None] | None, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        line = await first if first else None
        while line is not None:
            yield line
            line = await anext(lines, None)
    finally:
        if first and not first.done():
            first.cancel()
        else:
            await _close(lines)


async def _close(lines: AsyncIterator[Any]) -> None:
    """Let a generator that is not read to its end leave what it holds."""
    close = getattr(lines, "aclose", None)
    if close:
        await close()


async def _lines(text: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in text:
        yield line.encode("utf-8", "replace") + b"\n"
