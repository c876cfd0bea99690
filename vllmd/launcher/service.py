"""The launcher as a service: which users may connect, what each message does, when the launcher may exit.

One thread. Requests on a connection are answered in any order, and each exit of an engine is sent to every client. A
client that does not read is disconnected rather than waited for.

Every packet has exactly one answer, whatever is in it; an error of the launcher's own is one, too. Everything that a
client can make the launcher hold (packets, followed logs, unfinished answers) is bounded, and so is what it can make it
log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import pwd
import socket
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

from vllmd.credentials import credentials
from vllmd.launcher import protocol
from vllmd.launcher.backend import Backend
from vllmd.launcher.engines import Supervisor
from vllmd.launcher.lines import left_out
from vllmd.launcher.logs import KEPT
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.protocol import (
    Annotate,
    Done,
    Engines,
    Exited,
    ExitReport,
    Failed,
    Follow,
    Info,
    Kill,
    LauncherInfo,
    Lines,
    List,
    Logged,
    Message,
    ProtocolError,
    Reply,
    Request,
    Signal,
    Start,
    Started,
    Tail,
    Unfollow,
    Waiting,
)
from vllmd.launcher.spawn import Users
from vllmd.systemd.throttle import Throttle

log = logging.getLogger(__name__)

MAX_CLIENTS = 64
MAX_QUEUED_BYTES = 16 << 20  # for a client that does not read; beyond it the client is disconnected
MAX_QUEUED_LOG_BYTES = 2 << 20  # beyond it log lines are dropped
MAX_FOLLOWED = 256  # logs that a client may follow at a time
MAX_ERROR_CHARACTERS = 2000
ACCEPT_PAUSE_SECONDS = 1.0  # after a connection could not be accepted; it waits in the listener's queue


class Service:
    """Accepts clients, hands their requests to the ``supervisor``, and exits when it is not needed."""

    def __init__(
        self,
        loop: Loop,
        backend: Backend,
        uids: Collection[int],
        idle_exit: float = 30.0,
        users: Users | None = None,
        roots: Sequence[str] = (),
    ) -> None:
        """``uids``: the users that may connect. ``idle_exit``: seconds without clients and engines until it exits.

        ``users`` and ``roots`` are those of the ``Supervisor``.
        """
        self._loop = loop
        self._backend = backend
        self._uids = frozenset(uids)
        self._idle_exit = idle_exit
        self._clients: list[Client] = []
        self._idle: Timer | None = None
        self._listeners: list[socket.socket] = []
        self._refused, self._malformed, self._reported = Throttle(log), Throttle(log), Throttle(log, burst=200)
        # Not ``users or Users()``: without a name of its own a ``Users`` is false, but may have a range of user ids.
        users = Users() if users is None else users
        self.supervisor = Supervisor(loop, backend, users, self.report, roots, self.standby_waits)

    # --- connections ---

    def listen(self, listener: socket.socket) -> None:
        """Accept clients on ``listener`` from now on."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.watch(listener.fileno(), lambda: self._accept(listener))
        self.consider_idle()

    def serve(self, connection: socket.socket, gone: Callable[[], None] | None = None) -> None:
        """Serve the client on ``connection``; ``gone`` is called when it disconnects."""
        connection.setblocking(False)
        client = Client(self._loop, connection, self._handle, self._left, self._malformed, gone)
        self._clients.append(client)
        self.consider_idle()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # for want of a descriptor, say: the loop would call again at once, for ever
            self._loop.unwatch(listener.fileno())
            again = lambda: self._loop.watch(listener.fileno(), lambda: self._accept(listener))  # noqa: E731
            self._loop.later(ACCEPT_PAUSE_SECONDS, again)
            log.error("cannot accept a connection, and look again in %g s: %s", ACCEPT_PAUSE_SECONDS, error.strerror)
            return
        pid, uid, _ = credentials(connection)
        if uid not in self._uids or len(self._clients) >= MAX_CLIENTS:
            self._refused.say(logging.WARNING, "refused a connection from process %d of user id %d", pid, uid)
            connection.close()
            return
        self.serve(connection)

    def _left(self, client: Client) -> None:
        self._clients.remove(client)
        for instance in client.standbys:
            with contextlib.suppress(KeyError):  # it has ended, or has become an engine
                self.supervisor.kill(instance)
        self.consider_idle()

    def report(self, report: ExitReport) -> None:
        """Log an engine's end, and send it to every client."""
        self._reported.say(logging.INFO, "%s", _sentence(report), fields={"MODEL_INSTANCE": report.instance})
        for client in tuple(self._clients):
            client.unfollow(report.instance)  # it writes nothing more, and journalctl --follow would never end
            client.send(Exited(_fitting(report)))
        self.consider_idle()

    def standby_waits(self, instance: str, memory: int) -> None:
        """Tell every client that a standby is ready."""
        for client in tuple(self._clients):
            client.send(Waiting(instance, memory))

    @property
    def clients(self) -> int:
        """How many clients are connected now."""
        return len(self._clients)

    def consider_idle(self) -> None:
        """Exit after ``idle_exit`` seconds without clients and engines.

        A connection that arrives in the very moment of the exit stays in the queue of the listener, which is systemd's,
        and starts the next launcher.
        """
        if self._idle:
            self._idle.cancel()
        self._idle = None
        if self._listeners and not self._clients and not len(self.supervisor):
            self._idle = self._loop.later(self._idle_exit, self._loop.stop)

    # --- messages ---

    def _handle(self, client: Client, id: int, message: Message) -> None:
        """Answer one request, once, with Failed if it cannot be carried out."""
        answered = False

        def reply(answer: Reply) -> None:
            nonlocal answered
            answered = answered or not getattr(answer, "more", False)
            client.send(answer, id)

        try:
            if not isinstance(message, Request):
                raise ProtocolError("this is an answer, not a request")
            self._dispatch(client, message, reply)
        except KeyError:
            reply(Failed(f"no engine {getattr(message, 'instance', '')!r} is running here"))
        except (ProtocolError, OSError) as error:
            reply(failed(f"{type(message).__name__}: {error}"))
        except Exception as error:
            log.exception("a %s could not be handled", type(message).__name__)
            if not answered:
                reply(failed(f"{type(message).__name__}: the launcher failed: {type(error).__name__}"))

    def _dispatch(self, client: Client, request: Request, reply: Callable[[Reply], None]) -> None:
        match request:
            case Start(order):
                self._start(client, order, reply)
            case Signal() | Kill() | Annotate():
                self._act(request)
                reply(Done())
            case Follow(instance, lines):
                self._follow(client, instance, lines)
                reply(Done())
            case Unfollow(instance):
                client.unfollow(instance)
                reply(Done())
            case Tail(instance, lines):
                self._backend.logs.tail(instance, lines, lambda found: _reply_lines(reply, found))
            case List():
                *first, last = protocol.pack_engines(self.supervisor.list())
                for group in first:
                    reply(Engines(group, more=True))
                reply(Engines(last))
            case Info():
                reply(LauncherInfo(self._backend.name, self._backend.detail, self._backend.limits, protocol.PROTOCOL))
            case _:
                assert_never(request)

    def _follow(self, client: Client, instance: str, lines: int) -> None:
        """Follow the log of an engine; of one that has ended, send the last lines."""
        logs = self._backend.logs
        if self.supervisor.has(instance):
            client.follow(instance, lambda take: logs.follow(instance, lines, take))
        else:
            logs.tail(instance, min(lines, KEPT), lambda found: client.send_lines(instance, found))

    def _act(self, request: Signal | Kill | Annotate) -> None:
        match request:
            case Signal(instance, signum):
                self.supervisor.signal(instance, signum)
            case Kill(instance):
                self.supervisor.kill(instance)
            case Annotate(instance, metadata):
                self.supervisor.annotate(instance, metadata)

    def _start(self, client: Client, order: protocol.StartOrder, reply: Callable[[Reply], None]) -> None:
        def answer(outcome: Started | Failed) -> None:
            if client.closed and isinstance(outcome, Started):
                # A newer client may have asked for the list before this engine was in it, and would never know of it.
                log.warning("engine %s started after its client had disconnected: killed", order.instance)
                self.supervisor.kill(order.instance)
                return
            result = "started" if isinstance(outcome, Started) else f"not started: {outcome.message}"
            instance = order.instance
            self._reported.say(logging.INFO, "engine %s %s", instance, result, fields={"MODEL_INSTANCE": instance})
            reply(outcome)
            self.consider_idle()

        if order.waits:
            client.standbys.add(order.instance)
        self.supervisor.start(order, answer)
        self.consider_idle()


