"""Endpoints for the models as files: fetch, add, remove, and what the engines' caches hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from vllmd.admin import params
from vllmd.admin.schemas import BOOL, COUNT, FLAG, NUMBER, TEXT, answers, asks, doc, many, record
from vllmd.errors import BadRequest, VllmdError
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.routing import LocalHandler, Router

STILL_HERE = 15.0  # seconds without news after which a stream says so, that nothing times out

DOWNLOAD = record(
    {"model": TEXT, "phase": TEXT, "source": TEXT, "completed": COUNT, "total": COUNT, "rate": NUMBER,
     "elapsed": NUMBER, "error": TEXT}
)  # fmt: skip
PULLED = record(
    {"model": TEXT},
    {"phase": TEXT, "source": TEXT, "completed": COUNT, "total": COUNT, "rate": NUMBER, "elapsed": NUMBER,
     "done": BOOL, "added": BOOL, "settings": {"type": "object"}, "seconds": NUMBER, "error": {}},
)  # fmt: skip
CACHED = record(
    {"name": TEXT, "path": TEXT, "size": COUNT, "kind": TEXT, "engine": TEXT, "files": many(TEXT), "models": many(TEXT)}
)
ADDED = record({"model": TEXT, "file": TEXT, "settings": {"type": "object"}})
REMOVED = record({"model": TEXT, "file": TEXT, "removed": many(TEXT), "kept": TEXT, "freed": COUNT, "bytes": COUNT})
PULL = record({"model": TEXT}, {"add": BOOL, "detach": BOOL}, closed=True)
SETTINGS = {
    "type": "object",
    "description": "engine, model, aliases, display_name, description, max_model_len, as in vllmd.yaml(5)",
}


class Store(Protocol):
    """The daemon, as far as these endpoints need it. Each raises a VllmdError for what cannot be."""

    def pull(self, name: str, *, add: bool, detached: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Have a model's files here, and with ``add`` the model served; how far it is, line by line.

        The last line has ``done``. ``detached``: it goes on when the caller has left.
        """

    def stop(self, name: str) -> dict[str, Any]:
        """End a download. Raises NotFound."""

    def lines(self) -> list[dict[str, Any]]:
        """The downloads that run, and how the last ones ended."""

    @property
    def hub(self) -> str:
        """The address of the hub that is configured; "" for the usual one."""

    async def contents(self) -> list[dict[str, Any]]:
        """What the engines' caches hold, and which models are loaded from it."""

    async def add(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a model from now on."""

    async def remove(self, name: str, *, files: bool, dry: bool) -> dict[str, Any]:
        """Serve it no more; ``files``: and remove them. ``dry``: only say what would be removed."""


class StoreEndpoints:
    """``/admin/store/...``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pull(self, request: Request) -> Response:
        """``POST /admin/store/pull`` with ``{"model": NAME, "add": true, "detach": false}``.

        Accept: application/x-ndjson or text/event-stream follow it; else the answer comes at its end, or with
        ``detach`` at once.
        """
        body = params.fields(request, ["model", "add", "detach"])
        model = params.text(body, "model", "a well-known name or a repository, such as Qwen/Qwen3-0.6B")
        add, detach = params.truth(body, "add", False), params.truth(body, "detach", False)
        lines = self._store.pull(model, add=add, detached=detach)
        first = await anext(lines)  # what cannot be is an error, not a stream
        accept = request.headers.get("accept")
        if "text/event-stream" in accept:
            return Response(200, _events(first, lines), "text/event-stream", (("cache-control", "no-store"),))
        if "application/x-ndjson" in accept:
            return Response(200, _lines(first, lines), "application/x-ndjson")
        if detach and not first.get("done"):
            self._side(lines)
            return json_response(first, 202)
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

    async def stop(self, request: Request) -> Response:
        """``DELETE /admin/store/downloads/{model}``."""
        return json_response(self._store.stop(request.params["model"]))

    async def downloads(self, request: Request) -> Response:
        """``GET /admin/store/downloads``."""
        return json_response({"downloads": self._store.lines()})

    async def contents(self, request: Request) -> Response:
        """``GET /admin/store``."""
        return json_response({"cached": await self._store.contents(), "hub": self._store.hub})

    async def add(self, request: Request) -> Response:
        """``PUT /admin/store/models/{model}`` with its settings."""
        settings = request.json() if request.body else {}
        if not isinstance(settings, dict):
            raise BadRequest("the body must be a JSON object with the settings of one model")
        return json_response(await self._store.add(request.params["model"], settings))

    async def remove(self, request: Request) -> Response:
        """``DELETE /admin/store/models/{model}``; ``?files=true`` its files, too; ``&dry=true`` only says which."""
        files, dry = params.flag(request, "files"), params.flag(request, "dry")
        return json_response(await self._store.remove(request.params["model"], files=files, dry=dry))


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
    """Their rows of the route table."""
    endpoints, add = StoreEndpoints(store), router.add
    pulled = answers(PULLED)
    pulled["responses"]["202"] = pulled["responses"]["200"]
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": PULL}}}}
    settings = {"requestBody": {"content": {"application/json": {"schema": SETTINGS}}}}
    flags = {"files": (FLAG, "its files in the engines' cache as well"), "dry": (FLAG, "only say what would go")}
    model = "/admin/store/models/{model:path}"
    add("GET", "/admin/store", endpoints.contents, "read", "What the engines' caches hold",
        answers(record({"cached": many(CACHED), "hub": TEXT})), Reach.MACHINE)  # fmt: skip
    add("GET", "/admin/store/downloads", endpoints.downloads, "read", "The downloads of models",
        answers(record({"downloads": many(DOWNLOAD)})), Reach.MACHINE)  # fmt: skip
    add("POST", "/admin/store/pull", audited(endpoints.pull), "admin", "Have a model's files here, and follow that",
        doc(pulled, body), Reach.MACHINE)  # fmt: skip
    add("DELETE", "/admin/store/downloads/{model:path}", audited(endpoints.stop), "admin", "End a download",
        answers(DOWNLOAD), Reach.MACHINE)  # fmt: skip
    add("PUT", model, audited(endpoints.add), "admin", "Serve a model from now on", doc(answers(ADDED), settings),
        Reach.MACHINE)  # fmt: skip
    add("DELETE", model, audited(endpoints.remove), "admin", "Serve a model no more",
        doc(answers(REMOVED), asks(**flags)), Reach.MACHINE)  # fmt: skip
