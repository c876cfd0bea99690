"""Which handler answers which path.

A pattern is a path in which ``{name}`` stands for one segment and ``{name:path}`` for one or more. Paths are
matched after percent-decoding, so a model's id may be written with its slash or with ``%2F``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import quote

from vllmd.errors import Forbidden, MethodNotAllowed, NotFound
from vllmd.proxy import paths
from vllmd.proxy.access import ADMIN, HEALTH, MODELS, OPEN, READ, Reach, authorise
from vllmd.proxy.cors import Cors
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.gate import AllowAll, Authenticator
from vllmd.proxy.http import Request, Response

LocalHandler = Callable[[Request], Awaitable[Response]]
Handler = Callable[[Exchange], Awaitable[None]]

# Scopes of routes that a page of another site may have its browser ask for: they load, move and ask no model.
FOR_PAGES = frozenset({OPEN, HEALTH})
OPERATORS = frozenset({READ, ADMIN})  # scopes whose streams end when the caller has lost them
RECHECK = 1.0  # seconds after which an operator's stream asks whether its caller is still allowed
LONGEST_TOLD = 200  # characters of a path that an error repeats
LONGEST_MISSPELT, NEAR = 40, 0.8  # characters of a path that is compared with ours, and how alike two must be
LISTED = "GET /v1/models lists the models, GET /docs the paths"
LOCAL_BODY = 1 << 20  # bytes of a body for ourselves: settings of a model, an operator's order
PARAMETER = re.compile(r"\\{(\w+)(:path)?\\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table.

    ``scope`` and ``reach`` say who may, see ``access``. ``doc`` has more of OpenAPI's operation fields.
    ``max_body``: bytes of a body that it takes, None for the server's own limit; a body that comes although it takes
    none is dropped unread.
    """

    method: str
    pattern: str
    handler: Handler
    scope: str = MODELS
    summary: str = ""
    doc: Mapping[str, object] = field(default_factory=dict)
    reach: Reach = Reach.ONE
    max_body: int | None = None


class NoSuchMethod(MethodNotAllowed):
    """405 with the ``Allow`` field that it must have."""

    def __init__(self, request: Request, allowed: Sequence[str]) -> None:
        super().__init__(f"{request.path} does not take {request.method}, but {', '.join(allowed)}")
        self.headers = [("allow", allow_field(allowed))]


