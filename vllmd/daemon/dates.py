"""Dates of what was noted by the monotonic clock, as the wall clock was then.

Counted back from now they would be wrong by every second by which the wall clock was set since, and by every second of
a suspension, in which the monotonic clock stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLACK = 1.0  # seconds by which the clocks may part before that is noted
NOTED = 100  # times


class Dates:
    """What the wall clock was ahead of the core's, and since when.

    It is looked at whenever something that has a date happens (``note``). What an earlier daemon of this boot has noted
    with a date says what it was then (``learn``).
    """

    def __init__(self, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        now = clock()
        self._ahead = [(now, wall() - now)]  # since when, by how much; the last one last

    def note(self, at: float, now: float) -> float:
        """The date of something that has just happened, at ``at``. Both are by the core's clock."""
        date = at + self._wall() - now
        self.learn(at, date)
        return date

    def learn(self, at: float, date: float) -> None:
        """Take in what the wall clock said at a moment, also of long ago."""
        if abs(date - self.of(at)) > SLACK:
            self._ahead = sorted([*self._ahead, (at, date - at)])[-NOTED:]

    def of(self, at: float) -> float:
        """The date of something that was noted then."""
        return at + next((ahead for since, ahead in reversed(self._ahead) if since <= at), self._ahead[0][1])
