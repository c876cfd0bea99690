"""``/ui``, and the endpoints that sign in and out there."""

from __future__ import annotations

import pwd
from collections.abc import Callable, Sequence

from vllmd.admin.page_sessions import COOKIE, LIFE, LINK_LIFE, OpenedSession, PageSessions, of_operator
from vllmd.admin.responses import json
from vllmd.admin.schemas import answers, doc, streams, takes
from vllmd.admin.verbs import read
from vllmd.api.answers import PageLink, PageSession
from vllmd.api.kinds import Text
from vllmd.api.verbs import Param
from vllmd.errors import Forbidden, NotFound
from vllmd.proxy.access import READ, Reach
from vllmd.proxy.hosts import PAGE_HOST, shares_the_page
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import Router
from vllmd.ui import files

OFF = (
    "the page is switched off here, as it is at every address that others can reach; server.ui: true in vllmd.yaml "
    "switches it on, and server.tls keeps what it shows from being overheard"
)
CODE = Param("code", Text("the code of a link"), place="body", default=None)


class PageEndpoints:
    """The page on one listener. ``enabled`` says whether that serves it, ``secure`` whether it has TLS.

    ``near``: only this machine reaches the listener; then the page has an origin of its own, see
    ``proxy.hosts.PAGE_HOST``.
    """

    def __init__(
        self,
        sessions: PageSessions,
        enabled: Callable[[], bool],
        near: bool,
        secure: Callable[[], bool],
        listen: Sequence[str],
    ) -> None:
        self._sessions = sessions
        self._enabled = enabled
        self._near = near
        self._secure = secure
        self._listen = tuple(listen)

    async def page(self, request: Request) -> Response:
        """``GET /ui``: the page itself; under another name than its own the browser is sent there."""
        self._check()
        if self._elsewhere(request):
            port = request.headers.get("host").rpartition(":")[2]
            place = f"http://{PAGE_HOST}{f':{port}' if port.isdecimal() else ''}/ui"
            return Response(307, headers=(("location", place), ("cache-control", "no-store")))
        return files.answer(request, "index.html")

    async def file(self, request: Request) -> Response:
        """``GET /ui/{file}``. Raises NotFound for what is no file of the page."""
        self._check()
        name = request.params["file"]
        if name not in files.names():
            raise NotFound(f"the page has no file {name[:100]!r}")
        return files.answer(request, name)

    async def sign_in(self, request: Request) -> Response:
        """``POST /ui/session`` with the code of a link, or with an API key. Raises Unauthorized, Forbidden."""
        self._check()
        if self._elsewhere(request):
            raise Forbidden(f"the page is served under the name {PAGE_HOST} here, and signed in to there")
        if code := read((CODE,), request)["code"]:
            return self._answer(self._sessions.open_by_link(str(code)))
        caller = request.caller
        if caller.refusal is not None:
            raise caller.refusal()
        if READ not in caller.scopes:
            raise Forbidden(
                f"the key {caller.name!r} opens models, not this page: it wants one of the scope read or admin"
            )
        return self._answer(self._sessions.open(caller))

    async def sign_out(self, request: Request) -> Response:
        """``DELETE /ui/session``: end the session that the request belongs to."""
        self._sessions.close(request)
        return Response(204, headers=(("set-cookie", f"{COOKIE}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict"),))

    async def link(self, request: Request) -> Response:
        """``POST /admin/ui/links``: a path that signs in once, with the scopes of the caller."""
        if request.caller.page:
            raise Forbidden("a session makes no links: `vllmctl ui` does, or the key that was signed in with")
        user, uid = "", request.peer.uid
        if uid is not None:  # on an operators' socket
            try:
                user = pwd.getpwuid(uid).pw_name
            except KeyError:
                user = f"uid {uid}"
        code = self._sessions.link(of_operator(request.caller, user))
        return json(PageLink(f"/ui#code={code}", LINK_LIFE, self._listen))

    def _elsewhere(self, request: Request) -> bool:
        """Whether a page of an engine could have the origin that the request was sent to."""
        return self._near and not request.peer.local and not shares_the_page(request)

    def _check(self) -> None:
        if not self._enabled():
            raise NotFound(OFF)

    def _answer(self, opened: OpenedSession) -> Response:
        session = opened.session
        secure = "; Secure" if self._secure() else ""
        cookie = f"{COOKIE}={opened.cookie}; Path=/; Max-Age={LIFE:.0f}; HttpOnly; SameSite=Strict{secure}"
        answer = PageSession(opened.token, session.name, session.scopes, session.expires)
        return json(answer, headers=(("set-cookie", cookie), ("cache-control", "no-store")))


def add_page(router: Router, page: PageEndpoints) -> None:
    """Add the page's routes. Its files are open to all; what it shows needs a session."""
    open_to_all, add = Reach.NOTHING, router.add
    add("GET", "/ui", page.page, "open", "The page", streams("text/html", "the page"), open_to_all)
    add(
        "GET", "/ui/{file:path}", page.file, "open", "A file of the page", streams("text/javascript", "it"), open_to_all
    )
    add("POST", "/ui/session", page.sign_in, "open", "Sign in to the page",
        doc(answers(PageSession), takes((CODE,))),
        open_to_all)  # fmt: skip
    add("DELETE", "/ui/session", page.sign_out, "open", "Sign out", {"responses": {"204": {"description": "done"}}},
        open_to_all)  # fmt: skip
    add(
        "POST",
        "/admin/ui/links",
        page.link,
        "read",
        "A link that signs in to the page once",
        answers(PageLink),
        Reach.EACH,
    )
