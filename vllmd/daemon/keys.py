"""Who may: API keys on the clients' side, the file system's word on the operators' socket.

A key's text is never kept: what a client presents is hashed and compared with
every key's digest, in a time that does not depend on which one it is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Sequence

from vllmd.config.types import AuthConfig, KeyConfig
from vllmd.errors import Forbidden, Unauthorized, Unavailable, VllmdError
from vllmd.proxy.http import Request

PUBLIC = frozenset({"health", "metrics"})  # scopes that the configuration may open to anybody


class Keys:
    """Implements ``vllmd.proxy.gate.Authenticator``; without any keys everybody may use the models."""

    def __init__(self, auth: AuthConfig, resolve: Callable[[str], str] = str) -> None:
        """``resolve`` tells a model's name from an alias; it may raise VllmdError."""
        self.configure(auth, resolve)

    def configure(self, auth: AuthConfig, resolve: Callable[[str], str]) -> None:
        """Take the keys of a new configuration; a key that is gone opens nothing from now on."""
        self._keys = auth.keys
        self._public = frozenset(auth.public)
        self._models = {key.name: _models(key, resolve) for key in auth.keys if key.models}

    def admit(self, request: Request, scope: str) -> str:
        """The key's name, "" where none is asked for. Raises Unauthorized, Forbidden."""
        if scope == "open" or scope in self._public or (not self._keys and scope != "admin"):
            return ""
        key = self._find(presented(request), scope)
        if scope not in PUBLIC and scope not in key.scopes:
            raise Forbidden(f"the key {key.name!r} opens {' and '.join(key.scopes) or 'nothing'}, not {scope}")
        return key.name

    def may_use(self, name: str, model: str) -> bool:
        """Whether the key called ``name`` may use ``model``."""
        allowed = self._models.get(name)
        return allowed is None or model in allowed

    def _find(self, secret: str, scope: str) -> KeyConfig:
        if not secret:
            need = "'Authorization: Bearer KEY'"
            if scope == "admin":
                need += " with a key that has the scope admin, or use the admin socket"
            raise Unauthorized(f"no API key was given; send {need}")
        digest = hashlib.sha256(secret.encode("latin-1", "replace")).hexdigest()
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]  # no early end
        if not found:
            raise Unauthorized("the API key is not valid")
        return found[0]


class PeerCredentialAuth:
    """The doorkeeper of the admin socket: whoever may open it may do everything.

    The socket's owner, group and mode decide who that is, and the kernel holds
    them to it. Where they let everybody in, only root and we ourselves may.
    """

    def __init__(self, *, anybody_can_connect: bool) -> None:
        self._trusted = frozenset({0, os.getuid()}) if anybody_can_connect else None

    def admit(self, request: Request, scope: str) -> str:
        """Raises Forbidden. Nobody has a key here."""
        if self._trusted is not None and scope != "open" and request.peer.uid not in self._trusted:
            raise Forbidden("the admin socket is open to everybody, so it serves only root and vllmd's own user")
        return ""

    def may_use(self, name: str, model: str) -> bool:
        """Everything."""
        return True


class DenyAll:
    """The doorkeeper of an address that must not be served; everybody is told why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def admit(self, request: Request, scope: str) -> str:
        """Raises Unavailable."""
        raise Unavailable(self._why)

    def may_use(self, name: str, model: str) -> bool:
        """Nothing."""
        return False


def presented(request: Request) -> str:
    """The secret, from ``Authorization: Bearer`` or ``x-api-key``; "" for none."""
    scheme, _, secret = request.headers.get("authorization").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return request.headers.get("x-api-key").strip()


def _models(key: KeyConfig, resolve: Callable[[str], str]) -> frozenset[str]:
    names = set()
    for name in key.models:
        try:
            names.add(resolve(name))
        except VllmdError:  # the loader has warned of it
            names.add(name)
    return frozenset(names)


def by_name(keys: Sequence[KeyConfig]) -> dict[str, KeyConfig]:
    """The keys that have limits, by name."""
    return {key.name: key for key in keys if key.concurrency or key.requests_per_minute or key.tokens_per_minute}
