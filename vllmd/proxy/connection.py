"""A client's connection: reads requests one after another, starts a handler for each, and keeps the time limits."""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol, cast

from vllmd.credentials import credentials
from vllmd.errors import (
    OUT_OF_FILES,
    BadRequest,
    InternalError,
    RequestTimeout,
    TookTooLong,
    TooLarge,
    Unavailable,
    VllmdError,
    replaced,
)
from vllmd.proxy.body_memory import BodyMemory, Holder, place_of
from vllmd.proxy.departures import CONTINUE, VANISHED_SECONDS, HalfClosed, has_vanished
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.heads import RequestHead
from vllmd.proxy.http import Headers, Peer, Request
from vllmd.proxy.limits import RECEIVE, Limits, read_small
from vllmd.proxy.reader import RequestReader
from vllmd.proxy.routing import Handler

log = logging.getLogger(__name__)

CUT_SHORT = "malformed request: the connection ended in the middle of it"
UNCHARGED_HEAD_BYTES = 4 << 10  # a head that is not larger takes nothing of the memory for bodies
DISCARDED_BODY_BYTES = 64 << 10  # read and dropped on a route that takes no body
NO_ROOM = "too many large requests wait at the moment; try again later"
LINGER_SECONDS = 2.0  # for a refused client to read the refusal before its connection is reset
_ID_BEGINS, _id_numbers = os.urandom(8).hex(), itertools.count(10**15)  # of sixteen digits, all of them


def new_id() -> str:
    """The id of a request that brought none: unique, but guessable."""
    return _ID_BEGINS + str(next(_id_numbers))


async def _answer_nothing(exchange: Exchange) -> None:
    """The stand-in for a handler until a request's head has been read."""


class Phase(enum.Enum):
    """The meaning of a connection's next bytes."""

    HEAD = "a request's head"
    BODY = "its body"
    BUSY = "the next request, kept until this one is answered"
    TUNNEL = "another protocol's"
    CLOSING = "dropped"


class Host(Protocol):
    """The interface of the server for its connections."""

    limits: Limits
    memory: BodyMemory
    draining: bool  # each answer is its connection's last
    closing: bool  # and connections without a request are closed

    def begin(self, request: Request) -> Handler:
        """The handler for a request whose head alone has been read. Raises VllmdError if it is refused."""

    def ended(self, exchange: Exchange) -> None:
        """A request was answered, refused or given up: count it and write it to the log."""

    def joined(self, connection: Connection) -> None:
        """A connection has been accepted."""

    def left(self, connection: Connection) -> None:
        """A connection has been closed."""