class Client:
    """One connection: packets in, packets out, the logs it follows."""

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        handle: Callable[[Client, int, Message], None],
        left: Callable[[Client], None],
        malformed: Throttle,
        gone: Callable[[], None] | None = None,
    ) -> None:
        """``gone`` is called when the client has left, after ``left``."""
        self.gone = gone
        self.standbys: set[str] = set()  # ordered by this client; they end with it
        self._loop, self._connection, self._handle, self._left = loop, connection, handle, left
        self._malformed = malformed
        self._queue: deque[bytes] = deque()
        self._queued = 0  # bytes in it
        self._follows: dict[str, Callable[[], None]] = {}
        self._dropped: dict[str, int] = {}  # lines of a followed log that there was no room for
        loop.watch(connection.fileno(), self._read)

    @property
    def closed(self) -> bool:
        """Whether the client's connection has been closed."""
        return self._connection.fileno() < 0

    def send(self, message: Message, id: int = 0) -> None:
        """Queue the message, and send as much as the socket takes now."""
        if self.closed:
            return
        try:
            packet = protocol.encode(message, id)
        except ProtocolError as error:
            packet = protocol.encode(failed(str(error)), id)
        self._queue.append(packet)
        self._queued += len(packet)
        if self._queued > MAX_QUEUED_BYTES:
            log.warning("a client does not read its answers (%d bytes of them): disconnected", self._queued)
            self.close()
        else:
            self._flush()

    def follow(self, instance: str, begin: Callable[[Callable[[tuple[str, ...]], None]], Callable[[], None]]) -> None:
        """Send the engine's log from now on, once per instance. Raises OSError if too many logs are followed."""
        self.unfollow(instance)
        if len(self._follows) >= MAX_FOLLOWED:
            raise OSError(errno.EAGAIN, f"{MAX_FOLLOWED} logs are followed on this connection already")
        self._follows[instance] = begin(lambda lines: self.send_lines(instance, lines))

    def unfollow(self, instance: str) -> None:
        """Send this client no more lines of the engine."""
        self._follows.pop(instance, lambda: None)()
        self._dropped.pop(instance, None)

    def send_lines(self, instance: str, lines: tuple[str, ...]) -> None:
        """Send lines of a log. Lines that there is no room for are counted, and the next ones begin with the count."""
        if self._queued > MAX_QUEUED_LOG_BYTES:
            self._dropped[instance] = self._dropped.get(instance, 0) + len(lines)
            return
        if dropped := self._dropped.pop(instance, 0):
            lines = (left_out(dropped), *lines)
        for group in protocol.pack_lines(lines):
            self.send(Logged(instance, group))

    def _read(self) -> None:
        try:
            packet = self._connection.recv(protocol.MAX_PACKET + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
            return
        try:
            id, message = protocol.decode(packet)
        except ProtocolError as error:
            self._malformed.say(logging.WARNING, "a malformed packet: %s", error)
            self.send(failed(f"malformed packet: {error}", permanent=True), error.id)
        except Exception as error:
            log.exception("a packet could not be decoded")
            self.send(failed(f"malformed packet: {type(error).__name__}", permanent=True))
        else:
            self._handle(self, id, message)

    def _flush(self) -> None:
        try:
            while self._queue:
                self._connection.send(self._queue[0])
                self._queued -= len(self._queue.popleft())
        except BlockingIOError:
            self._loop.watch_write(self._connection.fileno(), self._flush)
            return
        except OSError:
            self.close()
            return
        self._loop.watch_write(self._connection.fileno(), None)

    def close(self) -> None:
        """Close the connection, and end all that the client follows."""
        if self.closed:
            return
        self._loop.unwatch(self._connection.fileno())
        for instance in tuple(self._follows):
            self.unfollow(instance)
        self._connection.close()
        self._left(self)
        if self.gone:
            self.gone()


def allowed_uids(users: Sequence[str]) -> frozenset[int]:
    """The ids of the users that may connect: ``users``, or else the launcher's own. Raises ValueError.

    Root has no privilege here: it needs no launcher, and so every request is the daemon's.
    """
    uids = set()
    for user in users:
        try:
            uids.add(pwd.getpwnam(user).pw_uid)
        except KeyError:
            raise ValueError(f"there is no user {user!r}") from None
    return frozenset(uids or {os.getuid()})


def failed(message: str, *, permanent: bool = False) -> Failed:
    """The answer to a request that cannot be carried out. ``message`` may quote the request, so it is clipped."""
    return Failed(protocol.clip(message, MAX_ERROR_CHARACTERS), permanent)


def _fitting(report: ExitReport) -> ExitReport:
    """The report with as many of its last lines as fit a packet."""
    *_, last = protocol.pack_lines(report.log_tail)
    return dataclasses.replace(report, log_tail=last)


def _reply_lines(reply: Callable[[Reply], None], lines: tuple[str, ...]) -> None:
    groups = list(protocol.pack_lines(lines))
    for group in groups[:-1]:
        reply(Lines(group, more=True))
    reply(Lines(groups[-1]))


def _sentence(report: ExitReport) -> str:
    """An engine's end, for the log."""
    how = f"status {report.status}" if report.signal is None else f"signal {report.signal}"
    if report.status is None and report.signal is None:
        how = "an unknown status"
    survivors = "" if report.empty else "; some of its processes could not be killed"
    oom = "; the kernel killed a process of it for memory" if report.oom else ""
    return f"engine {report.instance} ended with {how}{oom}{survivors}"
