"""Connections to engines: one request at a time on each, kept a short while for the next one.

An ``Upstream`` reads the answer's head through h11 and passes the body on as the bytes it came in, to a ``Sink``.
Errors of sockets and of h11 end here: callers see ``UpstreamFailed`` or a call of ``Sink.lost``.

A kept connection may be closed by the engine at the very moment in which the next request is sent on it. HTTP has no
way to tell that from an engine that got the request and died. What tells it here is ``untouched``: not a byte of an
answer came, on a connection that was ``reused``. Only then does ``Relay.forward`` send the request again. A connection
that is not at rest after an answer (bytes of the request unsent, more bytes than the answer has) is never kept.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json as json_codec
import logging
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast

from vllmd.addresses import is_loopback
from vllmd.errors import OUT_OF_FILES, UpstreamFailed, out_of_files
from vllmd.proxy.framing import BadFraming, Framing
from vllmd.proxy.gate import Address
from vllmd.proxy.heads import HeadMemo, RawHeaders, ResponseHead, parse_response_head, write_request_head
from vllmd.proxy.limits import UNACKNOWLEDGED, Limits, keep_alive, read_small
from vllmd.proxy.peek import Parts
from vllmd.proxy.peers import Impostor, connected
from vllmd.proxy.response_heads import HeadCollector

log = logging.getLogger(__name__)

WRITE_BYTES = 256 << 10  # given to the transport at a time


class Unreached(UpstreamFailed):
    """No process listens there: no engine has seen the request, so it may be sent again."""


class QueueFull(Unreached):
    """The engine listens, and has not come to accept what others have begun: it never saw the request, either."""


class OutOfFiles(UpstreamFailed):
    """This process can open no more sockets, which is not the engine's fault."""

    status = 503


class Sink(Protocol):
    """The receiver of an engine's answer: ``head``, ``data``..., and ``whole`` or ``lost`` as the last call."""

    def head(self, head: ResponseHead, framing: Framing) -> None:
        """The head; ``data`` follows at once with the bytes of the body that came along with it, perhaps none."""

    def data(self, data: bytes) -> None:
        """More of the body, framing included."""

    def whole(self) -> None:
        """The body came to its end."""

    def lost(self, reason: str, *, untouched: bool) -> None:
        """The connection broke off. ``untouched``: before a single byte of the answer."""


def describe(address: Address) -> str:
    """The address for logs: a path, ``host:port``, or a URL."""
    return address.uds or f"{'https://' * bool(address.tls)}{_authority(address)}{address.prefix}"


def host_field(address: Address) -> str:
    """The Host of a request: the name of a server on another machine, and ``localhost`` for an engine on this one."""
    if address.uds or (not address.tls and is_loopback(address.host)):
        return "localhost"
    return _authority(address).removesuffix(":443" if address.tls else ":80")