class Connection:
    """One client's connection. Requests are read one after another, and each is answered before the next is begun.

    It has the methods of ``asyncio.Protocol``, and is not derived from it: see ``upstream.Upstream``.

    The states are those of ``Phase``. Each has a time limit, and there is one timer for all of them
    (``_set_deadline``). Nearly every request moves the deadline several times and hardly any reaches it, so a later
    deadline leaves the timer alone: when it fires too early, it is set anew.

    A request's handler runs in a task, and writes to the transport through an ``Exchange``. Three things end a request,
    and only the first of them counts: the answer is whole (``finished``), the answer is broken off (``abort``), or the
    client disconnects (``connection_lost``), which cancels the task at once so that the engine stops generating. Bytes
    behind a request are kept, up to ``server.pipeline`` of them; then nothing more is read from the client until its
    answer is whole.

    Memory is charged for a body as its bytes arrive (``body_memory``), and given back as soon as the answer is whole.
    """

    def __init__(self, host: Host) -> None:
        self.peer = Peer()
        self.transport: asyncio.Transport
        self.served = 0  # requests answered
        self._host = host
        self._limits = host.limits
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader(host.limits)
        self._phase = Phase.HEAD
        self._request = Request("", "", "", "", Headers(), self.peer)  # until the head of a first one has been read
        self._handler: Handler = _answer_nothing
        self._exchange: Exchange | None = None
        self._running: asyncio.Task[None] | None = None  # the handler, until the answer is whole
        self._tunnel: Callable[[bytes], None] | None = None
        self._place = ""  # with the key's name: the holder of the memory for bodies
        self._holder: Holder = ("", "")
        self._charged = 0  # bytes of memory charged for the request
        self._head_charged = 0  # those of them that its head takes, if it is large
        self._keep_alive = True
        self._in_head = False  # a part of the next head has come
        self._head_read = False  # the head has been read, and not yet accepted or refused
        self._closed = False
        self._half_closed = False
        self._unread = False  # the client is still sending bytes that will not be read
        self._write_paused = False
        self._body_mark = 0  # bytes of the body that had come when its present time limit began
        self._expiry: float | None = None  # the loop's time at which the present exchange must be over
        self._deadline = 0.0
        self._on_deadline: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected: identify its address or process, and set the time limit for its first request."""
        self.transport = cast(asyncio.Transport, transport)
        read_small(transport)
        self.peer = peer_of(transport)
        self._place = place_of(self.peer)
        self._host.joined(self)
        self._set_deadline(self._limits.now.head_timeout, self._close_quietly)

    def data_received(self, data: bytes) -> None:
        """Up to ``RECEIVE`` bytes have come: of a request, of the next one, or of another protocol after an upgrade."""
        if self._phase is Phase.CLOSING:
            return
        if self._tunnel is not None:
            self._tunnel(data)
            return
        self._reader.feed(data)
        if self._phase is not Phase.BUSY:
            self._advance()
        elif self._reader.pending > self._limits.now.pipeline:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """The client has shut its sending side: it has left, or it waits for its answer (``departures`` finds out)."""
        self._half_closed = True
        if self._phase is Phase.TUNNEL:
            self.transport.abort()
        elif self._phase is Phase.BUSY and self._exchange is not None:
            HalfClosed(self.transport, self._exchange)
            return True
        elif self._phase is Phase.BODY or (self._phase is Phase.HEAD and self._in_head):
            self._refuse(BadRequest(CUT_SHORT))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: give the body's memory back, and cancel the handler."""
        self._closed = True
        self._on_deadline = None
        if self._timer is not None:
            self._timer.cancel()
        self._release()
        if self._exchange is not None:
            self._exchange.client_left()
        if self._running is not None:
            # Not at once: a task that is cancelled before its first step never runs ``_run``, which reports its end.
            self._loop.call_soon(self._running.cancel)
        self._host.left(self)

    def pause_writing(self) -> None:
        """The client does not take its answer fast enough."""
        self._write_paused = True
        self._set_deadline(self._limits.now.send_timeout, self._abort_stalled)
        if self._exchange is not None:
            self._exchange.pause(True)

    def resume_writing(self) -> None:
        """The client takes data again: the limit of its stall ends, and that of the interrupted phase goes on."""
        self._write_paused = False
        if self._phase is Phase.HEAD:
            self._set_deadline(self._limits.now.keepalive_timeout, self._close_quietly)
        elif self._phase is Phase.BODY:
            self._expect_bytes()
        elif self._phase is not Phase.CLOSING:
            self._on_deadline = None
            self._keep_time()
        if self._exchange is not None:
            self._exchange.pause(False)

    # -- reading requests

    def _advance(self) -> None:
        """Read the next request as far as it has come, and have it answered once it is whole."""
        reader = self._reader
        try:
            # 1. The head. What can be refused by it is refused before the body is taken.
            if self._phase is Phase.HEAD:
                head = reader.head()
                if head is None:
                    if reader.pending and not self._in_head:
                        self._in_head = True
                        self._set_deadline(self._limits.now.head_timeout, self._head_late)
                    if reader.pending > UNCHARGED_HEAD_BYTES:
                        self._holder = self._place, ""  # the key is not known yet
                        self._charge_head(reader.pending)
                    return
                self._in_head = False
                self._begin(head)
            elif self._phase is not Phase.BODY:
                return
            # 2. The body. Memory is charged for the bytes that came, not for a length that was only announced.
            body, request = reader.body(), self._request
            request.received = received = reader.received
            if received + self._head_charged > self._charged and request.max_body != 0:
                self.charge_body(received)
            if body is None:
                if self._on_deadline != self._body_late:
                    self._expect_bytes()
                return
            # 3. The answer, in a task of its own.
            request.body = body
            self._phase, self._on_deadline, self._expiry = Phase.BUSY, None, None
            self._serve(request)
        except VllmdError as error:
            self._refuse(error)

    def _begin(self, head: RequestHead) -> None:
        """A request's head has come: find its handler, and refuse a body whose announced length is too large."""
        self._keep_alive = head.keep_alive
        self._request = request = Request(
            head.method,
            head.target,
            head.path,
            head.query,
            head.headers,
            self.peer,
            head.version,
            head.request_id or new_id(),
            head.upgrade,
        )
        self._head_read = True
        self._handler = self._handler_of(request)
        if self._head_charged or self._reader.head_size > UNCHARGED_HEAD_BYTES:
            self._release()
            self._holder = self._place, request.caller.name
            self._charge_head(self._reader.head_size)
        if head.length != 0:
            length, most = head.length or 0, self._limits.now.max_body
            if request.max_body == 0:
                most = DISCARDED_BODY_BYTES
                self._reader.discard(most)
            elif request.max_body is not None:
                most = request.max_body
                self._reader.limit(most)
            if length > most:
                raise TooLarge(f"the body is {length} bytes; at most {most} are taken")
            self._holder = self._place, request.caller.name
            if length > RECEIVE and request.max_body != 0 and not self._host.memory.has_room(self._holder, length):
                raise Unavailable(NO_ROOM, retry_after=5)
            if head.expects_continue and not self._reader.pending:
                self.transport.write(CONTINUE)
        self._phase, self._head_read = Phase.BODY, False

    def _handler_of(self, request: Request) -> Handler:
        """The route's handler. Raises VllmdError only; routes that are put in when needed have to be imported first."""
        try:
            return self._host.begin(request)
        except VllmdError:
            raise
        except Exception as error:
            raise _fault(error, request) from None

    def _expect_bytes(self) -> None:
        """Set the time limit for the next bytes of the body. ``_body_late`` renews it, if enough of them have come.

        A limit for the whole body would have to be long enough for the largest one, and so would a client that stops.
        """
        self._body_mark = self._reader.received
        self._set_deadline(self._limits.now.body_timeout, self._body_late)

    def _body_late(self) -> None:
        limits = self._limits
        if self._reader.received - self._body_mark >= limits.now.body_timeout * limits.now.min_body_rate:
            self._expect_bytes()
        else:
            self._refuse(RequestTimeout("the request's body comes too slowly"))

    def charge_body(self, size: int) -> None:
        """Charge the body with ``size`` bytes in all. Raises Unavailable if there is no room for them."""
        size += self._head_charged
        if size > self._charged:
            if not self._host.memory.try_charge(self._holder, size - self._charged):
                raise Unavailable(NO_ROOM, retry_after=5)
        elif size < self._charged:
            self._host.memory.uncharge(self._holder, self._charged - size)
        self._charged = size

    def _release(self) -> None:
        """Give the request's memory back, and drop its body."""
        if self._charged:
            self._host.memory.uncharge(self._holder, self._charged)
            if self._charged > self._head_charged:
                self._request.body = b""
            self._charged = self._head_charged = 0

    def _charge_head(self, size: int) -> None:
        """Charge a head with ``size`` bytes, as a body. Raises Unavailable."""
        before, self._head_charged = self._head_charged, size
        try:
            self.charge_body(0)
        except Unavailable:
            self._head_charged = before
            raise

    # -- answering

    def _serve(self, request: Request) -> None:
        if self.transport.is_closing():
            return  # ``connection_lost`` follows
        keep_alive = self._keep_alive and not self._host.draining
        self._exchange = exchange = Exchange(request, self, self.transport.write, keep_alive)
        if self._write_paused:
            exchange.pause(True)
        self._running = self._loop.create_task(self._run(exchange, self._handler))

    async def _run(self, exchange: Exchange, handler: Handler) -> None:
        try:
            await handler(exchange)
            if not exchange.over:
                raise RuntimeError("the handler ended without an answer")
        except VllmdError as error:
            exchange.fail(error)
        except asyncio.CancelledError:
            exchange.error = exchange.error or "ClientGone"
            exchange.abort()
        except Exception as error:
            exchange.fail(_fault(error, exchange.request))
        finally:
            self._host.ended(exchange)

    def finished(self, keep_alive: bool) -> None:
        """The answer has been written whole: read the next request, or close."""
        self.served += 1
        self._exchange = self._running = None
        self._release()
        if self._closed:
            return
        more = not self._half_closed or self._reader.pending
        if not keep_alive or not more or self._tunnel is not None or self._host.closing:
            self._close()
            return
        self._phase = Phase.HEAD
        if not self._write_paused:
            self._set_deadline(self._limits.now.keepalive_timeout, self._close_quietly)
        if self._reader.pending:
            self.transport.resume_reading()
            self._advance()
            if self._half_closed and self._exchange is not None:
                HalfClosed(self.transport, self._exchange)
            elif self._half_closed and self._phase in (Phase.HEAD, Phase.BODY):
                self._refuse(BadRequest(CUT_SHORT))

    def close_if_vanished(self) -> None:
        """Close the connection if its client has vanished in the middle of an answer."""
        if self._exchange is not None and has_vanished(self.transport.get_extra_info("socket")):
            log.info("client %s has vanished: it acknowledged nothing for %g s", self.peer, VANISHED_SECONDS)
            self.transport.abort()

    def abort(self, *, reset: bool) -> None:
        """Close so that the client sees a broken answer; ``reset``: where an orderly close would look like its end."""
        self._exchange = self._running = None
        self._release()
        if not self._closed:
            self._phase = Phase.CLOSING
            if reset:
                reset_at_close(self.transport)
            if reset and self.transport.get_extra_info("sslcontext") is not None:
                self.transport.abort()  # ``close`` would send TLS's close_notify, which says that the answer is whole
            else:
                self.transport.close()
            self._set_deadline(self._limits.now.send_timeout, self.transport.abort)

    def tunnel(self, receive: Callable[[bytes], None]) -> None:
        """Hand all further bytes of the client's to ``receive``, those included that have come already."""
        self._phase, self._tunnel = Phase.TUNNEL, receive
        rest = self._reader.take_rest()
        if rest:
            receive(rest)

    def pause_client(self, paused: bool) -> None:
        """Stop reading from the client, or go on."""
        if not self._closed:
            (self.transport.pause_reading if paused else self.transport.resume_reading)()

    def expire(self, seconds: float) -> None:
        """Set the time limit of the present exchange."""
        self._expiry = self._loop.time() + seconds
        if not self._write_paused:
            self._keep_time()

    def _keep_time(self) -> None:
        if self._expiry is not None and self._exchange is not None:
            self._set_deadline(max(0.0, self._expiry - self._loop.time()), self._expired)

    def _expired(self) -> None:
        if self._exchange is not None:
            self.end(TookTooLong(f"the request took longer than allowed: {self._exchange.elapsed:.0f} s"))

    def end(self, error: VllmdError) -> None:
        """Answer the present exchange with the error, or break off where its answer has begun; cancel its handler."""
        exchange, running = self._exchange, self._running
        if exchange is None or running is None:
            return
        exchange.keep_alive = False
        exchange.fail(error)
        running.cancel()

    # -- ending

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self._phase is Phase.HEAD and not self._in_head

    @property
    def exchange(self) -> Exchange | None:
        """The request that is being answered."""
        return self._exchange

    @property
    def busy(self) -> bool:
        """Whether a request has begun to come, or waits for an answer other than an endless one of the daemon's own."""
        exchange = self._exchange
        if exchange is None:
            return self._in_head or self._phase is Phase.BODY
        return not exchange.status or bool(exchange.model)

    def disable_keep_alive(self) -> None:
        """Close the connection after the present answer, if its head, which must say so, is not sent yet.

        Else after the answer to the next request, whose head says so.
        """
        if self._exchange is not None and not self._exchange.status:
            self._exchange.keep_alive = False

    def refuse_unread(self, error: VllmdError) -> None:
        """Answer a request that has come only in part with the error."""
        if self._exchange is None and (self._in_head or self._phase is Phase.BODY):
            self._refuse(error)

    def close_if_idle(self, *, fresh_too: bool) -> None:
        """Close the connection if it is idle; ``fresh_too``: even if its first request has not come yet."""
        if self.idle and (self.served or fresh_too):
            self._close_quietly()

    def cut(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def _refuse(self, error: VllmdError) -> None:
        """Answer a request that was not read to its end with the error, and close."""
        if self._phase is Phase.HEAD and not self._head_read:
            self._request = Request("", "", "", "", Headers(), self.peer, id=new_id())
        self._unread = True
        self._reader.drop_body()
        exchange = Exchange(self._request, self, self.transport.write, False)
        exchange.fail(error)
        self._host.ended(exchange)

    def _close(self) -> None:
        """Close once the client has closed, or after ``LINGER_SECONDS``, if bytes of it are unread; else now.

        The kernel resets a connection that is closed with unread bytes, and the client loses the answer.
        """
        self._phase = Phase.CLOSING
        if (self._unread or self._reader.pending) and not self._half_closed:
            try:
                if self.transport.can_write_eof():  # TLS has no half-closed connections
                    self.transport.write_eof()
            except OSError:  # the client has reset the connection, and asyncio has not noticed yet
                self.transport.abort()
                return
            self.transport.resume_reading()
            self._set_deadline(LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()
            self._set_deadline(self._limits.now.send_timeout, self.transport.abort)

    def _close_quietly(self) -> None:
        self._phase = Phase.CLOSING
        self.transport.close()

    # -- time limits

    def _set_deadline(self, seconds: float, on_deadline: Callable[[], None]) -> None:
        """Call ``on_deadline`` in so many seconds, unless it is called with another deadline before."""
        self._deadline, self._on_deadline = self._loop.time() + seconds, on_deadline
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._on_deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._check)
            return
        on_deadline, self._on_deadline = self._on_deadline, None
        on_deadline()

    def _head_late(self) -> None:
        self._refuse(RequestTimeout(f"the request's head took longer than {self._limits.now.head_timeout:g} s"))

    def _abort_stalled(self) -> None:
        log.info(
            "client %s took nothing of its answer for %g s: disconnected", self.peer, self._limits.now.send_timeout
        )
        self.transport.abort()


def reset_at_close(transport: asyncio.BaseTransport) -> None:
    """Have a TCP connection end with a reset once its buffer is sent: the client sees an error, not an end."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """The client at the other end of ``transport``."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return Peer("", 0, *credentials(sock))
    name = transport.get_extra_info("peername")
    return Peer(name[0], name[1]) if name else Peer()


def _fault(error: Exception, request: Request) -> VllmdError:
    """What a client is told of an error that no handler expects; it is logged.

    That this process can open no more files is none: any handler may meet it, and in a moment it may be over. Nor is
    that its files were replaced.
    """
    if replaced(error):
        log.error("%s %s failed: vllmd was upgraded and not restarted: %s", request.method, request.path, error)
        return Unavailable("vllmd has been upgraded; this part of it works again when it is restarted", retry_after=5)
    if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
        log.error("%s %s failed: %s", request.method, request.path, error.strerror)
        return Unavailable(f"vllmd cannot do it now: {error.strerror}", retry_after=5)
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return InternalError(f"a fault in vllmd; its log has the reason, under request {request.id}")
