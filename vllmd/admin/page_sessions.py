"""Signing in to the page: one-time links, sessions, and the scopes that they open.

A session has two halves, a cookie that scripts cannot read and a token that the page keeps for its own origin; every
request needs both. A cookie alone is sent to every port of a machine, so it proves nothing by itself; the token also
stands against requests that another page has the browser send (CSRF). A session opens what its owner's scopes open,
less the models: those want an API key, and a session is none.

Only digests are kept, in a file of the daemon's, so that a session outlives the idle exit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from vllmd.api.json_types import ForeignJson
from vllmd.errors import Unauthorized
from vllmd.frozen import frozen
from vllmd.proxy.access import MODELS, OPEN, Caller
from vllmd.proxy.http import Request

log = logging.getLogger("vllmd.admin")

T = TypeVar("T")

COOKIE, TOKEN_FIELD = "vllmd_session", "x-vllmd-session"
LINK_LIFE = 300.0  # seconds in which a link must be used
LIFE = 86400.0  # seconds of a session
MOST_LINKS, MOST_SESSIONS = 64, 256  # the oldest are forgotten first
BYTES = 32  # of randomness in each secret


@frozen
class Session:
    """A user who is signed in to the page.

    ``key``: the digest of the API key that was used, whose scopes are looked up each time.

    ``expires`` is Unix time. ``models``: the only ones that its owner may see; None: all.
    """

    cookie: str  # digest
    token: str  # digest
    name: str
    scopes: tuple[str, ...]
    expires: float
    key: str = ""
    models: tuple[str, ...] | None = None


@frozen
class OpenedSession:
    """A session that was just opened: what the browser gets, and what the page is told."""

    session: Session
    cookie: str
    token: str


class PageSessions:
    """Makes links, opens sessions, and identifies the owner of each.

    ``clock`` returns Unix time. ``current`` returns what the API key with a digest permits now, None for none.
    """

    def __init__(self, clock: Callable[[], float], current: Callable[[str], Caller | None], file: Path | None) -> None:
        self._clock = clock
        self._current = current
        self._file = file
        self._links: dict[str, tuple[float, Caller]] = {}  # by digest
        self._sessions: dict[str, Session] = {}  # by their cookies' digests
        if file is not None:  # of an earlier daemon; what cannot be read is left out: people sign in again
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                sessions = [session_of(each) for each in json.loads(file.read_text())]
                self._sessions = {session.cookie: session for session in sessions}

    def link(self, caller: Caller) -> str:
        """The code of a link that signs in once, as ``caller``, within ``LINK_LIFE``."""
        code = secrets.token_urlsafe(BYTES)
        self._links[_digest(code)] = (self._clock() + LINK_LIFE, caller)
        _keep_newest(self._links, MOST_LINKS)
        return code

    def open_by_link(self, code: str) -> OpenedSession:
        """Sign in by the code of a link, once. Raises Unauthorized for one that is unknown, used or too old."""
        expires, caller = self._links.pop(_digest(code), (0.0, None))
        if caller is None or expires < self._clock():
            raise Unauthorized("the link has been used, or is older than five minutes; `vllmctl ui` prints a new one")
        return self.open(caller)

    def open(self, caller: Caller) -> OpenedSession:
        """Sign in as ``caller``; if it has an API key, for as long as that key exists, and with its current scopes."""
        cookie, token = secrets.token_urlsafe(BYTES), secrets.token_urlsafe(BYTES)
        models = None if caller.models is None else tuple(sorted(caller.models))
        scopes = tuple(sorted(caller.scopes - {MODELS}))
        expires = self._clock() + LIFE
        session = Session(_digest(cookie), _digest(token), caller.name, scopes, expires, caller.digest, models)
        self._sessions[session.cookie] = session
        _keep_newest(self._sessions, MOST_SESSIONS)
        self._write()
        return OpenedSession(session, cookie, token)

    def identify(self, request: Request) -> Caller | None:
        """The owner of the session that the request belongs to; None if it brings no token.

        Raises Unauthorized for a session that has ended, or of which a half is missing or wrong.
        """
        token = request.headers.get(TOKEN_FIELD)
        if not token:
            return None
        session = self._sessions.get(_digest(cookie_of(request)))
        if session is None or session.expires < self._clock() or not hmac.compare_digest(session.token, _digest(token)):
            raise Unauthorized("the session has ended; sign in again")
        models = None if session.models is None else frozenset(session.models)
        scopes = frozenset(session.scopes) | {OPEN}
        if session.key:
            now = self._current(session.key)
            if now is None:
                raise Unauthorized(f"the key {session.name!r} is no longer what was signed in with; sign in again")
            scopes, models = now.scopes - {MODELS}, now.models
        return Caller(session.name, scopes, models, page=True, digest=session.key)

    def close(self, request: Request) -> None:
        """End the session that the request belongs to."""
        self._sessions.pop(_digest(cookie_of(request)), None)
        self._write()

    def _write(self) -> None:
        """Write the sessions down; if that fails they last until the daemon ends, which is no reason to refuse one."""
        if self._file is None:
            return
        kept = [asdict(session) for session in self._sessions.values() if session.expires > self._clock()]
        beside = self._file.with_suffix(".new")
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                json.dump(kept, out)
            beside.replace(self._file)
        except OSError as error:
            log.warning("sessions of the page will not outlive vllmd: %s: %s", self._file, error.strerror)


def cookie_of(request: Request) -> str:
    """The session's cookie, "" without one."""
    for pair in request.headers.get("cookie").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def of_operator(caller: Caller, name: str) -> Caller:
    """The caller under ``name`` if it has none, as operators on a socket have no key to be named by."""
    return replace(caller, name=caller.name or name)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _keep_newest(kept: dict[str, T], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


def session_of(data: ForeignJson) -> Session:
    """A session from its JSON object. Raises KeyError, TypeError, ValueError."""
    models = data["models"]
    return Session(
        cookie=str(data["cookie"]),
        token=str(data["token"]),
        name=str(data["name"]),
        scopes=tuple(map(str, data["scopes"])),
        expires=float(data["expires"]),
        key=str(data["key"]),
        models=None if models is None else tuple(map(str, models)),
    )