def _authority(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


_Key = tuple[str, str, int, str, int | None]


def _key(address: Address) -> _Key:
    """Addresses with the same key may share a connection."""
    return address.uds, address.host, address.port, address.tls, address.owner


class Upstream:
    """One connection to an engine. Carries one request at a time, and reports its answer to a ``Sink``.

    It has the methods of ``asyncio.Protocol``, and is not derived from it: mypyc keeps the attributes of a class with a
    foreign base class in a dict.
    """

    def __init__(self, address: Address, pool: Pool | None = None) -> None:
        self.address = address
        self.key = _key(address)
        self.reused = False  # the pool had kept it
        self.idle_since = 0.0  # seconds of the loop's clock
        self._pool = pool
        self.transport: asyncio.Transport
        self.loop = asyncio.get_running_loop()  # kept, because Python asks for the process's id at each look for it
        self._sink: Sink | None = None
        self._method = ""
        self._heads = HeadMemo(lambda head: parse_response_head(head, "POST"))
        self._collector = HeadCollector()
        self._begun = False  # a byte of the answer has come
        self._framing: Framing | None = None
        self._keep_alive = False
        self._broken = False
        self._paused = False
        self._unsent: deque[memoryview] = deque()  # of the request's body, while the engine takes it slowly
        self._write_paused = False
        self._poll: select.poll | None = None  # made when it is reused

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio once the engine has accepted the connection."""
        self.transport = cast(asyncio.Transport, transport)
        read_small(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            keep_alive(sock, UNACKNOWLEDGED)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer, or, on an idle connection, a reason to drop it.

        Called for every piece of every answer, so a piece of a body costs nothing here but the search for its end.
        """
        sink = self._sink
        if sink is None:
            self.abort()
            return
        try:
            framing = self._framing
            if framing is None:
                rest = self._read_head(data, sink)
                if rest is None:
                    return
                data, framing = rest, cast(Framing, self._framing)
            end = framing.scan(data)
        except BadFraming as error:
            self._break(f"malformed answer: {error}")
            return
        if end < 0:
            sink.data(data)
            return
        if end != len(data):  # more than was announced: the next answer could not be told from the rest
            self._keep_alive, data = False, data[:end]
        sink.data(data)
        self._finish()

    def eof_received(self) -> None:
        """The engine has shut its sending side: asyncio closes, and ``connection_lost`` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: the end of a body that ends with its connection, for any other a loss."""
        self._broken = True
        if self._pool is not None:
            self._pool.forget(self)
        if self._sink is None:
            return
        if exc is None and self._framing is not None and self._framing.finished_by_eof():
            self._finish()
        else:
            self._break(str(exc) if exc else "closed by the engine")

    def pause_writing(self) -> None:
        """The engine does not take the request fast enough: the rest of its body waits where it is, uncopied."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """The engine takes the request's body again: send on."""
        self._write_paused = False
        self._send_on()

    # -- the user's side

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it."""
        return not self._broken and not self.transport.is_closing()

    def is_silent(self) -> bool:
        """Whether it is open, and nothing has come of it since the last answer that the event loop has yet to read.

        What comes between two requests is no answer to the second one, and would be taken for it.
        """
        if not self.usable:
            return False
        poll = self._poll
        if poll is None:
            sock = self.transport.get_extra_info("socket")
            if sock is None:
                return True
            poll = self._poll = select.poll()
            poll.register(sock.fileno(), select.POLLIN)
        return not poll.poll(0)

    def send(self, method: str, head: bytes, body: Parts, size: int, sink: Sink) -> None:
        """Send one request, whose body has ``size`` bytes in all; ``sink`` gets the answer.

        A large body goes out in pieces as fast as the engine takes them. The transport would copy it whole into its
        buffer, so that it would be in memory twice.
        """
        self._sink, self._method = sink, method
        self._framing, self._begun = None, False
        if size <= WRITE_BYTES:
            self.transport.write(b"".join((head, *body)))
        else:
            self.transport.write(head)
            self._unsent.extend([memoryview(part) for part in body])
            self._send_on()

    def _send_on(self) -> None:
        while self._unsent and not self._write_paused and not self.transport.is_closing():
            part = self._unsent[0]
            self.transport.write(part[:WRITE_BYTES])
            self._unsent[0] = part[WRITE_BYTES:]
            if len(part) <= WRITE_BYTES:
                self._unsent.popleft()

    def pause(self) -> None:
        """Stop reading from the engine: the client does not take its answer."""
        if self.usable:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read from the engine again, after ``pause``."""
        if self.usable:
            self._paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; the sink is not called any more."""
        self._sink = None
        self._broken = True
        self._unsent.clear()
        self.transport.abort()

    # -- reading

    def _read_head(self, data: bytes, sink: Sink) -> bytes | None:
        """Collect the head and report it once it is whole. Returns the bytes of the body that came with it, else None.

        1xx answers before it are dropped: the request never asks for one.
        """
        pieces, self._begun = self._begun, True
        end = data.find(b"\n\r\n") + 3
        head = self._heads.known(data[:end]) if end > 2 and self._method == "POST" and not pieces else None
        if head is None:
            # The common case: one plain head of a success, whole.
            if end < 3 or data[:10] != b"HTTP/1.1 2" or pieces or data.find(b"\n\n", 0, end) >= 0:
                found = self._collector.feed(data)
                if found is None:
                    return None
                data, end = found
            raw = data[:end]
            head = self._heads.read(raw) if self._method == "POST" else parse_response_head(raw, self._method)
        self._framing, self._keep_alive = head.framing(), head.keep_alive
        sink.head(head, self._framing)
        return data[end:]

    def _finish(self) -> None:
        sink, self._sink = self._sink, None
        if sink is None:  # the sink called ``abort`` on the last piece
            return
        if self._paused:
            self.resume()
        transport = self.transport
        unsent = self._unsent or transport.get_write_buffer_size() > 0
        # Before ``sink.whole``, in which a next request may already look for a connection.
        if self._pool is None or not self._keep_alive or self._broken or unsent or transport.is_closing():
            self.abort()
        else:
            self._pool.put(self)
        sink.whole()

    def _break(self, reason: str) -> None:
        sink, untouched = self._sink, not self._begun
        self.abort()
        if sink is not None:
            sink.lost(reason, untouched=untouched)


class Pool:
    """Idle connections by address, the most recently used one first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: dict[_Key, list[Upstream]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def get_idle(self, address: Address) -> Upstream | None:
        """Take an idle connection to ``address`` out of the pool, if one is young enough."""
        idle = self._idle.get(_key(address))
        while idle:
            connection = idle.pop()
            oldest = connection.loop.time() - self._limits.now.upstream_idle
            if connection.idle_since > oldest and connection.is_silent():
                connection.reused = True
                return connection
            connection.abort()
        return None

    async def connect(self, address: Address) -> Upstream:
        """Open a new connection. Raises UpstreamFailed."""
        return await connect(address, self._limits.now.connect_timeout, Upstream(address, self))

    def put(self, connection: Upstream) -> None:
        """Keep a connection, whose answer is over, for the next request."""
        if self._closed:
            connection.abort()
            return
        connection.idle_since = connection.loop.time()
        idle = self._idle.get(connection.key)
        if idle is None:
            idle = self._idle[connection.key] = []
        idle.append(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(self._limits.now.upstream_idle, self._sweep)

    def forget(self, connection: Upstream) -> None:
        """Drop a connection that has been closed."""
        idle = self._idle.get(connection.key, [])
        if connection in idle:
            idle.remove(connection)

    def idle(self) -> list[Upstream]:
        """The connections that the pool keeps."""
        return [connection for connections in self._idle.values() for connection in connections]

    def close(self) -> None:
        """Drop all of them and keep no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in self.idle():
            connection.abort()
        self._idle.clear()

    def _sweep(self) -> None:
        """Drop connections that were idle for too long; come again when the next one will have been."""
        loop, self._timer = asyncio.get_running_loop(), None
        oldest = loop.time() - self._limits.now.upstream_idle
        for address, connections in list(self._idle.items()):
            for connection in [c for c in connections if c.idle_since <= oldest]:
                connections.remove(connection)
                connection.abort()
            if not connections:
                del self._idle[address]
        kept = self.idle()
        if kept:
            next_due = min(connection.idle_since for connection in kept) + self._limits.now.upstream_idle
            self._timer = loop.call_at(next_due, self._sweep)


P = TypeVar("P")


async def connect(address: Address, limit: float, protocol: P) -> P:
    """Connect ``protocol``, which has the methods of asyncio's, within ``limit`` seconds; returns it.

    Raises UpstreamFailed saying why not.

    Unreached if no process listens there (QueueFull if one does, and is busy), Impostor if one of another user than
    ``address.owner`` does, OutOfFiles if this process has no file descriptor left.
    """
    loop = asyncio.get_running_loop()
    made = cast(Callable[[], asyncio.Protocol], lambda: protocol)
    place = "the engine's socket" if address.uds else describe(address)  # clients are not told the socket's path
    try:
        async with asyncio.timeout(limit):
            if address.owner is not None:
                sock = await connected(address)
                if address.uds:
                    await loop.create_unix_connection(made, sock=sock)
                else:
                    await loop.create_connection(made, sock=sock)
            elif address.uds:
                await loop.create_unix_connection(made, address.uds)
            else:
                context = tls_context(address.tls) if address.tls else None
                await loop.create_connection(made, address.host, address.port, ssl=context)
            return protocol
    except Impostor as error:
        raise Impostor(f"no connection to {describe(address)}: {error.message}") from None
    except TimeoutError:
        raise UpstreamFailed(f"no connection to {place} within {limit:g} s") from None
    except OSError as error:
        raise _unconnected(address, place, error) from None


def _unconnected(address: Address, place: str, error: OSError) -> UpstreamFailed:
    """Why there is no connection, and whose fault that is. ``place``: the address as clients may be told of it."""
    number = error.errno
    if isinstance(error, ssl.SSLError | socket.gaierror):  # certificates and names are looked up in files
        number = errno.EMFILE if out_of_files() else None
    elif number == errno.EADDRNOTAVAIL and ":" in address.host:  # of IPv6 it may say that there is none
        number = None
    if number in OUT_OF_FILES or number == errno.EADDRNOTAVAIL:  # our own ports may be used up, too
        return OutOfFiles(f"vllmd cannot connect to the engine: {os.strerror(number or 0)}", retry_after=5)
    if isinstance(error, ssl.SSLError):
        why = getattr(error, "verify_message", "") or error.reason or error
        return UpstreamFailed(f"no connection to {place}: TLS: {why}")
    # asyncio's own text has the address in the place of the reason, and several addresses' errors in one.
    code = error.errno or 0
    reason = os.strerror(code) if code > 0 else str(error.strerror or error)
    kind = QueueFull if code == errno.EAGAIN else Unreached
    return kind(f"no connection to {place}: {reason}")


@functools.lru_cache(100)
def tls_context(trusted: str) -> ssl.SSLContext:
    """How to check a server's certificate. ``trusted``: ``system``, or the path of a file with certificates."""
    return ssl.create_default_context(cafile=None if trusted == "system" else trusted)


class Collector:
    """A sink that collects an answer of up to ``limit`` bytes: ``body``, and its head by the future ``over``."""

    def __init__(self, limit: int) -> None:
        self.over: asyncio.Future[ResponseHead] = asyncio.get_running_loop().create_future()
        self.body = bytearray()
        self._head: ResponseHead | None = None
        self._framing: Framing | None = None
        self._limit = limit

    def head(self, head: ResponseHead, framing: Framing) -> None:
        """Remember the head, and have the framing keep the payload."""
        self._head, self._framing, framing.keep = head, framing, True

    def data(self, data: bytes) -> None:
        """Collect the payload that the framing has kept."""
        pieces = cast(Framing, self._framing).pieces
        for piece in pieces:
            self.body += piece
        pieces.clear()
        if len(self.body) > self._limit and not self.over.done():
            self.over.set_exception(UpstreamFailed(f"the answer is larger than {self._limit} bytes"))

    def whole(self) -> None:
        """Give the answer to the future ``over``."""
        if not self.over.done():
            self.over.set_result(cast(ResponseHead, self._head))

    def lost(self, reason: str, *, untouched: bool) -> None:
        """Have ``over`` raise UpstreamFailed with the reason."""
        if not self.over.done():
            self.over.set_exception(UpstreamFailed(f"the connection broke off: {reason}"))


async def request(
    listen: Address,
    method: str,
    path: str,
    json: object = None,
    timeout: float = 60.0,  # noqa: ASYNC109 - no caller shall forget a limit
    limit: int = 64 << 20,
    headers: Sequence[tuple[str, str]] = (),
) -> tuple[int, RawHeaders, bytes]:
    """One HTTP request on a connection of its own: status, headers (names in lower case) and body.

    For control calls and probes. Raises UpstreamFailed, also when ``timeout`` (seconds, for all of it) has passed.
    """
    body = b"" if json is None else json_codec.dumps(json).encode()
    fields = [(b"host", host_field(listen).encode()), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    if json is not None:
        fields.append((b"content-type", b"application/json"))
    if listen.key:
        fields.append((b"authorization", b"Bearer " + listen.key.encode()))
    fields.extend((name.lower().encode(), value.encode("latin-1")) for name, value in headers)
    sink = Collector(limit)
    request_head = write_request_head(method, listen.prefix + path, fields)
    try:
        async with asyncio.timeout(timeout):
            try:
                connection = await connect(listen, timeout, Upstream(listen))
            except UpstreamFailed as error:  # which says where
                raise type(error)(f"{method} {path}: {error.message}") from None
            try:
                connection.send(method, request_head, (body,), len(body), sink)
                head = await sink.over
            except UpstreamFailed as error:
                raise type(error)(f"{method} {path} to {describe(listen)}: {error.message}") from None
            finally:
                connection.abort()
    except TimeoutError:
        raise UpstreamFailed(f"{method} {path} to {describe(listen)} was not answered within {timeout:g} s") from None
    return head.status, list(head.headers.raw), bytes(sink.body)
