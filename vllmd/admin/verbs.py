"""Operators' verbs: every row of ``vllmd.api.verbs`` becomes a route that checks, acts and answers.

All parameters are checked before anything is done; a wrong one raises BadRequest, or NotFound where it is in the path.
Every verb that needs the scope admin leaves a line in the log: the key or user that called it, and the outcome.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TypeVar

from vllmd.admin.control import Control
from vllmd.admin.responses import json, json_in_turns
from vllmd.admin.schemas import doc, takes
from vllmd.api import verbs
from vllmd.api.codec import encoded
from vllmd.api.json_types import Schema
from vllmd.api.kinds import ModelName
from vllmd.api.verbs import Param, Verb
from vllmd.errors import BadRequest, ConfigError, EngineFailed, VllmdError
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import LocalHandler, Router

log = logging.getLogger("vllmd.admin")

T = TypeVar("T")

NDJSON = "application/x-ndjson"


def add_verbs(router: Router, control: Control) -> None:
    """A route for each row."""
    for verb in verbs.VERBS:
        handler: LocalHandler = VerbEndpoint(verb, control)
        if verb.scope == "admin":
            # Of a change of state only the wait for its end is broken off: the core has decided on it by then.
            handler = audited(handler, ends_with_client=verb.settles or verb.ends_with_client)
        reach = Reach.ONE if verb.of_one_model else Reach.EACH if verb.each else Reach.MACHINE
        router.add(verb.method, verb.path, handler, verb.scope, verb.summary, operation(verb), reach)


class VerbEndpoint:
    """The handler of one row. The router has checked the caller's scope."""

    def __init__(self, verb: Verb, control: Control) -> None:
        self._verb = verb
        self._control = control

    async def __call__(self, request: Request) -> Response:
        """Check, act, answer. Raises VllmdError."""
        verb, control = self._verb, self._control
        # 1. Check. The models first: a caller that may not use one learns nothing else about its request.
        models = [each for each in verb.takes if isinstance(each.kind, ModelName)]
        arguments: dict[str, object] = {
            name: value and control.status.resolve(str(value), request.caller)
            for name, value in read(models, request).items()
        }
        arguments |= read([each for each in verb.takes if each not in models], request)
        wait, model = arguments.pop("wait", False), str(arguments.get("model", ""))
        # 2. Act: post an event to the core, or call the method that the row names.
        result = None
        if verb.event:
            await control.commands.post(verb.event, arguments)
        else:
            caller = {"caller": request.caller} if verb.each else {}
            result = attrgetter(verb.does)(control)(**arguments, **caller)
            result = await result if inspect.isawaitable(result) else result
        # 3. Answer: at once; or, where a model changes its state, with its progress or when that has ended.
        if not verb.settles:
            return await json_in_turns(result if result is not None else control.status.line(model))
        progress = control.following.progress(model)
        if NDJSON in request.headers.get("accept"):
            return Response(200, ndjson(progress), NDJSON)
        if not wait:
            return json(control.status.line(model), 202)
        async for line in progress:
            last = line
        if last.error:
            raise EngineFailed(last.error.message)
        return json(control.status.line(model))


async def ndjson(values: AsyncIterator[object]) -> AsyncIterator[bytes]:
    """Each value as a line of JSON."""
    async for value in values:
        yield encoded(value) + b"\n"


# -- parameters


def read(params: Sequence[Param], request: Request) -> dict[str, object]:
    """The parameters by name, those that are left out with their defaults. Raises BadRequest, NotFound."""
    fields = [each.key for each in params if each.place == "body"]
    body = request.json() if fields and request.body else {}
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name in body:
        if name not in fields:
            raise BadRequest(f"there is no field {name!r}; there are {', '.join(fields)}", param=name)
    places: Mapping[str, Mapping[str, object]] = {"path": request.params, "query": request.query, "body": body}
    values = {}
    for param in params:
        value = places[param.place].get(param.key, param.default)
        if value is verbs.REQUIRED:
            raise BadRequest(f"{param.key} is missing: {param.kind.accepts}", param=param.key)
        if param.key not in places[param.place]:
            values[param.name] = value
        else:
            values[param.name] = param.read_json(value) if param.place == "body" else param.read_text(str(value))
    return values


def into(make: Callable[..., T], params: Sequence[Param], request: Request) -> T:
    """Call ``make`` with the parameters by name. Raises BadRequest, NotFound."""
    return make(**read(params, request))


# -- documentation


def operation(verb: Verb) -> Schema:
    """The OpenAPI operation of a verb, but for its path and summary."""
    line = {"schema": {"$ref": f"#/components/schemas/{verb.answer.__name__}"}}
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    done = {"description": "as asked", "content": {"application/json": line}}
    responses: Schema = {"200": done}
    if verb.settles:
        progress = {"schema": {"type": "string"}}
        responses = {"200": {**done, "content": {"application/json": line, NDJSON: progress}}, "202": done}
    for status in verb.refuses:
        responses[str(status)] = {"description": "not as asked", "content": {"application/json": error}}
    responses["default"] = {"description": "what was wrong", "content": {"application/json": error}}
    return doc(takes(verb.takes), {"responses": responses}, about=verb.about)


# -- audit


def audited(handler: LocalHandler, *, ends_with_client: bool = False) -> LocalHandler:
    """``handler``, and a line in the log for each request: who called it, and the outcome.

    It goes on when the client leaves: half a change, as a key that is written down and not in force, nobody asked for.
    With ``ends_with_client`` it is cancelled then.
    """
    going_on: set[asyncio.Task[Response]] = set()  # the loop itself refers to its tasks only weakly

    def note(request: Request, outcome: str) -> None:
        by = f"the key {request.key}" if request.key else str(request.peer)
        by = f"{request.key} on the page" if request.caller.page else by
        fields = {"VLLMD_VERB": f"{request.method} {request.path}", "VLLMD_BY": by, "REQUEST_ID": request.id}
        if "model" in request.params:
            fields["MODEL"] = request.params["model"]
        query = f"?{request.query_string}" if request.query_string else ""
        log.info("%s %s%s by %s: %s", request.method, request.path, query, by, outcome, extra={"journal": fields})

    async def handle(request: Request) -> Response:
        if ends_with_client:
            return await noted(request)
        task = asyncio.ensure_future(noted(request))
        going_on.add(task)
        task.add_done_callback(going_on.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(partial(log_failure, request))  # nobody else is told of one now
            raise

    def log_failure(request: Request, task: asyncio.Task[Response]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, VllmdError):
            log.error("%s %s failed, and its client has left", request.method, request.path, exc_info=error)

    async def noted(request: Request) -> Response:
        try:
            response = await handler(request)
        except VllmdError as error:
            # What is wrong with the configuration has been logged, line by line.
            is_logged = isinstance(error, ConfigError) and request.path == "/admin/reload"
            note(request, f"refused: {'the configuration is invalid' if is_logged else error.message.splitlines()[0]}")
            raise
        done = "done" if response.status == 200 and isinstance(response.body, bytes) else "begun"
        note(request, done if response.status < 400 else f"failed: {response.status}")
        return response

    return handle