class Router:
    """The route table; it also has every request's sender looked at before the body is read."""

    def __init__(self, authenticator: Authenticator | None = None, cors: Cors | None = None) -> None:
        self.authenticator = authenticator or AllowAll()
        self.cors = cors or Cors()
        self._fixed: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        self.routes: list[Route] = []
        self.fenced = False  # see ``Request.fenced``

    def add(
        self,
        method: str,
        pattern: str,
        handler: LocalHandler,
        scope: str = MODELS,
        summary: str = "",
        doc: Mapping[str, object] | None = None,
        reach: Reach = Reach.ONE,
    ) -> None:
        """Have ``handler`` answer; a GET's answers HEAD too. It gets a body if ``doc`` says that it takes one."""

        async def respond(exchange: Exchange) -> None:
            response = await handler(exchange.request)
            if scope in OPERATORS and not isinstance(response.body, bytes):
                still = partial(self.recheck, exchange.request, scope, reach)
                response.body = while_allowed(response.body, still)
            await exchange.respond(response)

        most = LOCAL_BODY if doc and "requestBody" in doc else 0
        self.add_raw(Route(method, pattern, respond, scope, summary, doc or {}, reach, max_body=most))

    def add_raw(self, route: Route) -> None:
        """Have the route's handler speak on the exchange itself."""
        self.routes.append(route)
        if "{" not in route.pattern:
            self._fixed.setdefault(route.pattern, {})[route.method] = route
            return
        expression = compiled(route.pattern)
        for known, methods in self._patterns:
            if known.pattern == expression.pattern:
                methods[route.method] = route
                return
        self._patterns.append((expression, {route.method: route}))

    def begin(self, request: Request) -> Handler:
        """The handler for ``request``, whose head alone has been read; fills its ``params`` and ``caller``.

        Raises NotFound, MethodNotAllowed, Forbidden, Unauthorized and what the authenticator raises.
        """
        request.caller = caller = self.authenticator.identify(request)
        if self.cors.origins:
            self.cors.mark(request)
        methods = self._fixed.get(request.path) or self._find(request)
        if request.method == "OPTIONS" and "OPTIONS" not in methods:
            request.max_body = 0
            return _options(self.cors.preflight(request, methods) or _allow(methods))
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            raise NoSuchMethod(request, sorted(methods))
        if request.headers.from_page is not False and route.scope not in FOR_PAGES:
            self.cors.refuse_foreign_pages(request)
        request.route = route.pattern
        if self.fenced:
            request.fenced = True
        request.max_body = route.max_body
        if route.scope not in caller.scopes or caller.models is not None:
            authorise(caller, route.scope, route.reach)
        return route.handler

    def recheck(self, request: Request, scope: str, reach: Reach) -> None:
        """Raise what the request would be refused with if it came now, and where its caller may use fewer models."""
        now, before = self.authenticator.identify(request), request.caller.models
        authorise(now, scope, reach)
        if now.models is not None and (before is None or not before <= now.models):
            raise Forbidden(f"the key {now.name!r} may not use all models any more that it could; ask anew")

    def _find(self, request: Request) -> dict[str, Route]:
        """The routes of the request's path; one that clients write otherwise by habit is put right first."""
        methods = self._at(request, request.path)
        if methods is not None:
            return methods
        method = "GET" if request.method == "HEAD" else request.method
        for path in paths.candidates(request.path):
            methods = self._at(request, path)
            if methods is not None and (method in methods or method == "OPTIONS"):
                request.path = path
                request.answer_fields = (*request.answer_fields, ("x-vllmd-path", quote(path)))
                return methods
        where = paths.alternative_for(request.path) or self._near(request.path) or LISTED
        raise NotFound(f"there is no {request.path[:LONGEST_TOLD]} here: {where}")

    def _near(self, path: str) -> str:
        """The path of a client's that was probably meant, as a question; "" if none is much like it."""
        if len(path) > LONGEST_MISSPELT:
            return ""
        import difflib  # for mistakes only

        known = [fixed for fixed, methods in self._fixed.items() if any(r.scope == MODELS for r in methods.values())]
        close = difflib.get_close_matches(path, known, n=1, cutoff=NEAR)
        return f"did you mean {close[0]}? GET /docs lists the paths" if close else ""

    def _at(self, request: Request, path: str) -> dict[str, Route] | None:
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if path == "*":
            return {}
        for expression, methods in self._patterns:
            if match := expression.fullmatch(path):
                request.params = match.groupdict()
                return methods
        return None


async def while_allowed(
    pieces: AsyncIterator[bytes], still: Callable[[], None], every: float = RECHECK
) -> AsyncIterator[bytes]:
    """``pieces`` until ``still`` raises. It is asked every so many seconds, and before a piece that comes later.

    What an operator follows may go on for days: it ends when the key of the caller is revoked or the session is over.
    Answers of models are not held to this; they end by themselves.
    """
    loop = asyncio.get_running_loop()
    coming = asyncio.ensure_future(anext(pieces, None))
    due = loop.time() + every
    try:
        while True:
            await asyncio.wait({coming}, timeout=max(0.0, due - loop.time()))
            if loop.time() >= due:
                still()
                due = loop.time() + every
            if not coming.done():
                continue
            if (piece := coming.result()) is None:
                return
            yield piece
            coming = asyncio.ensure_future(anext(pieces, None))
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a route pattern."""
    return re.compile(PARAMETER.sub(lambda m: f"(?P<{m[1]}>{'.+' if m[2] else '[^/]+'})", re.escape(pattern)))


def allow_field(methods: Iterable[str]) -> str:
    """``Allow`` for a path with these methods: what answers a GET answers a HEAD, and every path OPTIONS."""
    return ", ".join(sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))


def _allow(methods: Iterable[str]) -> Response:
    return Response(204, headers=(("allow", allow_field(methods)),))


def _options(response: Response) -> Handler:
    async def answer(exchange: Exchange) -> None:
        await exchange.respond(response)

    return answer
