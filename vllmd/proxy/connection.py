"""A client's connection: reads requests one after another, has each answered, and keeps the time."""

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
from vllmd.errors import BadRequest, InternalError, RequestTimeout, TookTooLong, TooLarge, Unavailable, VllmdError
from vllmd.proxy.body_memory import BodyMemory, Holder, place_of
from vllmd.proxy.departures import CONTINUE, VANISHED, HalfClosed, has_vanished
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.heads import RequestHead
from vllmd.proxy.http import Headers, Peer, Request
from vllmd.proxy.limits import RECEIVE, Limits, read_small
from vllmd.proxy.reader import RequestReader
from vllmd.proxy.routing import Handler

log = logging.getLogger(__name__)

CUT_SHORT = "malformed request: the connection ended in the middle of it"
SMALL_HEAD = 4 << 10  # bytes of a head that no account is kept of
DISCARDED = 64 << 10  # bytes of a body that are read and dropped on a route that takes none
NO_ROOM = "too many large requests are being held; come back later"
LINGER = 2.0  # seconds for a refused client to read the refusal before its connection is reset
_ids = (f"{prefix}{number:016x}" for prefix in (os.urandom(8).hex(),) for number in itertools.count(1))
new_id = _ids.__next__  # for a request that brought none: unique, no secret


async def _answer_nothing(exchange: Exchange) -> None:
    """The stand-in for a handler until a request's head has been read."""


class Phase(enum.Enum):
    """What the connection's incoming bytes are."""

    HEAD = "a request's head"
    BODY = "its body"
    BUSY = "the next request, kept until this one is answered"
    TUNNEL = "no HTTP any more"
    CLOSING = "of no interest"


class Host(Protocol):
    """What a connection needs of its server."""

    limits: Limits
    memory: BodyMemory
    draining: bool  # each answer is its connection's last
    closing: bool  # and connections that have nothing to answer are closed

    def begin(self, request: Request) -> Handler:
        """The handler for a request whose head alone has been read. Raises VllmdError if it is refused."""

    def ended(self, exchange: Exchange) -> None:
        """A request was answered, refused or given up: count it and write it to the log."""

    def joined(self, connection: Connection) -> None:
        """Count a connection in that has just been made."""

    def left(self, connection: Connection) -> None:
        """Count a connection out that has been closed."""


