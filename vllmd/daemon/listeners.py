"""The listeners: ``http`` for clients, ``admin`` and ``read`` for operators on this machine; all have the same routes.

At an operators' socket the file system decides who may connect; at any other listener a key does. What holds at
addresses that other machines can reach is ``public_listeners``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.admin.control import Control
from vllmd.admin.page_sessions import PageSessions
from vllmd.admin.public import add_public
from vllmd.config.types import Config
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.keys import ApiKeyAuth, PeerCredentialAuth
from vllmd.daemon.logins import FailedLogins
from vllmd.daemon.public_listeners import PublicListeners, public_address
from vllmd.daemon.quotas import Quotas
from vllmd.daemon.runtime_models import addresses
from vllmd.errors import SpokenTls, UpstreamFailed, VllmdError
from vllmd.proxy.body_memory import BodyMemory
from vllmd.proxy.cors import Cors
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.forward import Relay
from vllmd.proxy.gate import Authenticator
from vllmd.proxy.hosts import Hosts
from vllmd.proxy.limits import Limits, clients_files
from vllmd.proxy.models import add_model_routes
from vllmd.proxy.peers import register_own_sockets
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server
from vllmd.proxy.upstream import QueueFull, Unreached
from vllmd.records.ring import Entry
from vllmd.systemd.throttle import Throttle

log = logging.getLogger("vllmd.http")

ADMIN, READ = "admin", "read"  # what their sockets are called
# Errors by which a request failed at its engine, by the names that exchanges have of them.
ENGINES_FAULTS = frozenset(kind.__name__ for kind in (UpstreamFailed, Unreached, QueueFull))
SPOKEN_TLS = SpokenTls.__name__
OPERATORS_LIMIT = 0.5  # seconds that a shutdown leaves to answers for operators, which may be streams without an end


class Listeners:
    """All servers with their routes."""

    def __init__(
        self,
        config: Config,
        gate: AdmissionGate,
        quotas: Quotas,
        control: Control,
        relay: Relay,
        limits: Limits,
        listeners: Mapping[str, Sequence[socket.socket]],
        outcome: Callable[[str, int, bool], None],
        ended: Callable[[Exchange], Entry | None] = lambda exchange: None,
        sessions: Path | None = None,
    ) -> None:
        """``outcome`` is called at the end of each request for a model: name, status, and whether the engine failed it.

        ``ended`` is called at the end of every request, and returns the entry that is kept of it, if one is.
        ``sessions``: the file in which sessions of the page outlive the daemon; None: they do not.
        """
        self.ui, self.tls = config.server.ui, config.server.tls
        self._sessions = PageSessions(time.time, lambda digest: self.keys.of_key(digest), sessions)
        self._listeners = listeners
        self._control = control
        self._gate = gate
        failures = FailedLogins(time.monotonic, control.counters.login_failed)
        self.keys = ApiKeyAuth(config.auth, self._opens, Hosts(config.server.hosts), failures, self._sessions.identify)
        self.quotas = quotas
        self.cors = Cors(config.server.cors_origins)
        self.limits = limits
        self.memory = BodyMemory(self.limits.now.max_buffered)  # one for all listeners
        self._relay = relay
        self._public = PublicListeners(self.keys)
        self._outcome = outcome
        # One line a minute: a client that speaks TLS here tries again, or is one of many that look for open ports.
        self._spoken_tls, self._refusals = Throttle(log, burst=1), Throttle(log)
        self._ended = ended
        # Operators do not stand in the clients' line: their connections are counted apart.
        self._operators: list[Server] = []
        self._servers = [server for name, sockets in sorted(listeners.items()) for server in self._open(name, sockets)]
        self._clients = [server for server in self._servers if server not in self._operators]
        self._public.configure(config)

    def _open(self, name: str, sockets: Sequence[socket.socket]) -> Iterable[Server]:
        """The servers of a group of listeners: those that other machines can reach are apart.

        Only a Unix socket is an operators' one, whatever a unit calls a TCP address.
        """
        operators = [sock for sock in sockets if name in (ADMIN, READ) and sock.family == socket.AF_UNIX]
        if operators:
            anybody = any(map(anybody_can_connect, operators))
            operator = PeerCredentialAuth(anybody_can_connect=anybody, read_only=name == READ)
            router = self._router(operator, public=False)
            self._operators.append(Server(router, self.limits, operators, self._note, self.memory))
            yield self._operators[-1]
        clients = [sock for sock in sockets if sock not in operators]
        addresses = {sock.fileno(): address for sock in clients if (address := public_address(sock))}
        private = [sock for sock in clients if sock.fileno() not in addresses]
        public = [sock for sock in clients if sock.fileno() in addresses]
        if private:
            yield self._server(self._router(self.keys, public=False), private)
        if public:
            router = self._router(self.keys, public=True)
            server = self._server(router, public)
            self._public.add(router, server, tuple(addresses.values()))
            yield server

    def _router(self, authenticator: Authenticator, *, public: bool) -> Router:
        """The routes of a listener.

        ``public``: other machines can reach it, so the page is served only if so configured.
        """
        router = Router(authenticator, self.cors)
        add_public(router, self._control)
        add_model_routes(router, self._relay)

        def add_others() -> None:
            from vllmd.daemon import other_routes  # two dozen modules that no first client waits for

            def shown() -> bool:
                return not public if self.ui is None else self.ui

            page = other_routes.PageEndpoints(
                self._sessions, shown, not public, lambda: public and self.tls is not None,
                addresses(self._listeners.get("http", ())),
            )  # fmt: skip
            other_routes.add_others(router, page, self._relay, self._control)

        router.add_later(add_others)
        return router

    def _server(self, router: Router, sockets: Sequence[socket.socket]) -> Server:
        return Server(router, self.limits, sockets, self._note, self.memory, clients_files(), self._log_refused)

    def _log_refused(self, why: str) -> None:
        """Log a refused connection: no request of it is read, so no other record has the cause of the client's 503."""
        self._refusals.say(logging.WARNING, "a connection is refused: %s", why)

    @property
    def connections(self) -> int:
        """The number of connections of clients and operators."""
        return sum(server.connections for server in self._servers)

    def open(self) -> None:
        """Accept connections on every listener."""
        register_own_sockets(sock for sockets in self._listeners.values() for sock in sockets)
        for server in self._servers:
            server.start()

    def configure(self, config: Config) -> None:
        """Take what a changed configuration says of clients; connections stay."""
        self.ui, self.tls = config.server.ui, config.server.tls
        self.limits.now = config.server
        self.memory.limit = self.limits.now.max_buffered
        self.keys.hosts.configure(config.server.hosts)
        self.keys.configure(config.auth, self._opens)
        self.quotas.configure(config.auth.keys)
        self.cors.configure(config.server.cors_origins)
        self._public.configure(config)

    @property
    def accepted(self) -> int:
        """Connections that there have been."""
        return sum(server.accepted for server in self._servers)

    @property
    def clients(self) -> int:
        """How many of ``connections`` are clients', not operators'."""
        return sum(server.connections for server in self._clients)

    def exchanges(self) -> Iterator[Exchange]:
        """The requests for models that are under way."""
        return (each for server in self._servers for each in server.exchanges() if each.model)

    def unanswered(self) -> dict[str, float]:
        """By engine, when the oldest of its requests was admitted of whose answer nothing has come (monotonic)."""
        found: dict[str, float] = {}
        for exchange in self.exchanges():
            account = exchange.account
            if account is not None and account.admitted is not None and not account.answered:
                found[account.replica] = min(account.admitted, found.get(account.replica, account.admitted))
        return found

    @property
    def busy(self) -> int:
        """The number of clients that are sending a request or waiting for an answer."""
        return sum(server.busy for server in self._clients)

    def drain(self, *, turn_away: bool) -> None:
        """From now on each client's next answer is his last one; operators are served as ever.

        New clients are left in the listeners' queues, for the next daemon; ``turn_away``: there will be none, so they
        are let in to be refused.
        """
        for server in self._clients:
            server.disable_keep_alive()
            if not turn_away:
                server.stop_accepting()

    def refuse_unread(self, error: VllmdError) -> None:
        """Refuse the requests whose bodies are still arriving."""
        for server in self._clients:
            server.refuse_unread(error)

    async def close(self, limit: float) -> None:
        """Let what is under way end within ``limit`` seconds, then cut it off. The listeners stay open.

        Operators' streams end when the operator wants: they get ``OPERATORS_LIMIT``.
        """
        closing = [server.close(limit) for server in self._clients]
        await asyncio.gather(*closing, *(server.close(OPERATORS_LIMIT) for server in self._operators))
        self._relay.pool.close()

    def _opens(self, name: str) -> frozenset[str]:
        return self._gate.opens(name)

    def _note(self, exchange: Exchange) -> None:
        entry = self._ended(exchange)
        if entry is None:
            self._control.counters.exchanged(exchange)
        else:
            self._control.counters.recorded(entry)
        if exchange.model and exchange.status and (not exchange.error or exchange.error in ENGINES_FAULTS):
            self._outcome(exchange.model, exchange.status, exchange.error != "")
        if exchange.error == SPOKEN_TLS:  # the client shows an error of its TLS library, which tells nobody
            self._spoken_tls.say(
                logging.WARNING,
                "a client (%s) speaks TLS where plain HTTP is spoken: its URL must begin with http://",
                exchange.request.peer.address,
            )
        log_ended(exchange)


def anybody_can_connect(listener: socket.socket) -> bool:
    """Whether the mode of a Unix socket lets every user connect; True where the mode cannot be read."""
    path = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    try:
        return bool(os.stat(path).st_mode & stat.S_IWOTH)
    except (OSError, ValueError):  # none, or an abstract address, which has no mode
        return True


def log_ended(exchange: Exchange) -> None:
    """Log one record for each request, to be found by its id; an answer that was broken off is logged in any case."""
    broken_off = exchange.error != "" and exchange.status < 400 and exchange.error != "ClientGone"
    level = logging.INFO if broken_off or exchange.status >= 500 else logging.DEBUG
    if not log.isEnabledFor(level):
        return
    request = exchange.request
    fields = {"REQUEST_ID": request.id, "VLLMD_STATUS": exchange.status, "VLLMD_SECONDS": f"{exchange.elapsed:.3f}"}
    if exchange.model:
        fields["MODEL"] = exchange.model
    what = f"{exchange.status} {exchange.error}".rstrip() + (f": {exchange.message}" if exchange.message else "")
    about = f" for {exchange.model}" if exchange.model else ""
    log.log(level, "%s %s%s: %s", request.method, request.path, about, what, extra={"journal": fields})
