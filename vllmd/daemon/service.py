"""The daemon from its first to its last breath, as lists of bounded steps; it decides nothing about models itself."""

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

SAMPLE_INTERVAL = 5.0  # seconds between looks at the devices while an engine is loaded
WAIT_INTERVAL = 1.0  # the same while a model waits for room: strangers may leave any moment
STATUS_INTERVAL, SHORTEST_TICK = 1.0, 0.05  # seconds
REST = 60.0  # seconds between looks at rest, where no watchdog wants them sooner
STOP_ENGINES_LIMIT = 60.0
ANSWERS_LIMIT = 5.0  # for answers that clients are still taking
NOTES_LIMIT = 2.0  # for notes that the next daemon can do without; a launcher that has died cannot take them
DRAIN_LOOK = 0.05  # seconds between looks at who is still there
QUIET = 0.3  # seconds without a request after which kept connections count as unused
LAUNCHER_LIMIT = 5.0  # seconds that a shutdown waits for a launcher: systemd may start none before we have gone


async def for_this_host(config: Config, runtime: RuntimeEnvironment) -> Config:
    """``config`` without what is meant for other machines, and with the models of the cache, if it wants them."""
    config, elsewhere = of_this_host(config, is_this_host)
    if elsewhere:
        log.info("left out, for they are meant for other machines: %s", ", ".join(elsewhere))
    if not config.discover:
        return config
    from vllmd.hub import cache_of  # most configurations do not ask for it

    cache = cache_of(runtime.environment, config.engines.home or runtime.home)
    return await asyncio.to_thread(with_discovered, config, cache)


