"""A server that runs elsewhere: another vllmd, or anything that speaks OpenAI's protocol.

    engine: remote
    model: Qwen/Qwen3-8B            # its name over there, where that is another one
    options:
      url: https://gpu2.example/v1
      key_file: gpu2.key

Nothing is started or stopped; it takes no device. It serves as soon as its health
path answers, and counts as gone when that stops. One of several replicas is looked at more often, and gets nothing
as soon as it misses a look.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import SplitResult, urlsplit
from weakref import WeakValueDictionary

from vllmd.config import secrets
from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Call, Engine, Failure, Launch, Listen, Place
from vllmd.engines.options import UPSTREAM, rules, seconds, text, unknown, words, wrong
from vllmd.engines.plain import PROBE, Plain
from vllmd.engines.vllm import ROUTES

NO_ADDRESS = "is no address of an HTTP server; right is one such as http://gpu2.example:33258/v1"
FILES = frozenset({"key_file", "ca_file"})  # options that name one
_PORTS = {"http": 80, "https": 443}


class Remote:
    """The kind; where each model is, its options say, see ``bind``."""

    kind = "remote"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "url": "where it is: http:// or https://, a host, perhaps a port and a path; unix:/path for a Unix socket",
        "key_file": "file that holds the key it wants; a relative path is a systemd credential or beside this file",
        "key": "the key itself; it is better kept in a file of its own",
        "health": "path below the URL that answers 200 while it serves (default /v1/models)",
        "ca_file": "file with the certificates to trust, instead of the system's",
        "watch": "time between looks whether it is there (default 250ms for one of several replicas, else 2s)",
        "routes": "the public paths that it serves (default: all that vLLM has)",
        "upstream": UPSTREAM,
    }

    def __init__(self) -> None:
        # By the options, and whether it is of a replica; as long as a model has it, for a key may be among the options.
        self._shared = WeakValueDictionary[tuple[bool, str], RemoteOf]()

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for a URL or a key that cannot work.

        Models with the same options share one, of ten thousand most; but not where a file, which may change, is part
        of them.
        """
        key = bool(model.replica_of), repr(model.options)
        if engine := self._shared.get(key):
            return engine
        unknown(model, self.OPTIONS)
        engine = RemoteOf(model)
        if not FILES & model.options.keys():
            self._shared[key] = engine
        return engine


class RemoteOf(Plain):
    """The contract of ``base.Engine`` for one model."""

    kind = "remote"

    def __init__(self, model: ModelConfig) -> None:
        self._listen = _listen(model)
        self._headers = _headers(model)
        self._watch = seconds(model, "watch", 0.25 if model.replica_of else 2.0)
        self._health = text(model, "health", "/v1/models")
        self._routes = frozenset(words(model, "routes")) or ROUTES
        self._own_api = rules(model, "upstream")

    def device_count(self, model: ModelConfig) -> int:
        """Always 0: the engine takes no device of this machine."""
        return 0

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """No command is run here: the result says only where the engine listens."""
        return Launch((), self._listen, watch=self._watch)

    def ready(self, model: ModelConfig) -> Call:
        """A probe of the health path, with the key, so that a wrong one shows before a client is let through."""
        return Call("GET", self._health, timeout=PROBE, headers=self._headers)

    def routes(self, model: ModelConfig) -> frozenset[str]:
        return self._routes

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        return super().own_api(model) | self._own_api

    def served_name(self, model: ModelConfig) -> str:
        """The name that the engine there knows the model by."""
        return model.source

    def headers(self) -> tuple[tuple[str, str], ...]:
        """The field that every request to it carries: the key."""
        return self._headers

    def failure(self, lines: Sequence[str]) -> Failure:
        """The failure of the last probe."""
        return Failure(lines[-1] if lines else "it does not answer")

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """Always zero: the engine takes no memory of this machine."""
        return Footprint(0, 0)


def _listen(model: ModelConfig) -> Listen:
    """The address of its URL. Raises ConfigError for anything but HTTP."""
    url = text(model, "url")
    if not url:
        raise wrong(model, "url", "is missing: where the server is, such as http://gpu2.example:33258/v1")
    if url.startswith("unix:/"):
        return Listen(uds="/" + url.removeprefix("unix:").lstrip("/"))
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong(model, "url", NO_ADDRESS) from None
    if parts.username:
        raise wrong(
            model, "url", "a key does not belong into the address, where logs show it; right is key_file or key"
        )
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
        raise wrong(model, "url", NO_ADDRESS)
    trusted = _trusted(model, parts)
    prefix = parts.path.rstrip("/").removesuffix("/v1")  # base URLs mostly have the /v1 with which all paths here begin
    return Listen(host=parts.hostname, port=port or _PORTS[parts.scheme], tls=trusted, prefix=prefix)


def _trusted(model: ModelConfig, parts: SplitResult) -> str:
    """The file of certificates for ``Listen.tls``; "" for those that the system trusts. Raises ConfigError."""
    path = text(model, "ca_file")
    if parts.scheme == "http":
        if path:
            raise wrong(model, "ca_file", "means something with https:// only")
        return ""
    if path and not Path(path).is_file():
        raise wrong(model, "ca_file", f"there is no file {path}")
    return path or "system"


def _headers(model: ModelConfig) -> tuple[tuple[str, str], ...]:
    """The key as a field. Raises ConfigError for one that cannot be read."""
    key, name = text(model, "key"), text(model, "key_file")
    if key and name:
        raise wrong(model, "key", "is given twice: here and in key_file")
    if name:
        beside = Path(model.where.rpartition(":")[0] or ".").parent
        try:
            key = secrets.read(name, beside, os.environ)
        except (OSError, ValueError) as error:
            raise wrong(model, "key_file", f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not key.isprintable() or not key.isascii():
        raise wrong(model, "key", "a key consists of printable ASCII characters")
    return (("authorization", f"Bearer {key}"),) if key else ()
