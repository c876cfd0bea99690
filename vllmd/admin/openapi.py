"""``/openapi.json``, made of the route table itself, and ``/docs``, a page that shows it and loads nothing else."""

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
    "open": "Open to every client.",
    "health": "Open to every client, unless auth.public leaves health out.",
    "metrics": "Open to every client, unless auth.public leaves metrics out.",
    "models": "Needs a key, if there are any.",
    "read": "On the operators' sockets, or with a key that has the scope read or admin.",
    "admin": "On the admin socket, or with a key that has the scope admin.",
}
# In nobody's frame: a key is typed in here.
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = (("content-security-policy", POLICY), ("x-content-type-options", "nosniff"))
ENGINES_OWN: Mapping[str, object] = {
    "responses": {"200": {"description": "the engine's answer"}, "default": ERROR},
    "description": "Relayed as it is; the engine's own documentation says what it takes.",
}


class Documentation:
    """The two endpoints. The document is made at the first request, when all routes have been added."""

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
        paths.setdefault(path, {})[route.method.lower()] = operation(route)
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
            "schemas": components(_subclasses(Answer)),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _subclasses(kind: type[Answer]) -> Iterator[type[Answer]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def operation(route: Route) -> Schema:
    """The OpenAPI operation of a route: its own part, its path's parameters, a heading and the scope that it needs."""
    drawn = route.doc() if callable(route.doc) else route.doc
    answered_here = "responses" in drawn  # else an engine answers
    own: Schema = dict(drawn) if answered_here else {**ENGINES_OWN, **drawn}
    about = f"{own.pop('description', '')} {SCOPES[route.scope]}".strip()
    parameters = cast(list[Schema], own.pop("parameters", []))
    described = {each["name"] for each in parameters if each["in"] == "path"}
    undescribed: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name, _ in PARAMETER.findall(route.pattern)
        if name not in described
    ]
    headings = {"v1": "models", "admin": "operation", "api": "instances", "upstream": "operation"}
    words = re.findall(r"\w+", PARAMETER.sub(r"\1", route.pattern))
    whole: Schema = {
        "operationId": "_".join([route.method.lower(), *words]),
        "tags": [headings.get(route.pattern.split("/")[1], "vllmd" if answered_here else "models")],
        "summary": route.summary,
        "description": about,
        **({"parameters": [*undescribed, *parameters]} if undescribed or parameters else {}),
        **own,
    }
    return {**whole, "security": []} if route.scope == "open" else whole
