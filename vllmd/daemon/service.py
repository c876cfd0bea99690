"""The life of the daemon: the front end at once, the back end when it is built, periodic chores, an orderly end.

Theory of operation. Clients are let in before anything is known of devices and engines, which takes seconds; they wait
at the admission gate. So the life is one task (``run``) and two more beside it: ``_open`` builds the back end and opens
the gate, and ``_tick`` does what is due from time to time. A daemon at rest does nothing at all: where no engine runs,
no client is connected and nothing waits, ``_tick`` sleeps until the core's state changes, the watchdog wants a sign of
life, or the idle exit is due.

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
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllmd.api.answers import Reloaded
from vllmd.api.names import FIRST_MODEL
from vllmd.config.replicas import is_this_host, of_this_host
from vllmd.config.types import Config
from vllmd.core import events
from vllmd.core.types import Snapshot, State
from vllmd.daemon import collector
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.discovery import with_discovered
from vllmd.daemon.failures import failed
from vllmd.daemon.front_end import SHUTTING_DOWN, front_end
from vllmd.daemon.idle_exit import IdleExit
from vllmd.daemon.suspension import SleptTime
from vllmd.errors import ConfigError, Unavailable
from vllmd.systemd.notify import Notifier

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd")

SAMPLE_INTERVAL = 5.0  # seconds between readings of the devices while an engine is loaded
WAIT_INTERVAL = 1.0  # the same while a model waits for room: other processes may leave the device at any moment
STATUS_INTERVAL, SHORTEST_TICK = 1.0, 0.05  # seconds
REST = 60.0  # seconds between ticks at rest, where no watchdog wants them sooner
STOP_ENGINES_LIMIT = 60.0  # seconds
ANSWERS_LIMIT = 5.0  # seconds for answers that clients are still taking
NOTES_LIMIT = 2.0  # seconds for notes that the next daemon can do without; a launcher that has died cannot take them
DRAIN_LOOK = 0.05  # seconds between looks at which clients are still there
QUIET = 0.3  # seconds without a request after which kept connections count as unused
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
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._sampling = asyncio.Lock()
        self._stopping, self._second_signal = asyncio.Event(), asyncio.Event()
        self._idle_exit = IdleExit(time.monotonic())
        self._last_status = ""  # as systemd has it
        self._slept_time = SleptTime()

    # -- start and shutdown ----------------------------------------------------------------

    async def run(self) -> None:
        """Serve until ``stop`` is called: by a signal, or by the idle exit."""
        self._on_signals()
        self.front.listeners.open()
        if not self.front.current.config.models and not self.front.current.broken:
            log.info("no models are configured yet; %s fetches a small one, serves it and asks it", FIRST_MODEL)
        self._notify.ready("looking for devices and engines")
        chores = [asyncio.ensure_future(chore) for chore in (self._open(), self._tick())]
        try:
            await self._stopping.wait()
        finally:
            await self.shut_down()
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)

    async def _open(self) -> None:
        """Build the back end, then let requests through.

        Its packages are imported only now, in a thread, so that the first client does not wait for them.
        """
        try:
            startup = await asyncio.to_thread(importlib.import_module, "vllmd.daemon.startup")
            back: BackEnd = await startup.back_end(self.front)
            collector.exempt_existing()
            self.front.open(back)
            self.side_task(self._load_use())
            self.side_task(back.devices.run(lambda devices: startup.apply_devices(self.front, back, devices)))
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

    # -- chores ----------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Do the periodic chores: once a second, or as often as the idle exit wants; at rest see the file's head."""
        looked = kept = -SAMPLE_INTERVAL
        bad: frozenset[tuple[str, str]] | None = None  # the models in error, as written down last
        while True:
            back = self.front.back.now
            seen = back.activity() if back else None
            # 1. systemd: the loop still turns; and the status that people read.
            self._notify.watchdog()
            if (status := self.status_line(seen)) != self._last_status:
                self._last_status = status
                self._notify.status(status)
            # 2. The idle exit.
            if self._may_exit(seen) and not self._stopping.is_set():  # a second ``stop`` would break off the shutdown
                log.info("nothing is loaded and nobody is connected: exiting until the next connection")
                self.stop()
            if back and seen:
                # 3. A suspension of the machine, during which the monotonic clock, by which all is measured, stood
                #    still.
                if seconds := self._slept_time.passed():
                    log.info("the machine was suspended for %.0f s", seconds)
                    back.post(events.MachineSlept(seconds))
                # 4. Standbys: started when nothing starts and no request waits, given up where models need the memory.
                processes = back.engines.processes
                busy = any(process.ready_after is None or process.task for process in processes.values())
                busy = busy or any(view.waiting_for for view in seen.replicas)
                over = seen.host_promised + seen.host_standbys - seen.host_memory if seen.host_standbys else 0
                back.engines.standbys.review(busy=busy, running=processes, over=over)
                # 5. What a later daemon must know: failures at once, everything else with a sample now and then.
                if (bad_now := failed(seen)) != bad:
                    if bad is not None:
                        self.side_task(back.keep_learnt())
                    bad = bad_now
                now = time.monotonic()
                if now >= looked + self._look_interval(back, seen):
                    keep, looked = now >= kept + SAMPLE_INTERVAL, now
                    kept = now if keep else kept
                    self.side_task(self._sample(back, keep=keep))
            await self._pause(back, seen)

    async def _pause(self, back: BackEnd | None, seen: Snapshot | None) -> None:
        """Wait until the next tick is due: in a second, or, at rest, when something changes or the idle exit is due."""
        idle_exit = self.front.current.config.server.idle_exit
        if back and seen and self._is_at_rest(back, seen):
            seconds = self._notify.watchdog_interval or REST
            if idle_exit is not None and self._runtime.activated:
                seconds = min(seconds, max(self._idle_exit.left(time.monotonic(), idle_exit), SHORTEST_TICK))
            await self.front.changes.changed(seconds)
        else:
            seconds = STATUS_INTERVAL if idle_exit is None else max(idle_exit, SHORTEST_TICK)
            await asyncio.sleep(min(STATUS_INTERVAL, seconds))

    def _is_at_rest(self, back: BackEnd, seen: Snapshot) -> bool:
        """Whether nothing is to be done until a client or an operator comes, which changes the core's state."""
        front = self.front
        in_use = front.listeners.connections or front.store.active or back.engines.standbys.in_use
        return not in_use and self._look_interval(back, seen) == math.inf

    async def _sample(self, back: BackEnd, *, keep: bool) -> None:
        """Read the devices; with ``keep`` write down what a later daemon must know as well.

        A side task, because neither a stuck driver nor a stuck launcher may hold up the watchdog.
        """
        if self._sampling.locked():
            return
        async with self._sampling:
            await back.readings.look()
            self.front.records.look(back.activity(), self.front.gate.running())
            if keep:
                back.dispatcher.flush_log()
                await back.note_idle()
                await back.keep_learnt()

    def _look_interval(self, back: BackEnd, seen: Snapshot) -> float:
        """Seconds between readings of the devices; infinite where nothing is loaded, waits for room, or is amiss."""
        if any(view.waiting_for and view.state in (State.STOPPED, State.SLEEPING) for view in seen.replicas):
            return WAIT_INTERVAL
        wedged = any(device.wedged for device in seen.devices)
        in_use = back.memory.trouble or back.engines.processes or self.front.gate.requests or wedged
        return SAMPLE_INTERVAL if in_use else math.inf

    def status_line(self, seen: Snapshot | None) -> str:
        """The line that ``systemctl status vllmd`` shows."""
        current = self.front.current
        if current.broken:
            return f"configuration invalid, serving errors: {current.broken.splitlines()[0]}"
        off = (State.STOPPED, State.FAILED)
        states = [f"{each.id} {each.state.value}" for each in (seen.replicas if seen else ()) if each.state not in off]
        loaded, requests = ", ".join(states) or "none loaded", self.front.gate.requests
        return f"{len(current.config.models)} models configured; {loaded}; {requests} requests"

    def _may_exit(self, seen: Snapshot | None) -> bool:
        """Whether the idle exit is due: socket-activated, nothing loaded or waiting, no client, for long enough.

        A device that an operator has drained is a reason to stay: only this daemon remembers that.
        """
        front, back = self.front, self.front.back.now
        busy = bool(
            not self._runtime.activated
            or back is None
            or back.engines.processes
            or front.gate.requests
            or front.store.active
            or front.listeners.connections
            or any(view.waiting_for for view in (seen.replicas if seen else ()))
            or any(device.drained for device in (seen.devices if seen else ()))
        )
        after, accepted = front.current.config.server.idle_exit, front.listeners.accepted
        return self._idle_exit.due(time.monotonic(), after, busy=busy, accepted=accepted)

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

        self.side_task(reload())

    async def reload(self) -> Reloaded:
        """Read the configuration anew and apply it; an invalid one changes nothing. Raises ConfigError."""
        await self.front.back.wait()
        self._notify.reloading()
        try:
            with collector.paused():
                config = await for_this_host(await asyncio.to_thread(self._read), self._runtime)
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

    def side_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beside everything else."""
        task = asyncio.ensure_future(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
