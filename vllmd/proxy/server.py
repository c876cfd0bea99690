"""The accept loop: accepts connections on listeners, counts them, and drains them at a stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from typing import cast

from vllmd.errors import OUT_OF_FILES, BadRequest, TooManyRequests, Unavailable, VllmdError
from vllmd.proxy.body_memory import BodyMemory
from vllmd.proxy.connection import Connection
from vllmd.proxy.departures import SWEEP_SECONDS
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.heads import write_response_head
from vllmd.proxy.http import error_response
from vllmd.proxy.limits import RECEIVE, Limits, keep_alive
from vllmd.proxy.routing import Router

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 64  # of the loop, so that connections being served get theirs
ACCEPT_PAUSE_SECONDS = 0.5  # without accepting, when no file descriptor was left
SHORTEST_HANDSHAKE_SECONDS = 0.01
HANDSHAKE_SECONDS = 10.0  # from the connection to the end of TLS's handshake; no silent client has a place longer


class Server:
    """Serves ``router`` on listeners that are open already: systemd's, or the daemon's own.

    Listeners are never closed or unlinked here: connections that are not accepted wait in their queues for the next
    process that accepts. ``on_exchange`` is called for every request that ended. ``memory`` is for request bodies;
    several servers may share it. A connection whose file descriptor is ``files`` or higher is refused
    (``limits.clients_files``). ``on_refused`` is called with the reason for each connection that is refused.
    """

    def __init__(
        self,
        router: Router,
        limits: Limits,
        listeners: Iterable[socket.socket],
        on_exchange: Callable[[Exchange], None] = lambda exchange: None,
        memory: BodyMemory | None = None,
        files: int = 2**31,
        on_refused: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.limits = limits
        self.memory = memory or BodyMemory(limits.now.max_buffered)
        self._files = files
        self.draining = self.closing = False
        self.accepted = 0  # connections so far
        self.begin = router.begin
        self._listeners = list(listeners)
        self.ended = on_exchange
        self._on_refused = on_refused
        self.open_connections: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        # Connections, those included of which TLS's handshake is under way, by the address that each counts for: the
        # kernel tells it no more of a connection that the client has reset.
        self._counted: dict[Connection, str] = {}
        self._by_address: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._accept_pause: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._accepting = False
        self.tls: ssl.SSLContext | None = None  # for connections that are accepted from now on

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._counted)

    def exchanges(self) -> list[Exchange]:
        """The requests that are being answered now."""
        return [each.exchange for each in self.open_connections if each.exchange is not None]

    # -- accepting

    def start(self) -> None:
        """Accept connections from now on; may be called again after ``stop_accepting``."""
        self._accepting = True
        for listener in self._listeners:
            listener.setblocking(False)
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def stop_accepting(self) -> None:
        """Leave new connections in the listeners' queues; those accepted are served on."""
        self._accepting = False
        if self._accept_pause is not None:
            self._accept_pause.cancel()
            self._accept_pause = None
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.fileno())

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept connections on %s: %s", listener.getsockname(), error)
                if error.errno in OUT_OF_FILES:  # some will come free; meanwhile clients wait in the queue
                    self.stop_accepting()
                    loop = asyncio.get_running_loop()
                    self._accept_pause = loop.call_later(ACCEPT_PAUSE_SECONDS, self.start)
                return
            self._serve(sock, address)

    def _serve(self, sock: socket.socket, address: object) -> None:
        self.accepted += 1
        refusal = self._too_many(sock, address)
        if refusal is not None:
            self._on_refused(f"{refusal.message} ({self.connections} are open)")
            _turn_away(sock, refusal)
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:  # asyncio does this only for sockets that were made with proto 6
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        connection, origin = Connection(self), address[0] if isinstance(address, tuple) else ""
        self._counted[connection] = origin
        self._by_address[origin] += 1
        opening = asyncio.get_running_loop().create_task(self._open(sock, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)

    def _too_many(self, sock: socket.socket, address: object) -> VllmdError | None:
        if self.connections >= self.limits.now.max_connections or sock.fileno() >= self._files:
            return Unavailable("too many connections; try again later", retry_after=5)
        most = self.limits.now.max_connections_per_address
        if most is not None and isinstance(address, tuple) and self._by_address[address[0]] >= most:
            return TooManyRequests(f"more than {most} connections from {address[0]}", retry_after=5)
        return None

    async def _open(self, sock: socket.socket, connection: Connection) -> None:
        tls, loop = self.tls, asyncio.get_running_loop()
        until = loop.time() + HANDSHAKE_SECONDS
        try:
            if tls is not None and await _speaks_plainly(sock):
                sock.recv(RECEIVE)  # a socket that is closed with unread bytes is reset, and the answer is lost
                _turn_away(
                    sock, BadRequest("TLS is spoken here, and this is plain HTTP: the URL must begin with https://")
                )
                return
            made = cast(asyncio.Protocol, connection)
            left = max(SHORTEST_HANDSHAKE_SECONDS, until - loop.time()) if tls else None
            await loop.connect_accepted_socket(lambda: made, sock, ssl=tls, ssl_handshake_timeout=left)
        except OSError as error:
            log.debug("a connection was gone before it was served: %s", error)
            sock.close()
        except asyncio.CancelledError:  # the server stops
            sock.close()
            raise
        finally:
            if connection not in self.open_connections:  # it never was one, or is over already
                self._forget(connection)

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening.discard(opening)
        self._check_empty()

    # -- called by connections

    def joined(self, connection: Connection) -> None:
        """A connection has been made, and can be served."""
        self.open_connections.add(connection)
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def left(self, connection: Connection) -> None:
        """A connection has been closed."""
        self.open_connections.discard(connection)
        self._forget(connection)
        self._check_empty()

    def _forget(self, connection: Connection) -> None:
        if (address := self._counted.pop(connection, None)) is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _sweep(self) -> None:
        """Look for clients that vanished in the middle of an answer."""
        self._sweeping = None
        for connection in list(self.open_connections):
            connection.close_if_vanished()
        if self.open_connections:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def _check_empty(self) -> None:
        if not self.connections:
            self._empty.set()

    # -- stopping

    @property
    def busy(self) -> int:
        """Connections on which a request is being read or answered."""
        return sum(connection.busy for connection in self.open_connections)

    def disable_keep_alive(self) -> None:
        """Close each connection after its present answer, or after its next one; new ones are still accepted."""
        self.draining = True
        for connection in list(self.open_connections):
            connection.disable_keep_alive()

    def refuse_unread(self, error: VllmdError) -> None:
        """Answer the clients that have sent only a part of a request with the error."""
        for connection in list(self.open_connections):
            connection.refuse_unread(error)

    async def drain(self, limit: float, grace: float = 1.0) -> bool:
        """Stop accepting and wait until all requests have ended, at most ``limit`` seconds. Returns whether they did.

        Idle connections are closed at once; one that has never sent a request gets ``grace`` seconds to do so, and so
        does one of which TLS's handshake is not over.
        """
        self.disable_keep_alive()
        self.closing = True
        self.stop_accepting()
        await self._wait_empty(0.0)
        self._close_idle(fresh_too=False)
        if not await self._wait_empty(min(grace, limit)):
            self._close_idle(fresh_too=True)
        return await self._wait_empty(max(0.0, limit - grace))

    async def close(self, limit: float = 0.0) -> None:
        """Drain within ``limit`` seconds, then cut off the clients that are left. Listeners stay open."""
        await self.drain(limit)
        for connection in list(self.open_connections):
            connection.cut()
        await self._wait_empty(1.0)

    def _close_idle(self, *, fresh_too: bool) -> None:
        for connection in list(self.open_connections):
            connection.close_if_idle(fresh_too=fresh_too)
        for opening in list(self._opening) if fresh_too else ():
            opening.cancel()

    async def _wait_empty(self, limit: float) -> bool:
        self._empty.clear()
        if not self.connections:
            return True
        try:
            async with asyncio.timeout(limit):
                await self._empty.wait()
        except TimeoutError:
            return not self.connections
        return True


async def _speaks_plainly(sock: socket.socket) -> bool:
    """Whether a client's first byte is a letter: plain HTTP begins with one, TLS does not. Raises OSError."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock.fileno(), came.set)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await came.wait()
    finally:
        loop.remove_reader(sock.fileno())
    return sock.recv(1, socket.MSG_PEEK).isalpha()


def _turn_away(sock: socket.socket, refusal: VllmdError) -> None:
    """Send the refusal, if the socket takes it without waiting, and close."""
    response = error_response(refusal)
    body = response.body if isinstance(response.body, bytes) else b""
    framing = [("content-type", response.content_type), ("content-length", str(len(body))), ("connection", "close")]
    sock.setblocking(False)
    try:
        sock.send(write_response_head(response.status, response.headers, framing) + body)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        sock.close()
