"""Endpoints for the models as files: fetch, add, remove, and what the engines' caches hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from vllmd.admin.control import Store
from vllmd.admin.responses import json
from vllmd.admin.schemas import answers, doc, takes, takes_object
from vllmd.admin.verbs import NDJSON, into, ndjson
from vllmd.api.answers import Added, Pulled, failure
from vllmd.api.codec import encoded
from vllmd.api.kinds import Flag, Text
from vllmd.api.verbs import Param
from vllmd.errors import BadRequest, VllmdError
from vllmd.frozen import frozen
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import LocalHandler, Router

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


@frozen
class Pull:
    """The body of ``POST /admin/store/pull``."""

    model: str
    add: bool
    detach: bool


class StoreEndpoints:
    """The handlers of ``/admin/store/...``: models as files."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pull(self, request: Request) -> Response:
        """``POST /admin/store/pull`` with ``{"model": NAME, "add": true, "detach": false}``.

        With Accept: application/x-ndjson or text/event-stream the answer is the progress; else it comes at the end of
        the download, or with ``detach`` at once.
        """
        body = into(Pull, PULL, request)
        lines = self._store.pull(body.model, add=body.add, detached=body.detach)
        first = await anext(lines)  # raises what is wrong with the request while the answer can still be an error
        accept = request.headers.get("accept")
        if "text/event-stream" in accept:
            events = server_sent(_until_the_end(first, lines))
            return Response(200, events, "text/event-stream", (("cache-control", "no-store"),))
        if NDJSON in accept:
            return Response(200, ndjson(_until_the_end(first, lines)), NDJSON)
        if body.detach and not first.done:

            async def follow() -> None:
                async for _ in lines:
                    pass

            task = asyncio.ensure_future(follow())
            _TASKS.add(task)
            task.add_done_callback(_TASKS.discard)
            return json(first)
        *_, last = [first, *[line async for line in lines]]
        return json(last, 503 if last.error else 200)

    async def add(self, request: Request) -> Response:
        """``PUT /admin/store/models/{model}`` with its settings."""
        settings = request.json() if request.body else {}
        if not isinstance(settings, dict):
            raise BadRequest("the body must be a JSON object with the settings of one model")
        return json(await self._store.add(request.params["model"], settings))


_TASKS: set[asyncio.Task[None]] = set()  # the loop itself refers to its tasks only weakly


async def server_sent(values: AsyncIterator[object]) -> AsyncIterator[bytes]:
    """Each value as a server-sent event."""
    async for value in values:
        yield b"data: " + encoded(value) + b"\n\n"


async def _until_the_end(first: Pulled, rest: AsyncGenerator[Pulled, None]) -> AsyncIterator[Pulled]:
    """``first`` and ``rest``, an error as the last line; closing this closes ``rest``, and so leaves the download."""
    try:
        yield first
        async for line in rest:
            yield line
    except VllmdError as error:  # after the head of the answer nothing else can be said
        yield Pulled(first.model, "failed", done=True, error=failure(error))
    finally:
        await rest.aclose()


def add_store(router: Router, store: Store, audited: Callable[..., LocalHandler]) -> None:
    """Add the two routes that are no verbs: one streams, the other takes settings as a configuration file has them."""
    endpoints, add = StoreEndpoints(store), router.add
    pull = audited(endpoints.pull, ends_with_client=True)  # a download ends with its last follower
    add("POST", "/admin/store/pull", pull, "admin", "Have a model's files here, and follow that",
        doc(answers(Pulled), takes(PULL)), Reach.MACHINE)  # fmt: skip
    add("PUT", "/admin/store/models/{model:path}", audited(endpoints.add), "admin", "Serve a model from now on",
        doc(answers(Added), takes_object(SETTINGS)), Reach.MACHINE)  # fmt: skip
