"""Which web pages may use this server and read its answers (CORS).

No page of another origin, unless the configuration names it. Three ways around that are closed here and in ``hosts``:

- A browser sends some requests for any page without a preflight (forms, images, WebSockets, links). They would reach a
  model although the page cannot read the answer. ``Sec-Fetch-Site`` and ``Origin`` reveal them, and no route that uses
  or changes a model accepts them.
- A page whose own name is made to point here (DNS rebinding) has the same origin as we do: ``hosts`` checks the name.
- A page of a public address that calls a private one sends a preflight of its own (private network access); it is
  answered for the pages that are allowed.

Credentials in the browser's sense (cookies) are never allowed: a page sends its key itself, in a header.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.errors import Forbidden
from vllmd.proxy.http import Request, Response

KEPT = "600"  # seconds for which a browser may remember a preflight's answer
READABLE = "x-request-id, retry-after"
PAGE_FIELDS = frozenset({b"sec-fetch-site", b"origin"})  # of which a browser sends one for whatever a page asks for
FOREIGN = frozenset({"cross-site", "same-site"})  # of Sec-Fetch-Site: a page of another origin ("none": no page at all)


class Cors:
    """The rule for a set of origins such as ``https://chat.example``; ``*`` is any."""

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self.configure(origins)

    def configure(self, origins: Iterable[str]) -> None:
        """Replace the set of origins."""
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def mark(self, request: Request) -> None:
        """Have every answer to ``request`` say that the page may read it, if it may."""
        if allowed := self._allowed(request):
            request.answer_fields = (
                ("access-control-allow-origin", allowed),
                ("access-control-expose-headers", READABLE),
            )
        if self.origins and "*" not in self.origins:  # a cache must not give one page's answer to another
            request.answer_fields = (*request.answer_fields, ("vary", "origin"))

    def refuse_foreign_pages(self, request: Request) -> None:
        """Raise Forbidden for what a browser sends for a page of another origin that is not named."""
        if request.headers.from_page is None:
            request.headers.from_page = any(name in PAGE_FIELDS for name, _ in request.headers.raw)
        if not request.headers.from_page:
            return
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if (not origin and site not in FOREIGN) or "*" in self.origins or self._allowed(request):
            return
        # A page of ours has our name. ``Sec-Fetch-Site`` alone must not clear one: only browsers are bound to it.
        if site not in FOREIGN and origin.partition("://")[2].lower() == request.headers.get("host").lower():
            return
        page = f"pages of {origin[:200]!r}" if origin else "pages of other origins"
        raise Forbidden(f"{page} may not use this server; server.cors_origins names those that may")

    def preflight(self, request: Request, methods: Iterable[str]) -> Response | None:
        """The answer to a preflight; None if the request is none, or of an origin that is not allowed."""
        if not self.origins or not self._allowed(request) or "access-control-request-method" not in request.headers:
            return None
        fields = [("access-control-allow-methods", ", ".join(sorted(methods))), ("access-control-max-age", KEPT)]
        if wanted := request.headers.get("access-control-request-headers"):
            fields.append(("access-control-allow-headers", wanted))
        if request.headers.get("access-control-request-private-network") == "true":
            fields.append(("access-control-allow-private-network", "true"))
        return Response(204, headers=fields)

    def _allowed(self, request: Request) -> str:
        origin = request.headers.get("origin")
        if not origin:
            return ""
        if "*" in self.origins:
            return "*"
        return origin if origin.lower() in self.origins else ""