class Connection(asyncio.Protocol):
    """One client's connection: its requests are read one after another, and each is answered before the next is begun.

    The states are those of ``Phase``. Each has a time limit, and there is one timer for all of them (``_expect``): it
    is moved only when it would come too late, because most requests change the limit and few ever reach it.

    A request's handler runs in a task, and writes to the transport through an ``Exchange``. Three things end a request,
    and whichever comes first is the only one that counts: the answer is whole (``finished``), the answer is broken off
    (``abort``), or the client leaves (``connection_lost``), which cancels the task at once so that the engine stops
    generating. What arrives behind a request is kept, up to ``Limits.pipeline`` bytes, and then the client is not read
    any more until its answer is whole.
    """

    def __init__(self, host: Host) -> None:
        self.peer = Peer()
        self.served = 0  # requests answered
        self._host = host
        self._limits = host.limits
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader(host.limits)
        self._phase = Phase.HEAD
        self._transport: asyncio.Transport
        self._request = Request("", "", "", "", Headers(), self.peer)  # until the head of a first one has been read
        self._handler: Handler = _answer_nothing
        self._exchange: Exchange | None = None
        self._running: asyncio.Task[None] | None = None  # the handler, until the answer is whole
        self._tunnel: Callable[[bytes], None] | None = None
        self._place = ""  # whose memory for bodies it takes
        self._holder: Holder = ("", "")
        self._held = 0  # bytes of memory taken for the request
        self._head_held = 0  # those of them that its head takes, if it is large
        self._keep_alive = True
        self._in_head = False
        self._headed = False  # its head has been read, and it is not yet decided what to do with it
        self._gone = False
        self._half_closed = False
        self._unread = False  # bytes are on their way that nobody will read
        self._write_paused = False
        self._body_mark = 0  # bytes of the body that were there when the present time for them began
        self._expiry: float | None = None  # when the present exchange must be over
        self._deadline = 0.0
        self._late: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio once a client is connected: find out who it is, and give it time for a first request."""
        self._transport = cast(asyncio.Transport, transport)
        read_small(transport)
        self.peer = peer_of(transport)
        self._place = place_of(self.peer)
        self._host.joined(self)
        self._expect(self._limits.now.head_timeout, self._close_quietly)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with up to ``RECEIVE`` bytes: of a request, the next one, or what follows an upgrade."""
        if self._phase is Phase.CLOSING:
            return
        if self._tunnel is not None:
            self._tunnel(data)
            return
        self._reader.feed(data)
        if self._phase is not Phase.BUSY:
            self._advance()
        elif self._reader.pending > self._limits.now.pipeline:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client says no more: it has left, or it waits for its answer (``departures``)."""
        self._half_closed = True
        if self._phase is Phase.TUNNEL:
            self._transport.abort()
        elif self._phase is Phase.BUSY and self._exchange is not None:
            HalfClosed(self._transport, self._exchange)
            return True
        elif self._phase is Phase.BODY or (self._phase is Phase.HEAD and self._in_head):
            self._refuse(BadRequest(CUT_SHORT))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio when the connection is closed: free the body's memory, and stop whatever answers."""
        self._gone = True
        self._late = None
        if self._timer is not None:
            self._timer.cancel()
        self._release()
        if self._exchange is not None:
            self._exchange.client_left()
        if self._running is not None:  # a task that is cancelled before its first step would not even note that it ends
            self._loop.call_soon(self._running.cancel)
        self._host.left(self)

    def pause_writing(self) -> None:
        """The client does not take its answer fast enough."""
        self._write_paused = True
        self._expect(self._limits.now.send_timeout, self._abort_stalled)
        if self._exchange is not None:
            self._exchange.pause(True)

    def resume_writing(self) -> None:
        """The client takes data again: its stall has no time limit any more, what it interrupted has."""
        self._write_paused = False
        if self._phase is Phase.HEAD:
            self._expect(self._limits.now.keepalive_timeout, self._close_quietly)
        elif self._phase is Phase.BODY:
            self._expect_bytes()
        elif self._phase is not Phase.CLOSING:
            self._late = None
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
                        self._expect(self._limits.now.head_timeout, self._head_late)
                    if reader.pending > SMALL_HEAD:
                        self._holder = self._place, ""
                        self._hold_head(reader.pending)
                    return
                self._in_head = False
                self._begin(head)
            elif self._phase is not Phase.BODY:
                return
            # 2. The body, which takes memory as it comes, not as it was announced.
            body, request = reader.body(), self._request
            request.received = received = reader.received
            if received + self._head_held > self._held and request.max_body != 0:
                self.body_grew(received)
            if body is None:
                if self._late != self._body_late:
                    self._expect_bytes()
                return
            # 3. The answer, in a task of its own.
            request.body = body
            self._phase, self._late, self._expiry = Phase.BUSY, None, None
            self._serve(request)
        except VllmdError as error:
            self._refuse(error)

    def _begin(self, head: RequestHead) -> None:
        """A request's head has come: find its handler, and refuse a body that is too large as it is announced."""
        self._keep_alive = head.keep_alive
        self._request = request = Request(
            head.method,
            head.target,
            head.path,
            head.query,
            head.headers,
            self.peer,
            head.version,
            id=head.request_id or new_id(),
            upgrade=head.upgrade,
        )
        self._headed = True
        self._handler = self._host.begin(request)
        if self._head_held or self._reader.head_size > SMALL_HEAD:
            self._release()
            self._holder = self._place, request.caller.name
            self._hold_head(self._reader.head_size)
        if head.length != 0:
            length, most = head.length or 0, self._limits.now.max_body
            if request.max_body == 0:
                most = DISCARDED
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
                self._transport.write(CONTINUE)
        self._phase, self._headed = Phase.BODY, False

    def _expect_bytes(self) -> None:
        """Give the body time: so much for every so many bytes, so that one that stops is given up soon, however
        fast it was before."""
        self._body_mark = self._reader.received
        self._expect(self._limits.now.body_timeout, self._body_late)

    def _body_late(self) -> None:
        limits = self._limits
        if self._reader.received - self._body_mark >= limits.now.body_timeout * limits.now.min_body_rate:
            self._expect_bytes()
        else:
            self._refuse(RequestTimeout("the request's body comes too slowly"))

    def body_grew(self, size: int) -> None:
        """The body takes ``size`` bytes now. Raises Unavailable if there is no room for them."""
        size += self._head_held
        if size > self._held:
            if not self._host.memory.take(self._holder, size - self._held):
                raise Unavailable(NO_ROOM, retry_after=5)
        elif size < self._held:
            self._host.memory.give_back(self._holder, self._held - size)
        self._held = size

    def _release(self) -> None:
        """Give the body's memory back, and let go of the body."""
        if self._held:
            self._host.memory.give_back(self._holder, self._held)
            if self._held > self._head_held:
                self._request.body = b""
            self._held = self._head_held = 0

    def _hold_head(self, size: int) -> None:
        """Take memory for a head of ``size`` bytes, as for a body. Raises Unavailable."""
        before, self._head_held = self._head_held, size
        try:
            self.body_grew(0)
        except Unavailable:
            self._head_held = before
            raise

    # -- answering

    def _serve(self, request: Request) -> None:
        if self._transport.is_closing():
            return  # the client is gone, and ``connection_lost`` is on its way
        keep_alive = self._keep_alive and not self._host.draining
        self._exchange = exchange = Exchange(request, self, self._transport.write, keep_alive=keep_alive)
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
        except Exception:
            log.exception("%s %s failed", exchange.request.method, exchange.request.path)
            exchange.fail(InternalError(f"vllmd failed at this; its log says why, under request {exchange.request.id}"))
        finally:
            self._host.ended(exchange)

    def finished(self, *, keep_alive: bool) -> None:
        """The answer has been written whole: read the next request, or close."""
        self.served += 1
        self._exchange = self._running = None
        self._release()
        if self._gone:
            return
        more = self._reader.pending or not self._half_closed
        if not keep_alive or not more or self._tunnel is not None or self._host.closing:
            self._close()
            return
        self._phase = Phase.HEAD
        if not self._write_paused:
            self._expect(self._limits.now.keepalive_timeout, self._close_quietly)
        if self._reader.pending:
            self._transport.resume_reading()
            self._advance()
            if self._half_closed and self._exchange is not None:
                HalfClosed(self._transport, self._exchange)
            elif self._half_closed and self._phase in (Phase.HEAD, Phase.BODY):
                self._refuse(BadRequest(CUT_SHORT))

    def look(self) -> None:
        """Close it if the client has vanished in the middle of an answer."""
        if self._exchange is not None and has_vanished(self._transport.get_extra_info("socket")):
            log.info("%s has vanished: it acknowledged nothing for %g s", self.peer, VANISHED)
            self._transport.abort()

    def abort(self, *, reset: bool) -> None:
        """Close so that the client sees the answer as broken off."""
        self._exchange = self._running = None
        self._release()
        if not self._gone:
            self._phase = Phase.CLOSING
            if reset:
                reset_at_close(self._transport)
            if reset and self._transport.get_extra_info("sslcontext") is not None:
                self._transport.abort()  # TLS would end in order first, and say by that that the answer is whole
            else:
                self._transport.close()
            self._expect(self._limits.now.send_timeout, self._transport.abort)

    def tunnel(self, receive: Callable[[bytes], None]) -> None:
        """From now on the client's bytes are ``receive``'s, those included that are here already."""
        self._phase, self._tunnel = Phase.TUNNEL, receive
        rest = self._reader.take_rest()
        if rest:
            receive(rest)

    def hold(self, held: bool) -> None:
        """Take nothing more from the client, or take on."""
        if not self._gone:
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def expire(self, seconds: float) -> None:
        """Give the present exchange so long."""
        self._expiry = self._loop.time() + seconds
        if not self._write_paused:
            self._keep_time()

    def _keep_time(self) -> None:
        if self._expiry is not None and self._exchange is not None:
            self._expect(max(0.0, self._expiry - self._loop.time()), self._expired)

    def _expired(self) -> None:
        if self._exchange is not None:
            self.end(TookTooLong(f"the request took longer than it may: {self._exchange.elapsed:.0f} s"))

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
        """Whether a request has begun to come, or waits for its answer; an endless answer of our own is not counted."""
        exchange = self._exchange
        if exchange is None:
            return self._in_head or self._phase is Phase.BODY
        return not exchange.status or bool(exchange.model)

    def last_one(self) -> None:
        """After the present answer no further request is taken; the client is told where its head is not out yet.

        One that could not be told may send one more request, whose answer tells it.
        """
        if self._exchange is not None and not self._exchange.status:
            self._exchange.keep_alive = False

    def refuse_unread(self, error: VllmdError) -> None:
        """Answer a request that has not come to its end with this."""
        if self._exchange is None and (self._in_head or self._phase is Phase.BODY):
            self._refuse(error)

    def retire(self, *, fresh_too: bool) -> None:
        """Close if it is idle; one that has not sent its first request yet only with ``fresh_too``."""
        if self.idle and (self.served or fresh_too):
            self._close_quietly()

    def cut(self) -> None:
        """Close whatever is going on."""
        self._transport.abort()

    def _refuse(self, error: VllmdError) -> None:
        """Answer what could not be read to its end, and read no further."""
        if self._phase is Phase.HEAD and not self._headed:
            self._request = Request("", "", "", "", Headers(), self.peer, id=new_id())
        self._unread = True
        self._reader.drop_body()
        exchange = Exchange(self._request, self, self._transport.write, keep_alive=False)
        exchange.fail(error)
        self._host.ended(exchange)

    def _close(self) -> None:
        """Closing with unread bytes would reset the connection and take the answer with it: let the client close."""
        self._phase = Phase.CLOSING
        if (self._unread or self._reader.pending) and not self._half_closed:
            try:
                if self._transport.can_write_eof():  # TLS has no half-closed connections
                    self._transport.write_eof()
            except OSError:  # the client has reset the connection, and asyncio has not heard of it yet
                self._transport.abort()
                return
            self._transport.resume_reading()
            self._expect(LINGER, self._transport.abort)
        else:
            self._transport.close()
            self._expect(self._limits.now.send_timeout, self._transport.abort)

    def _close_quietly(self) -> None:
        self._phase = Phase.CLOSING
        self._transport.close()

    # -- keeping the time: one timer per connection, moved only when it comes too early

    def _expect(self, seconds: float, late: Callable[[], None]) -> None:
        self._deadline, self._late = self._loop.time() + seconds, late
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._late is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._check)
            return
        late, self._late = self._late, None
        late()

    def _head_late(self) -> None:
        self._refuse(RequestTimeout(f"the request's head took longer than {self._limits.now.head_timeout:g} s"))

    def _abort_stalled(self) -> None:
        log.info("%s took nothing for %g s: cut off", self.peer, self._limits.now.send_timeout)
        self._transport.abort()


def reset_at_close(transport: asyncio.BaseTransport) -> None:
    """Have a TCP connection end with a reset, once what was written is sent: an error where it stands for the end."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """The client at the other end of ``transport``."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return Peer("", 0, *credentials(sock))
    name = transport.get_extra_info("peername")
    return Peer(name[0], name[1]) if name else Peer()
