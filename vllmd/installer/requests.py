"""The requests to the installer: which users may send which, and the lines of the answer.

A request is one line of JSON: ``{"verb": "install", "kind": "vllm", "version": "0.33.0"}``. The answer is lines of
JSON: any number of ``{"progress": {...}}``, then ``{"done": {...}}`` or ``{"failed": "...", "status": 409}``, with the
status that the error has over HTTP.

Members of the group vllmd-admin may install what the recipes name, choose a version, go back and remove. Only root may
say where packages come from, and for which Python: that decides which code engines run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.errors import BadRequest, Forbidden
from vllmd.frozen import frozen
from vllmd.installer import folders
from vllmd.installer.install import Installed, Wanted, install
from vllmd.installer.pip import Say

LONGEST = 65536  # bytes of a request
ROOTS_OWN = ("index_url", "offline", "python", "env")
TEXTS = ("verb", "kind", "version", "build", "index_url", "offline", "python")
# Variables that pip and the libraries under it read, and that the asker's shell may have.
PROXIES = tuple(
    word for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for word in (name, name.lower())
)
CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def read(line: bytes) -> dict[str, Any]:
    """Parse a request. Raises BadRequest."""
    try:
        request = json.loads(line)
    except ValueError:
        raise BadRequest("the request is no line of JSON") from None
    if not isinstance(request, dict) or not all(isinstance(request.get(name, ""), str) for name in TEXTS):
        raise BadRequest("the request is no object of texts")
    env = request.get("env", {})
    if not isinstance(env, dict) or not all(isinstance(value, str) for pair in env.items() for value in pair):
        raise BadRequest("env is no object of texts")
    return request


def check_allowed(request: Mapping[str, Any], *, trusted: bool) -> None:
    """Raise Forbidden where a request that is not ``trusted`` (root's) has fields that only root may set."""
    if fields := [name.replace("_", "-") for name in ROOTS_OWN if not trusted and request.get(name)]:
        raise Forbidden(f"{' and '.join(fields)}: where packages come from, and for which Python, only root may say "
                        "(with sudo; or for everybody in a drop-in of vllmd-installer@.service, as PIP_INDEX_URL and "
                        "HTTPS_PROXY)")  # fmt: skip


@frozen
class Chosen:
    """The version in use from now on, and the one before; "" for none."""

    kind: str
    version: str
    before: str


@frozen
class Removed:
    """The version that was removed, and the one in use now; "" for none."""

    kind: str
    version: str
    now: str


def perform(request: Mapping[str, Any], root: Path, say: Say, env: Mapping[str, str]) -> Installed | Chosen | Removed:
    """Do a request; ``env``: our own variables, for pip. Raises VllmdError."""
    kind, version = str(request.get("kind", "")), str(request.get("version", ""))
    match request.get("verb"):
        case "install":
            options = {name: request[name] for name in ("build", "index_url", "offline", "python") if request.get(name)}
            use = request.get("use", True) is True
            return install(Wanted(kind, version, env={**env, **request.get("env", {})}, use=use, **options), root, say)
        case "use":
            with folders.changing(root, kind) as folder:
                before = folders.use(folder, folders.known_version(version))
            return Chosen(kind, version, before)
        case "rollback":
            with folders.changing(root, kind) as folder:
                version, before = folders.rollback(folder)
            return Chosen(kind, version, before)
        case "remove":
            with folders.changing(root, kind) as folder:
                now = folders.remove(folder, folders.known_version(version))
            return Removed(kind, version, now)
        case verb:
            raise BadRequest(f"the installer knows no verb {verb!r}")
