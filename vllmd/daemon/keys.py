"""Who sent a request: by API key on the clients' side, by the file system's word on the operators' sockets.

A key's text is never kept: what a client presents is hashed and compared with
every key's digest, in a time that does not depend on which one it is.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from vllmd.config.types import AuthConfig, KeyConfig
from vllmd.daemon.logins import FailedLogins
from vllmd.errors import Forbidden, TooManyRequests, Unauthorized, Unavailable, VllmdError
from vllmd.proxy.access import ADMIN, EVERYTHING, HEALTH, METRICS, MODELS, OPEN, PUBLIC, READ, Caller, granted
from vllmd.proxy.hosts import Hosts
from vllmd.proxy.http import Request
from vllmd.proxy.tunnel import KEY_PROTOCOL

ENGINES_PAGES = "/upstream/"
BASIC = re.compile(r"\s*basic(?=\s|$)", re.IGNORECASE)
BEARER = re.compile(r"\s*(?:bearer[:\s]\s*|bearer$)+", re.IGNORECASE)
MOST_KEYS = 4  # that one request may bring; each is a guess
# Placeholders of clients that require a key and were given none; beside a true key they are no guess at one.
PLACEHOLDERS = frozenset(
    ("none", "null", "empty", "dummy", "unused", "not-needed", "sk-no-key-required", "ollama", "lm-studio", "x")
)
NEED = "send 'Authorization: Bearer KEY'; who runs this server makes keys (vllmctl key create NAME)"


class ApiKeyAuth:
    """Implements ``vllmd.proxy.gate.Authenticator``; without any keys everybody may use the models."""

    def __init__(
        self,
        auth: AuthConfig,
        opens: Callable[[str], Collection[str]] = lambda name: (name,),
        hosts: Hosts | None = None,
        failures: FailedLogins | None = None,
        page: Callable[[Request], Caller | None] = lambda request: None,
    ) -> None:
        """``opens`` gives the models that a key may use which has this name or alias; it may raise VllmdError.

        ``page`` gives the caller of the page's session that a request belongs to, None if to none; may raise
        Unauthorized.
        """
        self._page = page
        self.hosts = hosts or Hosts()
        self._failures = failures or FailedLogins(time.monotonic, lambda how: None)
        self.configure(auth, opens)

    def configure(self, auth: AuthConfig, opens: Callable[[str], Collection[str]]) -> None:
        """Take the keys of a new configuration; a key that is gone opens nothing from now on.

        To be called after a change of ``hosts`` as well.
        """
        self._word = object()  # identifies this set of keys: what was cached by another one is void
        self.callers = [(key.digest, _caller(key, opens)) for key in auth.keys]
        self._by_digest = dict(self.callers)
        if self.callers:
            models = None if "names" in auth.public else frozenset[str]()
            self.anonymous = Caller(scopes=PUBLIC & {*auth.public} | {OPEN}, models=models, refusal=_no_key)
        else:
            self.anonymous = Caller(scopes=frozenset({OPEN, HEALTH, METRICS, MODELS}), refusal=_no_operator)

    def of_key(self, digest: str) -> Caller | None:
        """What the key of that digest opens; None where there is none."""
        return self._by_digest.get(digest)

    def identify(self, request: Request) -> Caller:
        """The key's owner, or a stranger. Raises Misdirected where there are no keys and the host is not ours."""
        known = request.headers.found  # the head is the same as the connection's last one, which was identified
        if known is not None and known[0] is self._word:
            return known[1]
        caller = self._look(request)
        # A wrong key is to be counted each time, and a session of the page may have ended meanwhile.
        # What a password opens depends on the path, too.
        if (caller.refusal is None or not self.callers) and not caller.page and not by_password(request):
            request.headers.found = self._word, caller
        return caller

    def _look(self, request: Request) -> Caller:
        if not self.callers:
            self.hosts.check(request)
        if (signed_in := self._page(request)) is not None:
            return signed_in
        if not self.callers:
            return self.anonymous
        secrets = presented(request)
        if not secrets:
            return self.anonymous
        wait, refused = 0.0, []
        for secret in secrets:
            digest = hashlib.sha256(secret.encode("latin-1", "replace")).hexdigest()
            wait = self._failures.wait(request.peer, digest)
            if wait > 0:
                continue
            # Every key is compared, so that the time does not tell which one it is.
            callers = [caller for known, caller in self.callers if hmac.compare_digest(known, digest)]
            if callers:
                self._failures.passed(request.peer, digest)
                # Whatever other keys it brings: a page can add fields to what its browser sends by itself.
                by_itself = secret in by_password(request) and not request.path.startswith(ENGINES_PAGES)
                return for_pages(callers[0]) if by_itself else callers[0]
            self._failures.failed(request.peer, digest)
            refused.append(digest)
        return replace(self.anonymous, refusal=_wrong_key if refused else lambda: _too_many(wait))


class PeerCredentialAuth:
    """The authenticator of an operators' socket: a process that may open the socket has its scopes.

    The socket's owner, group and mode decide who that is, and the kernel holds
    them to it. Where they let everybody in, only root and we ourselves may.
    """

    def __init__(self, *, anybody_can_connect: bool, read_only: bool = False) -> None:
        self._trusted = frozenset({0, os.getuid()}) if anybody_can_connect else None
        scopes = frozenset({OPEN, HEALTH, METRICS, READ}) if read_only else EVERYTHING
        self._caller = Caller(scopes=scopes, refusal=_read_only)

    def identify(self, request: Request) -> Caller:
        """Nobody has a key here."""
        return self._caller if self._trusted is None or request.peer.uid in self._trusted else _UNTRUSTED


