"""Failures on demand: one table of names, and where they are looked up.

A failure is given as ``--fail NAME[=VALUE]`` (repeatable), or as a line of the
file named by ``--fail-file``, which is read anew each time it matters, so that
a test or a rehearsal can switch failures on and off under a running engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kind:
    """``default`` is the value when none is given; None means that it takes no value."""

    meaning: str
    default: float | None = None


FAILURES = {
    "never-ready": Kind("loads for ever: never listens"),
    "exit-at-start": Kind("exits in the middle of the load, with this status", 1),
    "oom-at-start": Kind("exits at start as vLLM does when the device's memory does not suffice"),
    "crash-mid-stream": Kind("dies after the third token of an answer, with this status (0: as vLLM does)", 0),
    "crash-after": Kind("dies once it has answered so many requests", 1),
    "error-mid-stream": Kind("sends an error event after the third token of a stream, then [DONE]"),
    "stall-mid-stream": Kind("stops sending after the third token of an answer, for ever"),
    "ignore-sigterm": Kind("ignores SIGTERM"),
    "slow-exit": Kind("takes so many seconds to exit after SIGTERM", 5),
    "fork-grandchildren": Kind("leaves so many double-forked setsid processes that ignore SIGTERM", 2),
    "sleep-500": Kind("frees the memory but answers 500 to /sleep, its state not recorded (vLLM's hazard)"),
    "sleep-keeps-memory": Kind("answers 200 to /sleep and frees nothing"),
    "sleep-hang": Kind("never answers /sleep"),
    "wake-500": Kind("answers 500 to /wake_up and stays asleep"),
    "wake-hang": Kind("never answers /wake_up"),
    "slow-headers": Kind("waits so many seconds before the first byte of an answer", 5),
    "hang": Kind("accepts requests and never answers them; /health still does"),
    "hang-health": Kind("never answers /health"),
    "dead": Kind("answers 503 to /health and 500 to requests, as vLLM does when its core died"),
}


class Failures:
    """The failures in force now."""

    def __init__(self, given: tuple[str, ...] = (), file: str = "") -> None:
        self._given = dict(parse(text) for text in given)
        self._file = Path(file) if file else None

    def get(self, name: str) -> float | None:
        """The failure's value, or None if it is not in force. A failure without a value has the value 1."""
        return self._now().get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._now()

    def _now(self) -> dict[str, float]:
        if self._file is None:
            return self._given
        try:
            lines = self._file.read_text().split()
        except FileNotFoundError:
            return self._given
        return self._given | dict(parse(line) for line in lines)


def parse(text: str) -> tuple[str, float]:
    """``NAME`` or ``NAME=VALUE``. Raises ValueError naming what is accepted."""
    name, equals, value = text.partition("=")
    if name not in FAILURES:
        raise ValueError(f"unknown failure {name!r}; known: {', '.join(FAILURES)}")
    default = FAILURES[name].default
    if not equals:
        return name, 1.0 if default is None else float(default)
    if default is None:
        raise ValueError(f"failure {name!r} takes no value")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"failure {name!r} takes a number, not {value!r}") from None
