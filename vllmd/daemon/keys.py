"""API keys: who may use which models, who may administer. Compared as digests, in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from vllmd.config.types import KeyConfig
from vllmd.errors import Forbidden, Unauthorized
from vllmd.proxy.http import Request


class Keys:
    """Implements ``vllmd.proxy.gate.Doorkeeper``; without any keys everybody may use the models."""

    def __init__(self, keys: Sequence[KeyConfig]) -> None:
        self._keys = tuple(keys)

    def admit(self, request: Request, scope: str) -> str:
        """The key's name, "" where none is asked for. Raises Unauthorized, Forbidden."""
        if scope == "open" or request.peer.local:
            return ""  # who may open the admin socket is the file system's business
        if not self._keys and scope != "admin":
            return ""
        key = self._find(_presented(request), scope)
        if scope not in key.scopes:
            raise Forbidden(f"key {key.name!r} has no {scope!r} scope")
        return key.name

    def may_use(self, name: str, model: str) -> bool:
        """Whether the key called ``name`` may use ``model``."""
        key = next((key for key in self._keys if key.name == name), None)
        return key is None or not key.models or model in key.models

    def _find(self, secret: str, scope: str) -> KeyConfig:
        if not secret:
            need = "an admin key, or use the admin socket" if scope == "admin" else "'Authorization: Bearer KEY'"
            raise Unauthorized(f"no API key was given; send {need}")
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]  # no early end: constant time
        if not found:
            raise Unauthorized("the API key is not valid")
        return found[0]


def _presented(request: Request) -> str:
    """The secret, from ``Authorization: Bearer`` or ``x-api-key``."""
    scheme, _, secret = request.headers.get("authorization").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return request.headers.get("x-api-key").strip()
