"""Operators' verbs: every row of ``vllmd.api.verbs`` becomes a route that checks, does and answers.

All parameters are checked before anything is done; whatever is wrong raises BadRequest, or NotFound where the path
names nothing. Every verb of an administrator leaves a record of who used it, and how that went.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
            handler = audited(handler)
        reach = Reach.ONE if verb.of_one_model else Reach.EACH if verb.each else Reach.MACHINE
        router.add(verb.method, verb.path, handler, verb.scope, verb.summary, operation(verb), reach)


class VerbEndpoint:
    """The handler of one row; the caller has been found to be an operator."""

    def __init__(self, verb: Verb, control: Control) -> None:
        self._verb = verb
        self._control = control

    async def __call__(self, request: Request) -> Response:
        """1. check, 2. do, 3. tell what came of it."""
        verb, control = self._verb, self._control
        arguments = self._arguments(request)
        wait, model = arguments.pop("wait", False), str(arguments.get("model", ""))
        if verb.event:
            await control.commands.post(verb.event, arguments)
            told = None
        else:
            told = attrgetter(verb.does)(control)(**arguments, **({"caller": request.caller} if verb.each else {}))
            told = await told if inspect.isawaitable(told) else told
        if verb.settles:
            return await self._settled(request, model, wait=bool(wait))
        return await json_in_turns(told if told is not None else control.status.line(model))

    def _arguments(self, request: Request) -> dict[str, object]:
        """The parameters by name; a model by its configured name. Raises UnknownModel, Forbidden for one of others.

        The models first: whoever may not use one is told nothing else about the request.
        """
        models = [each for each in self._verb.takes if isinstance(each.kind, ModelName)]
        asked = {name: str(value) for name, value in read(models, request).items()}
        resolve = self._control.status.resolve
        found = {name: model and resolve(model, request.caller) for name, model in asked.items()}
        return {**found, **read([each for each in self._verb.takes if each not in models], request)}

    async def _settled(self, request: Request, model: str, *, wait: bool) -> Response:
        """What became of it: line by line, now, or when it has come to rest."""
        progress = self._control.following.progress(model)
        if NDJSON in request.headers.get("accept"):
            return Response(200, _lines(progress), NDJSON)
        if not wait:
            return json(self._control.status.line(model), 202)
        async for line in progress:
            last = line
        if last.error:
            raise EngineFailed(last.error.message)
        return json(self._control.status.line(model))


async def _lines(values: AsyncIterator[object]) -> AsyncIterator[bytes]:
    async for value in values:
        yield encoded(value) + b"\n"


# -- what a request asks for


def read(params: Sequence[Param], request: Request) -> dict[str, object]:
    """The parameters by name, those that are not given with their defaults. Raises BadRequest, NotFound."""
    places: Mapping[str, Mapping[str, object]] = {
        "path": request.params,
        "query": request.query,
        "body": _body([each.key for each in params if each.place == "body"], request),
    }
    found = {}
    for param in params:
        value = places[param.place].get(param.key, param.default)
        if value is verbs.REQUIRED:
            raise BadRequest(f"{param.key} is missing: {param.kind.accepts}", param=param.key)
        if param.key not in places[param.place]:
            found[param.name] = value
        else:
            found[param.name] = param.read_json(value) if param.place == "body" else param.read_text(str(value))
    return found


def into(make: Callable[..., T], params: Sequence[Param], request: Request) -> T:
    """What ``make`` makes of them, by their names."""
    return make(**read(params, request))


def _body(known: Sequence[str], request: Request) -> Mapping[str, object]:
    """The JSON object in the body (none: an empty one), which has no other fields than these."""
    body = request.json() if known and request.body else {}
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name in body:
        if name not in known:
            raise BadRequest(f"there is no field {name!r}; there are {', '.join(known)}", param=name)
    return body


# -- what the documentation says


def operation(verb: Verb) -> Schema:
    """What ``/openapi.json`` says of it beyond its route."""
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


# -- the record


def audited(handler: LocalHandler) -> LocalHandler:
    """``handler``, and a record of who asked for it, and how it went."""

    async def handle(request: Request) -> Response:
        try:
            response = await handler(request)
        except VllmdError as error:
            known = isinstance(error, ConfigError) and request.path == "/admin/reload"  # the log has all of it already
            _record(request, f"refused: {'the configuration is invalid' if known else error.message.splitlines()[0]}")
            raise
        done = "done" if response.status == 200 and isinstance(response.body, bytes) else "begun"
        _record(request, done if response.status < 400 else f"failed: {response.status}")
        return response

    return handle


def _record(request: Request, outcome: str) -> None:
    who = f"the key {request.key}" if request.key else str(request.peer)
    if request.caller.page:
        who = f"{request.key} on the page"
    fields = {"VLLMD_VERB": f"{request.method} {request.path}", "VLLMD_BY": who, "REQUEST_ID": request.id}
    if "model" in request.params:
        fields["MODEL"] = request.params["model"]
    query = f"?{request.query_string}" if request.query_string else ""
    log.info("%s %s%s by %s: %s", request.method, request.path, query, who, outcome, extra={"journal": fields})