class Daemon:
    """The daemon's life: the front end at once, the back end when it is built, periodic chores, an orderly end."""

    def __init__(
        self,
        config: Config,
        runtime: RuntimeEnvironment,
        read: Callable[[], Config],
        sockets: Mapping[str, Sequence[socket.socket]],
        broken: str = "",
    ) -> None:
        """``config`` is ``for_this_host``. ``read`` reads the files anew; ``broken``: why they cannot be used."""
        self.front = front_end(config, broken, runtime, sockets, self.apply_configuration, self.reload)
        self.failed = False
        self._read = read
        self._runtime = runtime
        self._notify = Notifier()
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._sampling = asyncio.Lock()
        self._stopping, self._second_signal = asyncio.Event(), asyncio.Event()
        self._idle_exit = IdleExit(time.monotonic())
        self._last_status = ""  # the status that systemd was told last
        self._slept_time = SleptTime()

    # -- a life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop, or until there has been nothing to do for long enough."""
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
        """Have the back end built, then let requests through.

        The packages that this takes are imported only now, in a thread: the first client need not wait for them.
        """
        try:
            startup = await asyncio.to_thread(importlib.import_module, "vllmd.daemon.startup")
            back: BackEnd = await startup.back_end(self.front)
            collector.exempt_existing()
            self.front.open(back)
            self.side_task(self._remember_use())
            self.side_task(back.devices.run(lambda devices: startup.apply_devices(self.front, back, devices)))
            back.post(events.TimePassed())
        except Exception:  # a defect, and nothing can be served: the next start may fare better
            log.exception("vllmd cannot open")
            self.failed = True
            self.stop()

    async def _remember_use(self) -> None:
        """Load what keys have used before, so that limits per day and month go on from there."""
        today, before = await self.front.records.spent()
        for key, (tokens, device) in today.items():
            self.front.quotas.spent(key, tokens, device)
        for key, (tokens, device) in before.items():
            self.front.quotas.spent_this_month(key, tokens, device)

    async def shut_down(self) -> None:
        """Stop, each step bounded; engines under systemd are systemd's to stop, if it wants them stopped."""
        front = self.front
        self._notify.stopping(f"finishing {front.gate.requests} requests")
        last = not self._runtime.activated  # nobody comes after us whom clients could wait for
        front.listeners.drain(turn_away=last)
        if last:
            front.refuse_waiting()
        await self._drain(front.current.config.server.drain_timeout)
        front.refuse_waiting()
        front.listeners.refuse_unread(Unavailable(SHUTTING_DOWN, retry_after=5))
        back = front.back.now
        if back is not None:
            await self._stop_engines(back)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(back.note_idle(), NOTES_LIMIT)
            await back.keep_learnt()
        await front.listeners.close(limit=0.0 if self._second_signal.is_set() else ANSWERS_LIMIT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(front.records.close(), NOTES_LIMIT)
        if back is not None:
            await back.close()

    def stop(self) -> None:
        """Ask it to shut down; asked a second time it waits for nobody any more."""
        if self._stopping.is_set():
            log.warning("told to stop once more: breaking off what is under way")
            self._second_signal.set()
        self._stopping.set()

    # -- chores ----------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Do the periodic chores: once a second, or as often as the idle exit wants.

        At rest only as often as the watchdog wants, and when something happens.
        """
        looked = kept = -SAMPLE_INTERVAL
        bad: frozenset[tuple[str, str]] | None = None  # what is in error, as kept last
        while True:
            back = self.front.back.now
            seen = back.activity() if back else None
            # 1. systemd: the loop still turns; and the status that people read.
            self._notify.watchdog()
            if (status := self.status_line(seen)) != self._last_status:
                self._last_status = status
                self._notify.status(status)
            # 2. The idle exit.
            if self._may_exit(seen) and not self._stopping.is_set():  # a second time it would wait for nobody
                log.info("nothing is loaded and nobody is connected: exiting until the next connection")
                self.stop()
            if back and seen:
                # 3. A sleep of the machine, during which the clock by which everything is measured stood still.
                if seconds := self._slept_time.passed():
                    log.info("the machine has slept for %.0f s", seconds)
                    back.post(events.MachineSlept(seconds))
                # 4. Standbys: started when nothing starts and no request waits, given up where models need the memory.
                processes = back.engines.processes
                busy = any(process.ready_after is None or process.task for process in processes.values())
                busy = busy or any(view.waiting_for for view in seen.replicas)
                over = seen.host_promised + seen.host_standbys - seen.host_memory if seen.host_standbys else 0
                back.engines.standbys.review(busy=busy, running=processes, over=over)
                # 5. What a later daemon must know: failures at once, everything else with a sample now and then.
                if (news := failed(seen)) != bad:
                    if bad is not None:
                        self.side_task(back.keep_learnt())
                    bad = news
                now = time.monotonic()
                if now >= looked + self._look_interval(back, seen):
                    keep, looked = now >= kept + SAMPLE_INTERVAL, now
                    kept = now if keep else kept
                    self.side_task(self._sample(back, keep=keep))
            if back and seen and self._rests(back, seen):
                await self.front.changes.changed(self._longest_rest())
            else:
                await asyncio.sleep(self._tick_interval())

    def _tick_interval(self) -> float:
        idle_exit = self.front.current.config.server.idle_exit
        return STATUS_INTERVAL if idle_exit is None else min(STATUS_INTERVAL, max(idle_exit, SHORTEST_TICK))

    def _rests(self, back: BackEnd, seen: Snapshot) -> bool:
        """Whether nothing will be to do until somebody wants something, which changes what the core knows."""
        front = self.front
        in_use = front.listeners.connections or front.store.active or back.engines.standbys.in_use
        return not in_use and self._look_interval(back, seen) == math.inf

    def _longest_rest(self) -> float:
        """Seconds until the watchdog wants a sign of life, or the idle exit is due."""
        after, longest = self.front.current.config.server.idle_exit, self._notify.watchdog_interval or REST
        if after is None or not self._runtime.activated:
            return longest
        return min(longest, max(self._idle_exit.left(time.monotonic(), after), SHORTEST_TICK))

    async def _sample(self, back: BackEnd, *, keep: bool) -> None:
        """A side task: neither a stuck driver nor a stuck launcher may hold up the watchdog.

        ``keep``: what a later daemon must know is written down as well.
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
        """How often it matters what the devices hold: something waits for room, is loaded, or has not come back."""
        if any(view.waiting_for and view.state in (State.STOPPED, State.SLEEPING) for view in seen.replicas):
            return WAIT_INTERVAL
        wedged = any(device.wedged for device in seen.devices)
        in_use = back.memory.trouble or back.engines.processes or self.front.gate.requests or wedged
        return SAMPLE_INTERVAL if in_use else math.inf

    def status_line(self, seen: Snapshot | None) -> str:
        """What ``systemctl status vllmd`` shows."""
        current = self.front.current
        if current.broken:
            return f"configuration invalid, serving errors: {current.broken.splitlines()[0]}"
        off = (State.STOPPED, State.FAILED)
        states = [f"{each.id} {each.state.value}" for each in (seen.replicas if seen else ()) if each.state not in off]
        loaded, requests = ", ".join(states) or "none loaded", self.front.gate.requests
        return f"{len(current.config.models)} models configured; {loaded}; {requests} requests"

    def _may_exit(self, seen: Snapshot | None) -> bool:
        """Whether the idle exit is due: activated, nothing loaded or asked for, nobody connected, for long enough.

        A device that an operator has taken out of use is a reason to stay: nobody but us remembers it.
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

    # -- endings ---------------------------------------------------------------------------

    async def _drain(self, limit: float) -> None:
        """Let the requests that have begun come to their end, within ``limit`` seconds.

        A request counts from its first byte on. Clients whose connections are kept, and could not be told yet that
        they end, get the time to send what they are about to.
        """
        gate, listeners = self.front.gate, self.front.listeners
        began = quiet = connected = time.monotonic()
        told = -math.inf
        while (now := time.monotonic()) < began + limit and not self._second_signal.is_set():
            if gate.requests or listeners.busy:
                quiet = now
            if now - quiet >= QUIET or not (listeners.clients or gate.requests):
                break
            back = self.front.back.now
            connected = now if back and back.launcher.connected else connected
            if now - connected >= LAUNCHER_LIMIT:
                self.front.refuse_waiting()
            if now - told >= STATUS_INTERVAL:
                told = now
                self._notify.extend_timeout(10.0)
                self._notify.status(f"stopping: waiting for {gate.requests or listeners.busy} requests")
                self._notify.watchdog()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._second_signal.wait(), DRAIN_LOOK)

    async def _stop_engines(self, back: BackEnd) -> None:
        """Without systemd nobody else would: end every engine."""
        if self._runtime.launcher:
            return
        deadline, processes = time.monotonic() + STOP_ENGINES_LIMIT, back.engines.processes
        for name in list(processes):
            back.post(events.StopAsked(name, force=True))
        while processes and time.monotonic() < deadline and not self._second_signal.is_set():
            changed = asyncio.ensure_future(self.front.changes.changed(deadline - time.monotonic()))
            hurried = asyncio.ensure_future(self._second_signal.wait())
            await asyncio.sleep(0)  # both listen from here on; engines elsewhere have stopped by now, and say so once
            if processes:
                await asyncio.wait({changed, hurried}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            hurried.cancel()

    # -- signals and reload ----------------------------------------------------------------

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        ends_with_terminal = _terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as under nohup
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, ends_with_terminal)

    def _on_hangup(self, ends_with_terminal: bool) -> None:
        """Somebody wants a reload; or the terminal was closed that we run at."""
        if ends_with_terminal and not _terminal():
            self.stop()
        else:
            self.side_task(self._reload_logged())

    async def _reload_logged(self) -> None:
        with contextlib.suppress(ConfigError):
            await self.reload()

    async def reload(self) -> Reloaded:
        """Take a changed configuration; an invalid one changes nothing. Raises ConfigError."""
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
        task = asyncio.ensure_future(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)


def _terminal() -> bool:
    """Whether this process belongs to a terminal that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
