"""The rules for addresses that other machines can reach: TLS where it is configured, and no service without keys."""

from __future__ import annotations

import logging
import socket

from vllmd.addresses import is_loopback
from vllmd.config.types import Config
from vllmd.daemon.keys import ApiKeyAuth, DenyAll
from vllmd.frozen import frozen
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server

log = logging.getLogger("vllmd.http")


@frozen
class _Public:
    router: Router
    server: Server
    addresses: tuple[str, ...]


class PublicListeners:
    """The servers at such addresses."""

    def __init__(self, keys: ApiKeyAuth) -> None:
        self._keys = keys
        self._servers: list[_Public] = []

    def add(self, router: Router, server: Server, addresses: tuple[str, ...]) -> None:
        """Have the rules hold for a server, from the next ``configure`` on."""
        self._servers.append(_Public(router, server, addresses))

    def configure(self, config: Config) -> None:
        """Apply the rules of a configuration, with the certificate's files as they are now."""
        # 1. Keys: while there are none every request is refused, unless anonymous use is allowed. They come first, so
        #    that this holds even where the certificate cannot be read.
        for public in self._servers:
            public.router.fenced = bool(config.server.ui)
            if config.auth.keys or config.auth.allow_anonymous:
                public.router.authenticator = self._keys
                continue
            why = (
                f"vllmd does not serve {', '.join(public.addresses)}, which others can reach, without keys: "
                "add one to auth.keys, or set auth.allow_anonymous if everybody may use it"
            )
            log.error("%s", why)
            public.router.authenticator = DenyAll(why)
        # 2. TLS, for new connections; ``config.checks`` has seen the files.
        tls, context = config.server.tls, None
        if tls is not None and tls.cert and tls.key and self._servers:
            from vllmd.config.tls import context as made

            context = made(tls.cert, tls.key)
        for public in self._servers:
            public.server.tls = context


def public_address(listener: socket.socket) -> str:
    """The address if other machines can reach it, else ""."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    host, port = listener.getsockname()[:2]
    if is_loopback(host):
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
