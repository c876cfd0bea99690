"""How an engine's end is told: what happened, the error that led to it, its last words, what would help."""

from __future__ import annotations

import signal

from vllmd.engines.base import Failure
from vllmd.launcher.client import ExitReport

MOST_PLACES = 10
REASON_LINES = 12  # of the log in a failure's reason


def how_it_ended(report: ExitReport | None) -> str:
    """``exited with status 1``, ``was killed by SIGKILL``, ..."""
    if report is None or (report.status is None and report.signal is None):
        return "the engine is gone (exit status unknown)"
    why = ", for lack of host memory" if report.oom else ""
    if report.signal is not None:
        return f"the engine was killed by {_signal_name(report.signal)}{why}"
    return f"the engine exited with status {report.status}{why}"


def _signal_name(number: int) -> str:
    """``SIGKILL``; a number where Python has no name (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def with_root(what: str, failure: Failure) -> str:
    """``what``, and the error in the log that led to it; it may be far above the last lines."""
    return "; ".join(part for part in (f"{what}: {failure.reason}", failure.hint) if part)


def with_last_lines(what: str, lines: list[str]) -> str:
    """``what``, and the engine's last words below it."""
    if not lines:
        return f"{what}; it logged nothing"
    return "\n".join([f"{what}; its last log lines:", *lines[-REASON_LINES:]])


def places(broken: str) -> str:
    """The files and lines at which a configuration is wrong, of the message that says what is."""
    found = list(dict.fromkeys(line.partition(": ")[0] for line in broken.splitlines()))
    return ", ".join(found[:MOST_PLACES]) + (f" and {len(found) - MOST_PLACES} more" if found[MOST_PLACES:] else "")


def with_hint(what: str, hint: str) -> str:
    """``what``, and below it what would help."""
    return f"{what}\n{hint}" if hint else what
