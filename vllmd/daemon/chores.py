"""The daemon's periodic chores: watchdog, idle exit, standbys, readings of the devices, notes for later daemons.

A daemon at rest does nothing at all: where no engine runs, no client is connected and nothing waits, the next chore is
done when the core's state changes, when the watchdog wants a sign of life, or when the idle exit is due.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

from vllmd.core import events
from vllmd.core.types import Snapshot, State
from vllmd.daemon.failures import failed
from vllmd.daemon.front_end import FrontEnd
from vllmd.daemon.idle_exit import IdleExit
from vllmd.daemon.suspension import SleptTime
from vllmd.daemon.tasks import Tasks
from vllmd.systemd.notify import Notifier

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd")

SAMPLE_INTERVAL = 5.0  # seconds between readings of the devices while an engine is loaded
WAIT_INTERVAL = 1.0  # the same while a model waits for room: other processes may leave the device at any moment
STATUS_INTERVAL, SHORTEST_TICK = 1.0, 0.05  # seconds
REST = 60.0  # seconds between ticks at rest, where no watchdog wants them sooner


class Chores:
    """What is due from time to time in a running daemon."""

    def __init__(
        self,
        front: FrontEnd,
        notify: Notifier,
        stopping: asyncio.Event,
        *,
        activated: bool,
        born: float,
        slept_time: SleptTime | None = None,
    ) -> None:
        """``stopping`` ends the daemon. ``activated``: by a socket, so that it may exit when idle."""
        self._front, self._notify, self._stopping, self._activated = front, notify, stopping, activated
        self._idle_exit = IdleExit(born)
        self._slept_time = slept_time or SleptTime()
        self._last_status = ""  # as systemd has it
        self._sampling = asyncio.Lock()
        self._tasks = Tasks()

    async def run(self) -> None:
        """Do what is due, for ever: once a second, or as often as the idle exit wants; at rest see the file's head."""
        looked = kept = -SAMPLE_INTERVAL
        bad: frozenset[tuple[str, str]] | None = None  # the models in error, as written down last
        while True:
            back = self._front.back.now
            seen = back.activity() if back else None
            # 1. systemd: the loop still turns; and the status that people read.
            self._notify.watchdog()
            if (status := self._status_line(seen)) != self._last_status:
                self._last_status = status
                self._notify.status(status)
            # 2. The idle exit; chores go on during a shutdown.
            if self.may_exit(seen) and not self._stopping.is_set():
                log.info("nothing is loaded and nobody is connected: exiting until the next connection")
                self._stopping.set()
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
                        self._tasks.spawn(back.keep_learnt())
                    bad = bad_now
                now = time.monotonic()
                if now >= looked + self._look_interval(back, seen):
                    keep, looked = now >= kept + SAMPLE_INTERVAL, now
                    kept = now if keep else kept
                    self._tasks.spawn(self._sample(back, keep=keep))
            await self._pause(back, seen)

    async def _pause(self, back: BackEnd | None, seen: Snapshot | None) -> None:
        """Wait until the next tick is due: in a second, or, at rest, when something changes or the idle exit is due."""
        idle_exit = self._front.current.config.server.idle_exit
        if back and seen and self._is_at_rest(back, seen):
            seconds = self._notify.watchdog_interval or REST
            if idle_exit is not None and self._activated:
                seconds = min(seconds, max(self._idle_exit.left(time.monotonic(), idle_exit), SHORTEST_TICK))
            await self._front.changes.changed(seconds)
        else:
            seconds = STATUS_INTERVAL if idle_exit is None else max(idle_exit, SHORTEST_TICK)
            await asyncio.sleep(min(STATUS_INTERVAL, seconds))

    def _is_at_rest(self, back: BackEnd, seen: Snapshot) -> bool:
        """Whether nothing is to be done until a client or an operator comes, which changes the core's state."""
        front = self._front
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
            self._front.records.look(back.activity(), self._front.gate.running())
            if keep:
                back.dispatcher.flush_log()
                await back.note_idle()
                await back.keep_learnt()

    def _look_interval(self, back: BackEnd, seen: Snapshot) -> float:
        """Seconds between readings of the devices; infinite where nothing is loaded, waits for room, or is amiss."""
        if any(view.waiting_for and view.state in (State.STOPPED, State.SLEEPING) for view in seen.replicas):
            return WAIT_INTERVAL
        wedged = any(device.wedged for device in seen.devices)
        in_use = back.readings.is_due or back.engines.processes or self._front.gate.requests or wedged
        return SAMPLE_INTERVAL if in_use else math.inf

    def _status_line(self, seen: Snapshot | None) -> str:
        """The line that ``systemctl status vllmd`` shows."""
        current = self._front.current
        if current.broken:
            return f"configuration invalid, serving errors: {current.broken.splitlines()[0]}"
        off = (State.STOPPED, State.FAILED)
        states = [f"{each.id} {each.state.value}" for each in (seen.replicas if seen else ()) if each.state not in off]
        loaded, requests = ", ".join(states) or "none loaded", self._front.gate.requests
        return f"{len(current.config.models)} models configured; {loaded}; {requests} requests"

    def may_exit(self, seen: Snapshot | None) -> bool:
        """Whether the idle exit is due: socket-activated, nothing loaded or waiting, no client, for long enough.

        A drained device, there or not, and a model that is pinned or leased by order, loaded or not, are reasons to
        stay: only this daemon remembers that.
        """
        front, back = self._front, self._front.back.now
        busy = bool(
            not self._activated
            or back is None
            or back.engines.processes
            or front.gate.requests
            or front.store.active
            or front.listeners.connections
            or any(view.waiting_for for view in (seen.replicas if seen else ()))
            or back.dispatcher.scheduler.holds_orders
        )
        after, accepted = front.current.config.server.idle_exit, front.listeners.accepted
        return self._idle_exit.due(time.monotonic(), after, busy=busy, accepted=accepted)
