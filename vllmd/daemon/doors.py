"""The two listeners: ``http`` for clients, ``admin`` for operators on this machine."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence

from vllmd.admin.control import Control
from vllmd.admin.routes import add_operator, add_public
from vllmd.config.types import Config
from vllmd.daemon.keys import Keys
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.gate import Gate
from vllmd.proxy.limits import Limits
from vllmd.proxy.models import add_model_routes
from vllmd.proxy.relay import Relay
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server

log = logging.getLogger("vllmd.http")


class Doors:
    """Both servers with their routes; one set of routes, and the keys say who may what."""

    def __init__(
        self, config: Config, gate: Gate, control: Control, listeners: Mapping[str, Sequence[socket.socket]]
    ) -> None:
        self.keys = Keys(config.auth.keys)
        limits = Limits.of(config.server)
        router = Router(self.keys)
        self._relay = Relay(gate, limits, self.keys)
        add_public(router, control)
        add_operator(router, control)
        add_model_routes(router, self._relay)
        # Operators do not stand in the clients' line: their connections are counted apart.
        self._servers = [Server(router, limits, sockets, _note) for name, sockets in sorted(listeners.items())]

    @property
    def connections(self) -> int:
        """Clients and operators who are connected."""
        return sum(server.connections for server in self._servers)

    def open(self) -> None:
        """Accept."""
        for server in self._servers:
            server.start()

    def stop_accepting(self) -> None:
        """Leave new connections in the listeners' queues."""
        for server in self._servers:
            server.stop_accepting()

    async def close(self, limit: float) -> None:
        """Let what is under way end within ``limit`` seconds, then cut it off. The listeners stay open."""
        await asyncio.gather(*(server.close(limit) for server in self._servers))
        self._relay.pool.close()


def _note(exchange: Exchange) -> None:
    """One record per request, for whoever looks for a request id."""
    if not log.isEnabledFor(logging.INFO if exchange.status >= 500 else logging.DEBUG):
        return
    request = exchange.request
    fields = {"REQUEST_ID": request.id, "VLLMD_STATUS": exchange.status, "VLLMD_SECONDS": f"{exchange.elapsed:.3f}"}
    if exchange.model:
        fields["MODEL"] = exchange.model
    level = logging.INFO if exchange.status >= 500 else logging.DEBUG
    log.log(
        level, "%s %s %s", request.method, request.path, exchange.error or exchange.status, extra={"journal": fields}
    )
