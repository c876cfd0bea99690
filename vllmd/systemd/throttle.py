"""Rates for log lines that other processes cause; what is left out is counted.

A client that is refused a thousand times a second, an engine or a neighbour on the
bus would otherwise fill the journal, and journald then drops whatever else this
service logs (10,000 lines in 30 s), the operators' audit records included.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

FIRST_PAUSE, LAST_PAUSE = 60.0, 3600.0  # seconds until a repeated text is logged again, doubling
BURST, PERIOD = 20, 60.0  # so many lines at once, and then one in each so many seconds divided by them


class Throttle:
    """One kind of line: at most ``burst`` at a time, and ``burst`` per ``period`` in the long run.

    The next line that is logged has the number of those left out; ``flush`` logs it when no more come.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        burst: int = BURST,
        period: float = PERIOD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.left_out = 0
        self._log, self._burst, self._period, self._clock = log, burst, period, clock
        self._tokens, self._at = float(burst), clock()
        self._level = logging.INFO
        self._last: tuple[str, tuple[object, ...]] = ("", ())

    def say(self, level: int, message: str, *values: object, fields: Mapping[str, object] | None = None) -> None:
        """Log the line, or count it. ``fields``: of the journal."""
        if not self._log.isEnabledFor(level):
            return
        now = self._clock()
        self._tokens = min(float(self._burst), self._tokens + (now - self._at) * self._burst / self._period)
        self._at = now
        if self._tokens < 1:
            self.left_out += 1
            self._level, self._last = level, (message, values)
            return
        self._tokens -= 1
        extra = {"journal": fields} if fields else None
        self.flush()
        self._log.log(level, message, *values, extra=extra, stacklevel=2)

    def flush(self) -> None:
        """Log how many lines were left out, if any."""
        count, self.left_out = self.left_out, 0
        if count:
            message, values = self._last
            self._log.log(self._level, "%d more lines were left out, the last: %s", count, message % values)


class Repeated:
    """A failure that comes again with each try: logged the first time, then counted and logged ever more seldom.

    Another text is logged at once. ``over`` ends it: the next failure is a first one.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._text, self._count = "", 0
        self._pause, self._due = FIRST_PAUSE, 0.0

    def say(self, level: int, message: str, *values: object, fields: Mapping[str, object] | None = None) -> None:
        """Log the line, or count it. ``fields``: of the journal."""
        text, now = message % values if values else message, self._clock()
        extra = {"journal": fields} if fields else None
        if text != self._text:
            self._text, self._count, self._pause, self._due = text, 0, FIRST_PAUSE, now + FIRST_PAUSE
            self._log.log(level, "%s", text, extra=extra, stacklevel=2)
            return
        self._count += 1
        if now >= self._due:
            self._log.log(level, "%s (%d times more)", text, self._count, extra=extra, stacklevel=2)
            self._count, self._pause = 0, min(2 * self._pause, LAST_PAUSE)
            self._due = now + self._pause

    def over(self) -> None:
        """Note that it works again: the next failure is logged as a first one."""
        self._text, self._count = "", 0
