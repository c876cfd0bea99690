"""Suspension of the machine: engines leave the GPUs before it, and pinned and leased models are loaded again after it.

A GPU loses its memory in a suspension, unless its driver is told to keep all of it on disk: an engine that lived
through one answers wrongly afterwards, or hangs. So every engine on a device leaves it: requests get ``GRACE`` seconds
to end, then they are cut; and no engine is put there until the machine is awake. ``vllmd-sleep.service`` calls this, by
``vllmctl suspend`` and ``resume``.

The monotonic clock stands still meanwhile (``boot_clock.py``), so what the daemon waits for or measures is not late.
But leases and idle times count on: ``SleptTime`` finds out by how much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllmd.api.answers import Suspended
from vllmd.core import events
from vllmd.core.types import ReplicaView, State

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

WHY = "the machine is about to sleep"
GRACE = 5.0  # seconds that running requests get
LIMIT = 30.0  # seconds after which the machine sleeps, whatever is left
LOOK = 0.05
GONE = (State.STOPPED, State.FAILED)
LEAST = 1.0  # seconds of sleep that are worth a word: clocks are read one after the other


class Suspension:
    """Remembers which devices it drained, and which models it loads again because no request would."""

    def __init__(self) -> None:
        self._devices: set[int] = set()
        self._loaded: list[str] = []

    async def begin(self, back: BackEnd) -> Suspended:
        """Have the devices left, within ``LIMIT``; a second call changes nothing."""
        seen = back.activity()
        mine = [view.index for view in seen.devices if not view.drained]
        on_devices = [view for view in seen.replicas if view.devices and view.state not in GONE]
        self._devices.update(mine)
        self._loaded += [view.id for view in on_devices if view.pinned or view.leases]
        for index in mine:
            back.perform(events.DeviceDrained(index, True, WHY))
        await self._empty(back, GRACE)
        for view in self._left(back):
            back.perform(events.StopAsked(view.id, True))
        await self._empty(back, LIMIT - GRACE)
        left = tuple(view.id for view in self._left(back))
        gone = tuple(view.id for view in on_devices if view.id not in left)
        return Suspended(tuple(sorted(self._devices)), gone, left)

    async def end(self, back: BackEnd) -> Suspended:
        """Give the devices back; what was pinned or leased there is loaded again."""
        devices, loaded = sorted(self._devices), list(dict.fromkeys(self._loaded))
        self._devices, self._loaded = set(), []
        for index in devices:
            back.perform(events.DeviceDrained(index, False, "the machine is awake"))
        for replica in loaded:
            back.perform(events.LoadAsked(replica))
        return Suspended(tuple(devices))

    def _left(self, back: BackEnd) -> list[ReplicaView]:
        return [view for view in back.activity().replicas if view.devices and view.state not in GONE]

    async def _empty(self, back: BackEnd, seconds: float) -> None:
        """Wait until nothing is on a device any more, and no longer than so many seconds."""
        for _ in range(round(seconds / LOOK)):
            if not self._left(back):
                return
            await asyncio.sleep(LOOK)


class SleptTime:
    """How long the machine was suspended: CLOCK_BOOTTIME goes on then, CLOCK_MONOTONIC does not."""

    def __init__(self, clock: Callable[[int], float] = time.clock_gettime) -> None:
        self._clock = clock
        self._before = self._boottime_offset()

    def _boottime_offset(self) -> float:
        return self._clock(time.CLOCK_BOOTTIME) - self._clock(time.CLOCK_MONOTONIC)

    def passed(self) -> float:
        """Seconds of suspension since the last call; 0.0 for none."""
        ahead = self._boottime_offset()
        slept, self._before = ahead - self._before, ahead
        return slept if slept >= LEAST else 0.0
