"""The daemon's end of the launcher's socket; asyncio, knows neither systemd nor pystemd.

The launcher may die at any time without harm to an engine. The client then calls ``on_lost``, connects again (which
starts the next launcher), lists the engines, and reports those that ended meanwhile. Requests under way are sent to the
next launcher; their callers do not notice.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vllmd.errors import LauncherFailed as LauncherError
from vllmd.frozen import frozen
from vllmd.launcher import protocol
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
    Running,
    Signal,
    Start,
    Started,
    StartOrder,
    Tail,
    Unfollow,
    Waiting,
)

__all__ = ["ExitReport", "LauncherClient", "LauncherFailed", "LauncherInfo", "Running", "StartOrder"]

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # pystemd may block the launcher for 25 when PID 1 does not answer
SILENCE_SECONDS = 10.0  # for an answer, after which the launcher is asked for a sign of life
LIFE_SECONDS = 5.0  # for that sign, which costs it no work; without it the launcher hangs
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 2.0  # between attempts to connect again
PRIVATE_END_SECONDS = 30.0  # for a private launcher to end its engines and itself

R = TypeVar("R", bound=Reply)
OnExit = Callable[[ExitReport], None]
OnLog = Callable[[str, list[str]], None]
OnLost = Callable[[], None]
OnWaiting = Callable[[str, int], None]


class LauncherFailed(LauncherError):
    """The launcher refused a request or failed. ``permanent``: the same order will fail again (no such command)."""

    def __init__(self, message: str, *, permanent: bool = False, answered: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.answered = answered  # the launcher answered so; else no answer came


class _ConnectionLost(LauncherFailed):
    """The launcher has died or exited before it answered."""


class LauncherClient:
    """Made by ``at`` or ``private``, then opened. Callbacks are called in the event loop, and must be quick."""

    def __init__(
        self,
        dial: Callable[[], socket.socket],
        on_exit: OnExit,
        on_log: OnLog,
        on_lost: OnLost,
        on_waiting: OnWaiting,
        reap: Callable[[], None] = lambda: None,
    ) -> None:
        """``reap`` waits for the end of a private launcher."""
        self._dial = dial
        self._reap = reap
        self._on_exit, self._on_log, self._on_lost, self._on_waiting = on_exit, on_log, on_lost, on_waiting
        self._socket: socket.socket | None = None
        self._connected = asyncio.Event()
        self._last_id = 0
        self._pending: dict[int, _Pending] = {}
        self._known: dict[str, Running] = {}
        self._ordered: set[str] = set()  # starts without an answer yet: an exit of theirs is not reported
        self._unconfirmed: set[str] = set()  # to be killed: the caller of their start has given up
        self._over = ""  # why there will be no launcher any more
        self._followed: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking_for_life = False
        self._heard = False  # whether it has said anything since then
        self._hangs = ""  # what it leaves unanswered, as the log has it; "" while it answers
        self._unreachable = ""  # why there is none now
        self._older = ""  # that it is of an older version than this, and is not used
        self._remedy = "only a restart of vllmd replaces it, and ends the engines"

    @classmethod
    def at(
        cls,
        address: str | Path | socket.socket,
        on_exit: OnExit = lambda report: None,
        on_log: OnLog = lambda instance, lines: None,
        on_lost: OnLost = lambda: None,
        on_waiting: OnWaiting = lambda instance, memory: None,
    ) -> LauncherClient:
        """A client of the launcher at a socket's path, or by a connected socket (which cannot be connected again)."""
        given = [address] if isinstance(address, socket.socket) else []

        def dial() -> socket.socket:
            if isinstance(address, socket.socket):
                if not given:
                    raise ConnectionError("the connection was given and is closed")
                return given.pop()
            return _connect_path(address)

        client = cls(dial, on_exit, on_log, on_lost, on_waiting)
        client._remedy = "systemctl restart vllmd-launcher replaces it, and leaves engines alone"
        return client

    @classmethod
    def private(
        cls,
        on_exit: OnExit = lambda report: None,
        on_log: OnLog = lambda instance, lines: None,
        on_lost: OnLost = lambda: None,
        on_waiting: OnWaiting = lambda instance, memory: None,
        options: tuple[str, ...] = (),
    ) -> LauncherClient:
        """A client with a private launcher, without systemd. Its engines end with it, and it ends with this process."""
        private = _PrivateLauncher(options)
        return cls(private.dial, on_exit, on_log, on_lost, on_waiting, private.reap)

    async def open(self) -> LauncherClient:
        """Connect; from then on, connect again whenever the launcher is lost. Raises LauncherFailed if none answers."""
        try:
            self._use_connection(await asyncio.to_thread(self._dial))
        except OSError as error:
            self._unreachable = f"it cannot be connected to: {error}"
            raise LauncherFailed(f"cannot connect to the launcher: {error}") from None
        self._spawn(self._keep_connected())
        return self

    async def close(self) -> None:
        """End the connection. A private launcher then kills its engines and ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._over = "the connection to the launcher was closed"
        self._disconnect(LauncherFailed(self._over))
        await asyncio.to_thread(self._reap)

    @property
    def connected(self) -> bool:
        """Whether there is a launcher now."""
        return self._connected.is_set()

    @property
    def trouble(self) -> str:
        """Why no engine can be started or ended now, and what helps; "" while all is well."""
        return self._unreachable or self._hangs or self._older

    # --- requests; each raises LauncherFailed ---

    async def start(self, order: StartOrder) -> Running:
        """Start an engine; returns when its command has been executed.

        If the launcher dies meanwhile, the next one has adopted the engine, or it is ordered again. When this raises,
        no process of the engine is left.
        """
        limit = order.timeout + ANSWER_SECONDS
        self._ordered.add(order.instance)
        try:
            async with asyncio.timeout(limit):
                return await self._start(order)
        except TimeoutError:
            await self._kill_until_gone(order.instance)
            raise LauncherFailed(f"the launcher did not start {order.instance} in {limit:g} s") from None
        except asyncio.CancelledError:
            self.abandon(order.instance)
            raise
        except LauncherFailed as failure:
            if not failure.answered:
                await self._kill_until_gone(order.instance)
            raise
        finally:
            self._ordered.discard(order.instance)

    async def _start(self, order: StartOrder) -> Running:
        while True:
            try:
                return (await self._request_once(Start(order), Started)).engine
            except _ConnectionLost:
                log.warning("engine %s: the launcher died during its start; the next one is asked", order.instance)
            while True:
                found = [engine for engine in await self.list() if engine.instance == order.instance]
                if found and not found[0].ending:
                    return found[0]
                if not found:
                    break
                await asyncio.sleep(MIN_RETRY_SECONDS)  # the launcher is ending the interrupted start

    async def _kill_until_gone(self, instance: str) -> None:
        """Kill the engine again and again until the launcher knows of no such engine, however long it takes."""
        while True:
            try:
                await self.kill(instance)
            except LauncherFailed as error:
                if error.answered or self._over:
                    return
            await asyncio.sleep(MAX_RETRY_SECONDS)

    def abandon(self, instance: str) -> None:
        """Kill the engine whatever becomes of its start: now, or as soon as there is a launcher."""
        self._unconfirmed.add(instance)
        if self.connected:
            self._spawn(self._kill_unconfirmed())

    async def signal(self, instance: str, signum: int) -> None:
        """Send a signal to the engine's main process only."""
        await self._request(Signal(instance, signum), Done)

    async def kill(self, instance: str) -> None:
        """Send SIGKILL to every process of the engine; ``on_exit`` follows."""
        await self._request(Kill(instance), Done)

    async def list(self) -> list[Running]:
        """Every engine that runs, also those that an earlier launcher or daemon started."""
        parts: builtins.list[Any] = []
        await self._request(List(), Engines, parts)
        found = [engine for part in parts for engine in part.engines]
        self._known |= {engine.instance: engine for engine in found}
        return found

    async def annotate(self, instance: str, metadata: Mapping[str, str]) -> None:
        """Set these keys of the metadata, which survive launcher and daemon."""
        await self._request(Annotate(instance, metadata), Done)

    async def follow(self, instance: str, lines: int = 50) -> None:
        """Call ``on_log`` with the engine's last ``lines`` and with all further ones."""
        self._followed.add(instance)
        await self._request(Follow(instance, lines), Done)

    async def unfollow(self, instance: str) -> None:
        """End what ``follow`` began: ``on_log`` gets no more lines of this engine."""
        self._followed.discard(instance)
        await self._request(Unfollow(instance), Done)

    async def tail(self, instance: str, lines: int = 50) -> builtins.list[str]:
        """The last lines of an engine's log, up to the moment of the call; also of one that has ended."""
        parts: builtins.list[Any] = []
        await self._request(Tail(instance, lines), Lines, parts)
        return [line for part in parts for line in part.lines]

    async def info(self) -> LauncherInfo:
        """The launcher's backend, the limits that have effect there, and its protocol version."""
        info = await self._request(Info(), LauncherInfo)
        self._older = f"it is that of an older version; {self._remedy}" if info.protocol < protocol.PROTOCOL else ""
        return info

    # --- requests and answers ---

    async def _request(self, request: Request, kind: type[R], parts: builtins.list[Any] | None = None) -> R:
        """Send a request, and send it again if the launcher dies meanwhile: all requests but Start are idempotent.

        Returns the last part of the answer; ``parts`` gets all of them.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while True:
                    try:
                        return await self._request_once(request, kind, parts)
                    except _ConnectionLost:
                        continue
        except TimeoutError:
            late = f"did not answer a {type(request).__name__}" if self.connected else "was not there"
            raise LauncherFailed(f"the launcher {late} in {ANSWER_SECONDS:g} s") from None

    async def _request_once(self, request: Request, kind: type[R], parts: builtins.list[Any] | None = None) -> R:
        """Raises _ConnectionLost if it is not known whether the launcher has carried the request out."""
        await self._wait_connected()
        self._last_id += 1
        id = self._last_id
        pending = self._pending[id] = _Pending(
            asyncio.get_running_loop().create_future(), parts if parts is not None else []
        )
        pending.parts.clear()
        patience = SILENCE_SECONDS + (request.order.timeout if isinstance(request, Start) else 0.0)
        silence = asyncio.get_running_loop().call_later(patience, self._suspect, type(request).__name__, patience)
        try:
            await self._send(protocol.encode(request, id))
            answer = await pending.future
        except OSError as error:
            raise _ConnectionLost(str(error)) from None
        except ProtocolError as error:
            raise LauncherFailed(f"the request cannot be sent to the launcher: {error}") from None
        finally:
            silence.cancel()
            self._pending.pop(id, None)
        if isinstance(answer, Failed):
            raise LauncherFailed(answer.message, permanent=answer.permanent, answered=True)
        if not isinstance(answer, kind):
            raise LauncherFailed(f"the launcher answered a {type(request).__name__} with {type(answer).__name__}")
        return answer

    def _suspect(self, unanswered: str, seconds: float) -> None:
        """Ask for a sign of life, once at a time: a request has had no answer for so many seconds."""
        if self.connected and not (self._asking_for_life or self._hangs):
            self._asking_for_life = True
            self._spawn(self._ask_for_life(unanswered, seconds))

    async def _ask_for_life(self, unanswered: str, seconds: float) -> None:
        """Log and remember, until it says anything, that the launcher hangs, if it does not say how it works.

        Without that nothing is known: a start waits for its processes, and the end of a log for a journalctl, which in
        a large journal takes long. Whatever else it says is a sign as well: this process may have been held up itself,
        and read it late.
        """
        self._heard = False
        try:
            async with asyncio.timeout(LIFE_SECONDS):
                await self._request_once(Info(), LauncherInfo)
        except TimeoutError:
            if self._heard or not self.connected:
                return
            seconds += LIFE_SECONDS
            self._hangs = f"it has not answered a {unanswered} for {seconds:g} s, nor anything since; {self._remedy}"
            log.warning("the launcher hangs, and no engine starts or ends: %s", self._hangs)
        except LauncherFailed:
            pass  # it has died; the next one is asked what it was asked
        finally:
            self._asking_for_life = False

    async def _wait_connected(self) -> None:
        """Wait for a launcher. Raises LauncherFailed if none will come."""
        if self._over:
            raise LauncherFailed(self._over)
        await self._connected.wait()

    async def _send(self, packet: bytes) -> None:
        if self._socket is None:
            raise ConnectionError("the connection is lost")
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, packet)
        except OSError:
            self._shut_connection()
            raise

    def _on_packet(self, packet: bytes) -> None:
        try:
            id, message = protocol.decode(packet, newer=True)
        except ProtocolError as error:
            log.error("a malformed packet from the launcher: %s", error)
            return
        self._heard = True
        if self._hangs:
            self._hangs = ""
            log.info("the launcher answers again")
        match message:
            case Exited(report):
                # Not at once: the caller of `start` must see the start, whose answer came before, first.
                asyncio.get_running_loop().call_soon(self._on_exit_report, report)
            case Logged(instance, lines):
                if instance in self._followed:
                    self._on_log(instance, list(lines))
            case Waiting(instance, memory):
                self._on_waiting(instance, memory)
            case _:
                self._on_answer(id, message)

    def _on_answer(self, id: int, message: Message) -> None:
        if isinstance(message, Started):
            self._known[message.engine.instance] = message.engine
        pending = self._pending.get(id)
        if pending is None:
            return  # its caller was cancelled
        if isinstance(message, Engines | Lines):
            pending.parts.append(message)
            if message.more:
                return
        if not pending.future.done():
            pending.future.set_result(message)

    def _on_exit_report(self, report: ExitReport) -> None:
        """Report an engine's end, once; not during its start, when it is the end of what a dying launcher had begun."""
        known = self._known.pop(report.instance, None)
        if report.instance in self._ordered:
            return
        self._followed.discard(report.instance)
        if known:
            self._on_exit(report)

    # --- the connection ---

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _use_connection(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._unreachable = ""
        self._connected.set()

    async def _keep_connected(self) -> None:
        while True:
            await self._read_packets()
            self._disconnect(_ConnectionLost("the connection to the launcher was lost"))
            self._on_lost()
            await self._connect_again()
            self._spawn(self._resume())

    async def _read_packets(self) -> None:
        """Handle packets until the connection ends."""
        assert self._socket
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while packet := await loop.sock_recv(self._socket, protocol.MAX_PACKET + 1):
                self._on_packet(packet)

    def _disconnect(self, error: LauncherFailed) -> None:
        """Fail every request without an answer; whether the launcher has carried it out is not known."""
        self._connected.clear()
        if self._socket:
            self._socket.close()
            self._socket = None
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(error)
                pending.future.exception()  # mark it as read: its caller may have been cancelled

    def _shut_connection(self) -> None:
        """Shut a connection whose launcher has died, so that a sender that notices it waits for the next connection.

        Sending again at once would fail without ever waiting, and the reader would never run to notice the end.
        """
        self._connected.clear()
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader

    async def _connect_again(self) -> None:
        delay, logged = MIN_RETRY_SECONDS, ""
        while True:
            try:
                return self._use_connection(await asyncio.to_thread(self._dial))
            except OSError as error:
                if str(error) != logged:  # once for each reason
                    log.warning("cannot connect to the launcher: %s; trying again", error)
                logged = str(error)
                self._unreachable = f"it cannot be connected to: {error}"
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_SECONDS)

    async def _resume(self) -> None:
        """Report engines that ended while the connection was lost, follow logs again, kill what was abandoned."""
        before, followed = set(self._known), set(self._followed)
        try:
            running = {engine.instance for engine in await self.list()}
            for instance in before & self._known.keys() - running:
                self._on_exit_report(ExitReport(instance))
            for instance in followed & running:
                await self._request(Follow(instance, 0), Done)
        except LauncherFailed as error:
            log.warning("cannot list the engines after the launcher was lost: %s", error)
        await self._kill_unconfirmed()

    async def _kill_unconfirmed(self) -> None:
        """Kill every engine in ``_unconfirmed``; one that cannot be killed now is left to the next launcher."""
        for instance in tuple(self._unconfirmed):
            with contextlib.suppress(LauncherFailed):
                await self._kill_until_gone(instance)
                self._unconfirmed.discard(instance)


