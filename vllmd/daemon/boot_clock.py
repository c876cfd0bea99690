"""Moments that one daemon notes beside an engine and the next one reads: when it started, since when it is idle.

They are by the monotonic clock. It is the same for all processes of one boot, which no engine outlives, and nobody sets
it: noted by the wall clock, an engine would have been idle for hours once somebody had put that forward. It stands
still while the machine is suspended, as every other limit of the daemon's does. What people are shown as a date is
noted in Unix time beside it (``dated``), and nothing is reckoned with that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

SUFFIX = "_monotonic"


def moments(**seconds_ago: float) -> dict[str, str]:
    """Notes that each of these was so many seconds ago."""
    now = time.monotonic()
    return {f"{what}{SUFFIX}": f"{now - ago:.1f}" for what, ago in seconds_ago.items()}


def dated(*whats: str) -> dict[str, str]:
    """Notes that each of these is now, with the date."""
    return moments(**dict.fromkeys(whats, 0.0)) | dict.fromkeys(whats, f"{time.time():.1f}")


def date_of(noted: Mapping[str, str], what: str) -> tuple[float, float] | None:
    """When what was noted as ``what`` was, by the monotonic clock and in Unix time; None where no date was noted."""
    try:
        return float(noted[f"{what}{SUFFIX}"]), float(noted[what])
    except (KeyError, ValueError):
        return None


def seconds_since(noted: Mapping[str, str], what: str) -> float:
    """Seconds since the moment that was noted as ``what``; 0.0 where none was.

    Versions up to 0.1.0 noted Unix time.
    """
    for name, now in ((f"{what}{SUFFIX}", time.monotonic()), (what, time.time())):
        try:
            return max(0.0, now - float(noted[name]))
        except (KeyError, ValueError):
            continue
    return 0.0
