"""Watts and joules, per device and per engine, over time; and what engines draw while no request runs in them.

A device tells what it draws, not for whom. Its draw is shared out among the engines that hold memory there, by how much
each holds: exact where one has the device, a convention where several do. What nobody of ours holds is nobody's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from vllmd.gpu import Sample

LONGEST = 30.0  # seconds between readings beyond which it is unknown what was drawn
NOBODY: Mapping[str, float] = {}


class Power:
    """Fed with each reading. ``watts`` as of the last one, ``joules`` since the daemon's start.

    ``unused_joules``: those of them that engines drew while no request ran in them. ``since_used``: joules of each
    engine since its last request ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: float | None = None
        self.watts: dict[str, float] = {}
        self.joules: defaultdict[str, float] = defaultdict(float)
        self.unused_joules: defaultdict[str, float] = defaultdict(float)
        self.since_used: dict[str, float] = {}
        self.device_joules: defaultdict[int, float] = defaultdict(float)

    def note(self, sample: Sample, held: Mapping[tuple[str, int], int], idle: Mapping[str, float] = NOBODY) -> None:
        """A reading, the bytes that each engine holds on each device, and the seconds that each has been unused."""
        now, before = self._clock(), self._at
        passed = 0.0 if before is None else now - before
        passed = passed if passed <= LONGEST else 0.0
        self._at, self.watts = now, {}
        for index, device in sample.devices.items():
            if device.power is None:
                continue
            self.device_joules[index] += device.power * passed
            here = {name: size for (name, at), size in held.items() if at == index and size > 0}
            for name, size in here.items():
                share = device.power * size / sum(here.values())
                self.watts[name] = self.watts.get(name, 0.0) + share
                self.joules[name] += share * passed
        self._note_unused(idle, passed)

    def _note_unused(self, idle: Mapping[str, float], passed: float) -> None:
        """Add up what unused engines drew.

        One that was used since the last reading counts from its last request's end.
        """
        drawn = {name: self.watts.get(name, 0.0) * min(passed, seconds) for name, seconds in idle.items()}
        for name, joules in drawn.items():
            self.unused_joules[name] += joules
        self.since_used = {
            name: joules + (self.since_used.get(name, 0.0) if idle[name] >= passed else 0.0)
            for name, joules in drawn.items()
        }
