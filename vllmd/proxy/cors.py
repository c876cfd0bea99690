"""Cross-origin requests: which pages of other sites may read our answers. None, unless the configuration names some.

What browsers let any page send without asking first, forms and WebSockets, is refused to the others here.
Credentials in the browser's sense (cookies) are never allowed: a page sends its key itself, in a header.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.errors import Forbidden
from vllmd.proxy.http import Request, Response

KEPT = "600"  # seconds for which a browser may remember a preflight's answer
READABLE = "x-request-id, retry-after"


class Cors:
    """The rule for a set of origins such as ``https://chat.example``; ``*`` is any."""

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self.configure(origins)

    def configure(self, origins: Iterable[str]) -> None:
        """Go by these from now on."""
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def mark(self, request: Request) -> None:
        """Have every answer to ``request`` say that the page may read it, if it may."""
        if not self._origins:
            return
        if allowed := self._allowed(request):
            request.answer_fields = (
                ("access-control-allow-origin", allowed),
                ("access-control-expose-headers", READABLE),
            )
        if "*" not in self._origins:  # a cache must not give one page's answer to another
            request.answer_fields = (*request.answer_fields, ("vary", "origin"))

    def refuse_strangers(self, request: Request) -> None:
        """Raises Forbidden for a page that is not named. For what browsers send without a preflight, for any page."""
        origin = request.headers.get("origin")
        own = origin.partition("://")[2].lower() == request.headers.get("host").lower()
        if origin and not own and not self._allowed(request):
            raise Forbidden(
                f"pages of {origin[:200]!r} may not use this server; server.cors_origins names those that may"
            )

    def preflight(self, request: Request, methods: Iterable[str]) -> Response | None:
        """The answer to a browser that asks beforehand; None if that is not what it asks, or it may not."""
        if not self._origins or not self._allowed(request) or "access-control-request-method" not in request.headers:
            return None
        fields = [("access-control-allow-methods", ", ".join(sorted(methods))), ("access-control-max-age", KEPT)]
        if wanted := request.headers.get("access-control-request-headers"):
            fields.append(("access-control-allow-headers", wanted))
        return Response(204, headers=fields)

    def _allowed(self, request: Request) -> str:
        origin = request.headers.get("origin")
        if not origin:
            return ""
        if "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else ""