@frozen
class _Pending:
    """A request without an answer yet; ``parts``: the parts of the answer so far."""

    future: asyncio.Future[Message]
    parts: list[Any]


class _PrivateLauncher:
    """Starts the launchers of one session; each kills the engines that the last one left."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self._options = options
        self._token = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    def dial(self) -> socket.socket:
        """Start a launcher at the other end of a new connection. Raises OSError.

        It has a session of its own: Ctrl-C, a closed terminal or a kill of the process group end the daemon alone, and
        the launcher stays to end the engines.
        """
        if self._process:
            self._process.wait()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = str(theirs.fileno())
            argv = [sys.executable, "-m", "vllmd.launcher", "--fd", fd, "--session", self._token, *self._options]
            package = str(Path(__file__).resolve().parents[2])
            path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
            environment = {**os.environ, "PYTHONPATH": path}
            self._process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        return ours

    def reap(self) -> None:
        """Wait for the launcher, which exits when its connection is closed; kill it if it does not."""
        if self._process:
            try:
                self._process.wait(PRIVATE_END_SECONDS)
            except subprocess.TimeoutExpired:
                log.error(
                    "the launcher did not exit within %g s after its connection was closed: killed",
                    PRIVATE_END_SECONDS,
                )
                self._process.kill()
                self._process.wait()


def _connect_path(path: str | Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        gone = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
        advice = "; `systemctl restart vllmd-launcher.socket` makes it again" if gone else ""
        raise OSError(error.errno, f"{error.strerror}: {path}{advice}") from None
    return connection
