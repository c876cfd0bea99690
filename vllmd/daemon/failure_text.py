"""The text of an engine's end: what happened, the error that led to it, the last log lines, what would help."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllmd.engines.base import Failure
    from vllmd.launcher.client import ExitReport

MOST_PLACES = 10
REASON_LINES = 12  # of the log in a failure's reason
INSTALL_OR_NAME = "; install it, or give the full path as `command`"  # the launcher, of any program
AROUND = 3  # lines shown before and after the root error, where that is not among the last
_DIRECTORIES = r"(?<![\w.:/])/(?:[\w.@+~-]+/)+(?=[\w.@+~-])"  # of an absolute path; not of a URL
_ERROR = r"(?i)error|exception|fatal|fail|abort|assert|panick|segmentation|out of memory|died"
_LEAKS = r"nanobind: | - (?:leaked |\.\.\. skipped)|See https://nanobind\."  # which Triton has at every exit
_SERVED = r'"(?:GET|POST|PUT|DELETE) [^"]* HTTP/'  # a request that was answered, perhaps with an error


def how_it_ended(report: ExitReport | None, what: str = "the engine") -> str:
    """``the engine exited with status 1``, ``the engine was killed by SIGKILL``, ..."""
    if report is None or (report.status is None and report.signal is None):
        return f"{what} is gone (exit status unknown)"
    why = ", for lack of host memory" if report.oom else ""
    if report.signal is not None:
        return f"{what} was killed by {_signal_name(report.signal)}{why}"
    return f"{what} exited with status {report.status}{why}"


def _signal_name(number: int) -> str:
    """``SIGKILL``; a number where Python has no name (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def without_leaks(lines: Iterable[str]) -> list[str]:
    """``lines`` without those, a hundred at the end of a vLLM, that hide why it ended."""
    return [line for line in lines if not re.match(_LEAKS, line)]


def tells_error(line: str) -> bool:
    """Whether a line of an engine's log may be why it ended: many lines are not, and some engines do not say."""
    return re.search(_ERROR, line) is not None and re.search(_SERVED, line) is None


def with_root(what: str, failure: Failure) -> str:
    """``what``, and the error in the log that led to it, which may be far above the last lines."""
    return "; ".join(part for part in (f"{what}: {failure.reason}", failure.hint) if part)


def with_last_lines(what: str, lines: Sequence[str], root: str = "") -> str:
    """``what``, and the last log lines below it; also those around ``root``, if that is further above."""
    if not lines:
        return f"{what}; it logged nothing"
    last = list(lines[-REASON_LINES:])
    at = next((index for index in reversed(range(len(lines))) if root and root in lines[index]), -1)
    if 0 <= at < len(lines) - REASON_LINES:
        return "\n".join([
            f"{what}; its log around that, and its last lines:",
            *lines[max(0, at - AROUND) : min(at + AROUND + 1, len(lines) - REASON_LINES)],
            "[...]",
            *last,
        ])  # fmt: skip
    return "\n".join([f"{what.removesuffix('.')}; its last log lines:", *last])


def for_clients(reason: str) -> str:
    """The part for clients of the model API: the cause in one line, without the log and the machine's folders.

    Operators read all of it in ``vllmctl why``.
    """
    first = reason.partition("\n")[0].removesuffix("; its last log lines:")
    first = first.removesuffix("; its log around that, and its last lines:")
    return re.sub(_DIRECTORIES, "\N{HORIZONTAL ELLIPSIS}/", first)


def places(broken: str) -> str:
    """The files and lines at which a configuration is wrong, of the message that says what is."""
    lines = list(dict.fromkeys(line.partition(": ")[0] for line in broken.splitlines()))
    return ", ".join(lines[:MOST_PLACES]) + (f" and {len(lines) - MOST_PLACES} more" if lines[MOST_PLACES:] else "")


def with_hint(what: str, hint: str) -> str:
    """``what``, and what would help: the engine kind's own advice, where it has any."""
    return f"{what.removesuffix(INSTALL_OR_NAME)}; {hint}" if hint else what
