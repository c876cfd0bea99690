"""Endpoints for the models as files: fetch, add, remove, and what the engines' caches hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from vllmd.admin.control import Store
from vllmd.admin.responses import json as answered
from vllmd.admin.schemas import BOOL, COUNT, NUMBER, TEXT, answers, doc, record, takes
from vllmd.admin.verbs import read, request_body
from vllmd.api.answers import Added
from vllmd.api.kinds import Flag, Text
from vllmd.api.verbs import Param
from vllmd.errors import BadRequest, VllmdError
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.routing import LocalHandler, Router

PULLED = record(
    {"model": TEXT},
    {"phase": TEXT, "source": TEXT, "completed": COUNT, "total": COUNT, "rate": NUMBER, "elapsed": NUMBER,
     "done": BOOL, "added": BOOL, "settings": {"type": "object"}, "seconds": NUMBER, "error": {}},
)  # fmt: skip
PULL = (
    Param("model", Text("a well-known name or a repository, such as Qwen/Qwen3-0.6B"), place="body"),
    Param("add", Flag(), "serve it from then on", "body", default=False),
    Param("detach", Flag(), "go on when the caller has left", "body", default=False),
)
SETTINGS: dict[str, object] = {
    "type": "object",
    "description": "engine, model, aliases, display_name, description, max_model_len, as in vllmd.yaml(5); "
    "model is an absolute path without ~, or ORG/NAME or ORG/NAME:TAG",
}


class StoreEndpoints:
    """The handlers of ``/admin/store/...``: models as files."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pull(self, request: Request) -> Response:
        """``POST /admin/store/pull`` with ``{"model": NAME, "add": true, "detach": false}``.

        Accept: application/x-ndjson or text/event-stream follow it; else the answer comes at its end, or with
        ``detach`` at once.
        """
        asked = read(PULL, request)
        model, add, detach = str(asked["model"]), bool(asked["add"]), bool(asked["detach"])
        lines = self._store.pull(model, add=add, detached=detach)
        first = await anext(lines)  # what cannot be is an error, not a stream
        accept = request.headers.get("accept")
        if "text/event-stream" in accept:
            return Response(200, _events(first, lines), "text/event-stream", (("cache-control", "no-store"),))
        if "application/x-ndjson" in accept:
            return Response(200, _lines(first, lines), "application/x-ndjson")
        if detach and not first.get("done"):
            self._side(lines)
            return json_response(first)
        *_, last = [first, *[line async for line in lines]]
        return json_response(last, 503 if last.get("error") else 200)

    def _side(self, lines: AsyncIterator[dict[str, Any]]) -> None:
        """Go on to the end without anybody who listens."""

        async def follow() -> None:
            async for _ in lines:
                pass

        task = asyncio.ensure_future(follow())
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)

    async def add(self, request: Request) -> Response:
        """``PUT /admin/store/models/{model}`` with its settings."""
        settings = request.json() if request.body else {}
        if not isinstance(settings, dict):
            raise BadRequest("the body must be a JSON object with the settings of one model")
        return answered(await self._store.add(request.params["model"], settings))


_TASKS: set[asyncio.Task[None]] = set()


async def _lines(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    async for line in _chained(first, rest):
        yield json.dumps(line).encode() + b"\n"


async def _events(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    async for line in _chained(first, rest):
        yield b"data: " + json.dumps(line).encode() + b"\n\n"


async def _chained(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[dict[str, Any]]:
    """All of them; who leaves early has left the download, too."""
    try:
        yield first
        async for line in rest:
            yield line
    except VllmdError as error:  # after the head of the answer nothing else can be said
        yield {"error": error.to_openai()["error"], "done": True}
    finally:
        await rest.aclose()


def add_store(router: Router, store: Store, audited: Callable[[LocalHandler], LocalHandler]) -> None:
    """What is no row of the table of verbs: a download is followed, and a model's settings are as in a file."""
    endpoints, add = StoreEndpoints(store), router.add
    add("POST", "/admin/store/pull", audited(endpoints.pull), "admin", "Have a model's files here, and follow that",
        doc(answers(PULLED), request_body(PULL)), Reach.MACHINE)  # fmt: skip
    add("PUT", "/admin/store/models/{model:path}", audited(endpoints.add), "admin", "Serve a model from now on",
        doc(answers(Added), takes(SETTINGS, required=False)), Reach.MACHINE)  # fmt: skip
