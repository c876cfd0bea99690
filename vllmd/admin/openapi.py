"""``/openapi.json``, made of the route table itself, and ``/docs``, which shows it without anybody else's help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import vllmd
from vllmd.admin.page import PAGE
from vllmd.admin.schemas import ERROR
from vllmd.api.answers import Answer
from vllmd.api.codec import components
from vllmd.api.json_types import Schema
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.routing import Route, Router

PARAMETER = re.compile(r"\{(\w+)(:path)?\}")
SCOPES = {
    "open": "Anybody may.",
    "health": "Anybody may, unless auth.public leaves health out.",
    "metrics": "Anybody may, unless auth.public leaves metrics out.",
    "models": "Needs a key, if there are any.",
    "read": "On the operators' sockets, or with a key that has the scope read or admin.",
    "admin": "On the admin socket, or with a key that has the scope admin.",
}
SECURITY_HEADERS = (
    ("content-security-policy", "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"),
    ("x-content-type-options", "nosniff"),
)
ENGINES_OWN: Mapping[str, object] = {
    "responses": {"200": {"description": "the engine's answer"}, "default": ERROR},
    "description": "Relayed as it is; the engine's own documentation says what it takes.",
}


class Documentation:
    """The two endpoints; the document is made when it is first asked for, of the routes that there are then."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._document: Schema = {}

    async def schema(self, request: Request) -> Response:
        """``GET /openapi.json``: the route table as OpenAPI 3.1."""
        self._document = self._document or document(self._router.routes)
        return json_response(self._document)

    async def page(self, request: Request) -> Response:
        """``GET /docs``: a page that shows the same."""
        return Response(200, PAGE.encode(), "text/html; charset=utf-8", SECURITY_HEADERS)


def document(routes: Iterable[Route]) -> Schema:
    """The OpenAPI 3.1 document of a route table."""
    paths: dict[str, Schema] = {}
    for route in routes:
        path = PARAMETER.sub(r"{\1}", route.pattern)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vllmd",
            "version": vllmd.__version__,
            "description": "A shared model server. Errors are shaped as OpenAI's.",
        },
        "security": [{}, {"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": components(_all_below(Answer)),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _all_below(kind: type[Answer]) -> Iterator[type[Answer]]:
    """Every dataclass that is told, by whichever route."""
    for each in kind.__subclasses__():
        yield each
        yield from _all_below(each)


def _operation(route: Route) -> Schema:
    own: Schema = dict(route.doc) if _answered_here(route) else {**ENGINES_OWN, **route.doc}
    about = f"{own.pop('description', '')} {SCOPES[route.scope]}".strip()
    described = cast(list[Schema], own.pop("parameters", []))
    known = {each["name"] for each in described if each["in"] == "path"}
    parameters = [*(each for each in _path_parameters(route.pattern) if each["name"] not in known), *described]
    words = re.findall(r"\w+", PARAMETER.sub(r"\1", route.pattern))
    operation: Schema = {
        "operationId": "_".join([route.method.lower(), *words]),
        "tags": [_tag(route)],
        "summary": route.summary,
        "description": about,
        **({"parameters": parameters} if parameters else {}),
        **own,
    }
    return {**operation, "security": []} if route.scope == "open" else operation


def _path_parameters(pattern: str) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name, _ in PARAMETER.findall(pattern)
    ]


def _tag(route: Route) -> str:
    """The heading it stands under."""
    first = route.pattern.split("/")[1]
    known = {"v1": "models", "admin": "operation", "api": "instances", "upstream": "operation"}
    return known.get(first, "vllmd" if _answered_here(route) else "models")


def _answered_here(route: Route) -> bool:
    """An engine's answers are not described."""
    return "responses" in route.doc
