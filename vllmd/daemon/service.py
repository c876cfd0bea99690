"""The life of the daemon: the front end at once, the back end when it is built, periodic chores, an orderly end.

Theory of operation. Clients are let in before anything is known of devices and engines, which takes seconds; they wait
at the admission gate. So the life is one task (``run``) and two more beside it: ``_open`` builds the back end and opens
the gate, and ``chores`` has what is due from time to time.

A shutdown is a list of steps, each with a limit, for systemd kills what takes too long. Engines under systemd live on
in their scopes: the next daemon adopts them. A second signal ends every wait.

Nothing about models is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllmd.api.answers import Reloaded
from vllmd.api.names import FIRST_MODEL
from vllmd.config.reload import shared
from vllmd.config.replicas import is_this_host, of_this_host
from vllmd.config.types import Config
from vllmd.core import events
from vllmd.daemon import collector
from vllmd.daemon.chores import STATUS_INTERVAL, Chores
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.discovery import with_discovered
from vllmd.daemon.front_end import SHUTTING_DOWN, FrontEnd, front_end
from vllmd.daemon.tasks import Tasks
from vllmd.errors import ConfigError, Unavailable
from vllmd.systemd.notify import Notifier

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd")

STOP_ENGINES_LIMIT = 60.0  # seconds
ANSWERS_LIMIT = 5.0  # seconds for answers that clients are still taking
NOTES_LIMIT = 2.0  # seconds for notes that the next daemon can do without; a launcher that has died cannot take them
DRAIN_LOOK = 0.05  # seconds between looks at which clients are still there
QUIET = 0.3  # seconds without a request after which kept connections count as unused
FIRST_TURNS = 20  # of the loop, in which a client that was there before us is let in and read
FIRST_LOOKS = 50  # a millisecond apart, at whether it has its answer, where that takes no engine
OTHER_ROUTES_AFTER = 1.0  # seconds in which the clients that have waited are served first
NEEDED_LATER = ("vllmd.daemon.other_routes", "vllmd.daemon.reload", "vllmd.engines.vllm_standby",
                "vllmd.engines.transformers_standby")  # fmt: skip
LAUNCHER_LIMIT = 5.0  # seconds that a drain waits for a launcher: systemd may start none before this daemon has ended


async def for_this_host(config: Config, runtime: RuntimeEnvironment) -> Config:
    """``config`` without what is meant for other machines, and with the models of the cache if ``discover`` is on."""
    config, elsewhere = of_this_host(config, is_this_host)
    if elsewhere:
        log.info("not served here, for the configuration names other machines for them: %s", ", ".join(elsewhere))
    if not config.discover:
        return config
    from vllmd.hub import cache_of  # most configurations leave ``discover`` off

    cache = cache_of(runtime.environment, config.engines.home or runtime.home)
    return await asyncio.to_thread(with_discovered, config, cache)


class Daemon:
    """Runs the front end and the back end from start to shutdown."""

    def __init__(
        self,
        config: Config,
        runtime: RuntimeEnvironment,
        read: Callable[[], Config],
        sockets: Mapping[str, Sequence[socket.socket]],
        broken: str = "",
    ) -> None:
        """``config`` is ``for_this_host``. ``read`` reads its files anew. ``broken``: why they cannot be used."""
        self.front = front_end(config, broken, runtime, sockets, self.apply_configuration, self.reload)
        self.failed = False
        self._read = read
        self._runtime = runtime
        self._notify = Notifier()
        self._tasks = Tasks()
        self._reloading = asyncio.Lock()
        self._stopping, self._second_signal = asyncio.Event(), asyncio.Event()
        self._born = time.monotonic()

    # -- start and shutdown ----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until ``stop`` is called: by a signal, or by the idle exit."""
        self._on_signals()
        self.front.listeners.open()
        if not self.front.current.config.models and not self.front.current.broken:
            log.info("no models are configured yet; %s fetches a small one, serves it and asks it", FIRST_MODEL)
        self._notify.ready("looking for devices and engines")
        chores = Chores(self.front, self._notify, self._stopping, activated=self._runtime.activated, born=self._born)
        beside = [asyncio.ensure_future(work) for work in (self._open(), chores.run())]
        try:
            await self._stopping.wait()
        finally:
            await self.shut_down()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _open(self) -> None:
        """Build the back end, then let requests through.

        Its packages are imported only now, in a thread, so that the first client does not wait for them. Nor for the
        thread: beside one that imports, each turn of the loop may wait five milliseconds for the interpreter.
        """
        try:
            await first_answers(self.front)
            startup = await asyncio.to_thread(importlib.import_module, "vllmd.daemon.startup")
            back: BackEnd = await startup.back_end(self.front)
            collector.exempt_existing()
            self.front.open(back)
            self._tasks.spawn(self._load_use())
            self._tasks.spawn(import_other_routes())
            self._tasks.spawn(back.devices.run(lambda devices: startup.apply_devices(self.front, back, devices)))
            back.post(events.TimePassed())
        except Exception:  # a defect, by which nothing can be served: end, for the next start may fare better
            log.exception("vllmd cannot start its engines' side, and ends")
            self.failed = True
            self.stop()

    async def _load_use(self) -> None:
        """Load what keys have used before, so that limits per day and month go on from there."""
        today, before = await self.front.records.spent()
        for key, (tokens, device_seconds) in today.items():
            self.front.quotas.spent(key, tokens, device_seconds)
        for key, (tokens, device_seconds) in before.items():
            self.front.quotas.spent_this_month(key, tokens, device_seconds)

    async def shut_down(self) -> None:
        """Stop in bounded steps. Engines in systemd's scopes are left to systemd, and to the next daemon."""
        front = self.front
        self._notify.stopping(f"finishing {front.gate.requests} requests")
        # 1. No new requests. Where systemd keeps the listeners clients may wait for the next daemon; else they are
        #    refused.
        is_last = not self._runtime.activated
        front.listeners.drain(turn_away=is_last)
        if is_last:
            front.refuse_waiting()
        # 2. The requests that have begun; what is left after the limit is refused.
        await self._drain(front.current.config.server.drain_timeout)
        front.refuse_waiting()
        front.listeners.refuse_unread(Unavailable(SHUTTING_DOWN, retry_after=5))
        # 3. Engines that nobody else would stop, and what the next daemon is to know of the others.
        back = front.back.now
        if back is not None:
            await self._stop_engines(back)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(back.note_idle(), NOTES_LIMIT)
            await back.keep_learnt()
        # 4. Connections, records, the launcher.
        await front.listeners.close(limit=0.0 if self._second_signal.is_set() else ANSWERS_LIMIT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(front.records.close(), NOTES_LIMIT)
        if back is not None:
            await back.close()

    def stop(self) -> None:
        """Begin the shutdown; a second call has it wait for nothing any more."""
        if self._stopping.is_set():
            log.warning("told to stop once more: breaking off what is under way")
            self._second_signal.set()
        self._stopping.set()

    # -- steps of the shutdown -------------------------------------------------------------

    async def _drain(self, limit: float) -> None:
        """Let the requests that have begun come to their end, within ``limit`` seconds.

        A request counts from its first byte on. A client that keeps its connection cannot be told that the connection
        ends before its next answer: it gets ``QUIET`` seconds to send the request that it may be about to send.
        """
        gate, listeners = self.front.gate, self.front.listeners
        began = last_busy = last_connected = time.monotonic()
        reported = -math.inf
        while (now := time.monotonic()) < began + limit and not self._second_signal.is_set():
            if gate.requests or listeners.busy:
                last_busy = now
            if now - last_busy >= QUIET or not (listeners.clients or gate.requests):
                break
            # Requests that wait for an engine cannot be served without a launcher, and one may never come.
            back = self.front.back.now
            last_connected = now if back and back.launcher.connected else last_connected
            if now - last_connected >= LAUNCHER_LIMIT:
                self.front.refuse_waiting()
            if now - reported >= STATUS_INTERVAL:
                reported = now
                self._notify.extend_timeout(10.0)
                self._notify.status(f"stopping: waiting for {gate.requests or listeners.busy} requests")
                self._notify.watchdog()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._second_signal.wait(), DRAIN_LOOK)

    async def _stop_engines(self, back: BackEnd) -> None:
        """End every engine of a private launcher; those in systemd's scopes are systemd's."""
        if self._runtime.launcher:
            return
        deadline, processes = time.monotonic() + STOP_ENGINES_LIMIT, back.engines.processes
        for name in list(processes):
            back.post(events.StopAsked(name, force=True))
        while processes and time.monotonic() < deadline and not self._second_signal.is_set():
            changed = asyncio.ensure_future(self.front.changes.changed(deadline - time.monotonic()))
            hurried = asyncio.ensure_future(self._second_signal.wait())
            # Both tasks wait from here on. Remote engines have stopped by now, and their change came before.
            await asyncio.sleep(0)
            if processes:
                await asyncio.wait({changed, hurried}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            hurried.cancel()

    # -- signals and reload ----------------------------------------------------------------

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        ends_with_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as under nohup
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, ends_with_terminal)

    def _on_hangup(self, ends_with_terminal: bool) -> None:
        """SIGHUP asks for a reload; or it comes from the terminal of this process, which was closed."""
        if ends_with_terminal and not _has_terminal():
            self.stop()
            return

        async def reload() -> None:
            with contextlib.suppress(ConfigError):  # which ``reload`` has logged
                await self.reload()

        self._tasks.spawn(reload())

    async def reload(self) -> Reloaded:
        """Read the configuration anew and apply it; an invalid one changes nothing. Raises ConfigError.

        Of several reloads each reads when the one before has been applied: files that were read earlier, and took
        longer to read, must not come into force after what was written since.
        """
        await self.front.back.wait()
        async with self._reloading:
            self._notify.reloading()
            try:
                with collector.paused():
                    read = await asyncio.to_thread(lambda: shared(self._read(), self.front.current.config))
                    config = await for_this_host(read, self._runtime)
                    # Files that settings name may have changed where the settings have not.
                    self.front.resolver.renew({*self.front.current.config.models, *self.front.current.engines})
                    async with self.front.changing:
                        answer = await self.apply_configuration(self.front.runtime_models.added_to(config))
                    if len(config.models) >= collector.MANY:
                        collector.exempt_existing()
                    return answer
            except ConfigError as error:
                log.error("not reloaded, the configuration is invalid:\n%s", error.message)
                self.front.current.refused = error.message
                raise
            finally:
                self._notify.ready()

    async def apply_configuration(self, config: Config, unless_used: frozenset[str] = frozenset()) -> Reloaded:
        """Implements ``daemon.current.ApplyConfiguration``. The caller holds ``front.changing``."""
        from vllmd.daemon.reload import apply_configuration  # most daemons are never told to

        return await apply_configuration(self.front, await self.front.back.wait(), config, unless_used)


async def first_answers(front: FrontEnd) -> None:
    """Let clients that were there before us be answered, as far as that takes no engine: those wait at the gate."""
    for _ in range(FIRST_TURNS):
        await asyncio.sleep(0)
    for _ in range(FIRST_LOOKS):
        if front.listeners.busy <= front.gate.requests:
            break
        await asyncio.sleep(0.001)  # ``/v1/models`` waits for a thread that looks into the engines' cache


async def import_other_routes() -> None:
    """Import what the routes need that no first client asks for (``other_routes``), a reload and a start, in a thread.

    Left to the first request for one, that would hold up every stream for a tenth of a second, and after an upgrade of
    the package, while this daemon still drains, it would be another version's code: a start would fail by it.
    """
    await asyncio.sleep(OTHER_ROUTES_AFTER)
    with contextlib.suppress(OSError, ImportError):  # the first request for one tries again, and is told
        for name in NEEDED_LATER:
            await asyncio.to_thread(importlib.import_module, name)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