class DenyAll:
    """The authenticator of an address that must not be served; every request is refused with the reason."""

    def __init__(self, why: str) -> None:
        self._why = why

    def identify(self, request: Request) -> Caller:
        """Always raises Unavailable, with the reason why nothing is served here."""
        raise Unavailable(self._why)


def presented(request: Request) -> list[str]:
    """The secrets that the request brings, in every place where clients put them; empty ones are none.

    ``Authorization: Bearer`` (OpenAI) or ``Basic`` (browsers; the key is the password, or the user without one), or the
    key alone; ``x-api-key`` (Anthropic), ``api-key`` (Azure), and a WebSocket's sub-protocol (OpenAI's in browsers).
    Each field may come several times; a word ``Bearer`` inside the key's value is left out. A query's
    ``key=`` is not accepted: it would be in every log on the way, and no engine's clients send it.
    """
    headers, found = request.headers, []
    for name, value in headers:
        if name == "authorization":
            found.append(_password(value) if BASIC.match(value) else _bearer(value))
        elif name in ("x-api-key", "api-key"):
            found.append(_bearer(value))
    if request.upgrade:
        protocols = headers.get("sec-websocket-protocol").split(",")
        found += [
            each.strip().removeprefix(KEY_PROTOCOL) for each in protocols if each.strip().startswith(KEY_PROTOCOL)
        ]
    secrets = [secret for secret in map(_bare, found) if secret]
    true = [secret for secret in secrets if secret.lower() not in PLACEHOLDERS]
    return list(dict.fromkeys(true or secrets))[:MOST_KEYS]


def _bearer(value: str) -> str:
    """The key, with or without a scheme before it; "" for another scheme, such as Negotiate."""
    # A run of spaces is one: the look for the word would begin anew at each of them.
    bare = BEARER.sub("", " ".join(value.split())).strip()
    return "" if " " in bare else bare


def _bare(secret: str) -> str:
    """The secret without spaces and quotes around it."""
    return secret.strip().strip("\"'").strip()


def by_password(request: Request) -> list[str]:
    """The secrets that a browser sends by itself, from its password dialogue, along with whatever page it shows."""
    fields = [value for name, value in request.headers if name == "authorization"]
    return [_bare(_password(value)) for value in fields if BASIC.match(value)]


def for_pages(caller: Caller) -> Caller:
    """What a key opens that a browser sends by itself: models and engines' pages, and nothing else of an operator's,
    lest such a page acts as one."""
    return replace(caller, scopes=caller.scopes - {READ, ADMIN}, refusal=_by_password)


def _by_password() -> VllmdError:
    return Forbidden("a key that comes as a password (Basic) opens models and /upstream; operators send it as Bearer")


def _password(field: str) -> str:
    """The password in a field's ``Basic`` credentials, or the user without one; "" for what is no such thing."""
    coded = BASIC.sub("", field).strip().rstrip("=")
    try:
        decoded = base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
        user, _, password = decoded.decode("latin-1").partition(":")
    except ValueError:
        return ""
    return password or user


def _caller(key: KeyConfig, opens: Callable[[str], Collection[str]]) -> Caller:
    models = frozenset(_names(key, opens)) if key.models else None
    return Caller(key.name, granted(key.scopes), models, digest=key.digest)


def _names(key: KeyConfig, opens: Callable[[str], Collection[str]]) -> Sequence[str]:
    names: list[str] = []
    for name in key.models:
        try:
            names.extend(opens(name))
        except VllmdError:  # an unknown name, of which the loader has warned
            names.append(name)
    return names


def _no_key() -> VllmdError:
    return Unauthorized(f"no API key was given; {NEED}")


def _no_operator() -> VllmdError:
    """The error where models are open to everybody, and administration needs a key."""
    what = "no API key was given; administration needs one of the scope admin, or the admin socket, as vllmctl uses it"
    return Unauthorized(what)


def _wrong_key() -> VllmdError:
    return Unauthorized("the API key is not valid: this server knows none like it (vllmctl key list, on its machine)")


def _too_many(wait: float) -> VllmdError:
    what = "too many wrong API keys came from your address; this one was not looked at"
    return TooManyRequests(what, retry_after=math.ceil(wait))


def _read_only() -> VllmdError:
    return Forbidden(
        "this socket is for looking only; changes are made through the admin socket, by the group vllmd-admin"
    )


def _untrusted() -> VllmdError:
    return Forbidden("this operators' socket is open to everybody, so it serves only root and vllmd's own user")


_UNTRUSTED = Caller(models=frozenset(), refusal=_untrusted)


def by_name(keys: Sequence[KeyConfig]) -> dict[str, KeyConfig]:
    """The keys that have limits, by name."""
    limits = ("concurrency", "requests_per_minute", "tokens_per_minute", "keep_alive_limit", "tokens_per_day",
              "tokens_per_month", "device_seconds_per_day", "device_seconds_per_month")  # fmt: skip
    return {key.name: key for key in keys if any(getattr(key, limit) is not None for limit in limits)}
