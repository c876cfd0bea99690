"""Which handler answers which path.

A pattern is a path in which ``{name}`` stands for one segment and ``{name:path}`` for one or more. Paths are
matched after percent-decoding, so a model's id may be written with its slash or with ``%2F``.

The first client asks a few paths only, and the code behind the others is a tenth of all that a daemon imports. Such
routes are put in by a function, when first a path is asked for that is none of those there are (``add_later``).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial
from urllib.parse import quote

from vllmd.errors import Forbidden, MethodNotAllowed, NotFound
from vllmd.frozen import frozen
from vllmd.proxy import paths
from vllmd.proxy.access import ADMIN, HEALTH, MODELS, OPEN, READ, Reach, authorise
from vllmd.proxy.cors import Cors
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.gate import AllowAll, Authenticator
from vllmd.proxy.http import Request, Response

LocalHandler = Callable[[Request], Awaitable[Response]]
Doc = Mapping[str, object]
Handler = Callable[[Exchange], Awaitable[None]]

# Scopes of routes that web pages of other sites may request: they use no model and change nothing.
FOR_PAGES = frozenset({OPEN, HEALTH})
OPERATORS = frozenset({READ, ADMIN})  # scopes whose streams end when the caller has lost the scope
RECHECK_SECONDS = 1.0  # between two checks that the caller of an operator's stream may still have it
MAX_QUOTED_CHARACTERS = 200  # of a path, in an error
MAX_MISSPELT_CHARACTERS, MIN_SIMILARITY = 40, 0.8  # for a path in "did you mean"
LISTED = "GET /v1/models lists the models, GET /docs the paths"
MAX_LOCAL_BODY_BYTES = 1 << 20  # of a body that the daemon itself reads: settings of a model, an operator's command
PARAMETER = re.compile(r"\\{(\w+)(:path)?\\}")


@frozen
class Route:
    """One row of the table.

    ``scope`` and ``reach`` decide which callers may use it, see ``access``. ``doc`` has more of OpenAPI's operation
    fields, or draws them. ``max_body``: bytes of a body, None for the server's own limit, 0: a body is dropped unread.
    """

    method: str
    pattern: str
    handler: Handler
    scope: str = MODELS
    summary: str = ""
    doc: Doc | Callable[[], Doc] = field(default_factory=dict)
    reach: Reach = Reach.ONE
    max_body: int | None = None


class NoSuchMethod(MethodNotAllowed):
    """405 with the ``Allow`` field that it must have."""

    def __init__(self, request: Request, allowed: Sequence[str]) -> None:
        super().__init__(f"{request.path} does not take {request.method}, but {', '.join(allowed)}")
        self.headers = [("allow", allow_field(allowed))]


class Router:
    """The route table. Every request's sender is authorised here, before the body is read."""

    def __init__(self, authenticator: Authenticator | None = None, cors: Cors | None = None) -> None:
        self.authenticator = authenticator or AllowAll()
        self.cors = cors or Cors()
        self._fixed: dict[str, dict[str, Route]] = {}
        self._patterns: dict[str, dict[str, Route]] = {}  # of paths with parameters
        self._expressions: list[re.Pattern[str]] = []  # the first of ``_patterns``, compiled by who looks a path up
        self._routes: list[Route] = []
        self._later: list[Callable[[], None]] = []
        self.fenced = False  # see ``Request.fenced``

    def add(
        self,
        method: str,
        pattern: str,
        handler: LocalHandler,
        scope: str = MODELS,
        summary: str = "",
        doc: Doc | Callable[[], Doc] | None = None,
        reach: Reach = Reach.ONE,
    ) -> None:
        """Add a route of the daemon's own; a GET answers HEAD too. A body is read only if ``doc`` has a requestBody.

        A ``doc`` that is drawn later has none.
        """

        async def respond(exchange: Exchange) -> None:
            response = await handler(exchange.request)
            if scope in OPERATORS and not isinstance(response.body, bytes):
                still = partial(self.recheck, exchange.request, scope, reach)
                response.body = while_allowed(response.body, still)
            await exchange.respond(response)

        most = MAX_LOCAL_BODY_BYTES if isinstance(doc, Mapping) and "requestBody" in doc else 0
        self.add_raw(Route(method, pattern, respond, scope, summary, doc or {}, reach, max_body=most))

    def add_raw(self, route: Route) -> None:
        """Add a route whose handler writes to the exchange itself."""
        self._routes.append(route)
        routes = self._patterns if "{" in route.pattern else self._fixed
        routes.setdefault(route.pattern, {})[route.method] = route

    def add_later(self, add: Callable[[], None]) -> None:
        """Have ``add`` put in routes when they are needed. None of them may fit a path that another route fits."""
        self._later.append(add)

    @property
    def routes(self) -> Sequence[Route]:
        """All routes, in the order in which they were added."""
        while self._later:
            self._later[0]()
            del self._later[0]
        return self._routes

    def begin(self, request: Request) -> Handler:
        """The handler for ``request``, whose head alone has been read. Sets its ``params``, ``caller`` and ``route``.

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
        """Raise what would refuse the request if it came now, and Forbidden if its caller may use fewer models now."""
        now, before = self.authenticator.identify(request), request.caller.models
        authorise(now, scope, reach)
        if now.models is not None and (before is None or not before <= now.models):
            raise Forbidden(f"the key {now.name!r} may use fewer models than before; send the request again")

    def _find(self, request: Request) -> dict[str, Route]:
        """The routes of the request's path, or, for a path of another server, of the one that is meant (``paths``)."""
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
        hint = paths.alternative_for(request.path) or self._similar(request.path) or LISTED
        raise NotFound(f"there is no {request.path[:MAX_QUOTED_CHARACTERS]} here: {hint}")

    def _similar(self, path: str) -> str:
        """The route for clients whose path is most similar, as a question; "" if none is similar enough."""
        if len(path) > MAX_MISSPELT_CHARACTERS:
            return ""
        import difflib  # only mistakes pay for it

        known = [fixed for fixed, methods in self._fixed.items() if any(r.scope == MODELS for r in methods.values())]
        close = difflib.get_close_matches(path, known, n=1, cutoff=MIN_SIMILARITY)
        return f"did you mean {close[0]}? GET /docs lists the paths" if close else ""

    def _at(self, request: Request, path: str) -> dict[str, Route] | None:
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if path == "*":
            return {}
        if len(self._expressions) < len(self._patterns):
            self._expressions = list(map(compiled, self._patterns))
        for expression, methods in zip(self._expressions, self._patterns.values(), strict=True):
            if match := expression.fullmatch(path):
                request.params = match.groupdict()
                return methods
        return self._at(request, path) if self._later and self.routes else None


async def while_allowed(
    pieces: AsyncIterator[bytes], still: Callable[[], None], every: float = RECHECK_SECONDS
) -> AsyncIterator[bytes]:
    """``pieces`` until ``still`` raises, which is called every so many seconds, and before a piece that comes later.

    An operator may follow a stream for days. It ends when the caller's key is revoked or the session is over. Answers
    of models end by themselves, and are not checked.
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
