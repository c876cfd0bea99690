"""sd_notify: the service's messages to its manager; dropped where there is none."""

from __future__ import annotations

import os
import time

import sdnotify


class Notifier:
    """Thin over ``sdnotify``; every call is one datagram and returns at once.

    Make one per process, early: it remembers ``$NOTIFY_SOCKET`` and the watchdog's
    interval and removes both from the environment, so that no child sends in its place.
    """

    def __init__(self) -> None:
        self.enabled = "NOTIFY_SOCKET" in os.environ
        self._notifier = sdnotify.SystemdNotifier()
        if self._notifier.socket is not None:
            # PID 1 may be stopped, or busy for long: what does not fit its queue is lost, for nothing here may wait.
            self._notifier.socket.setblocking(False)
        self.watchdog_interval = _watchdog_interval()
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)

    def ready(self, status: str = "") -> None:
        """Tell that the start, or a reload, is finished."""
        self._send("READY=1", f"STATUS={_line(status)}" if status else "")

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._send(f"STATUS={_line(text)}")

    def stopping(self, status: str = "") -> None:
        """Tell that the service has begun to shut down."""
        self._send("STOPPING=1", f"STATUS={_line(status)}" if status else "")

    def reloading(self) -> None:
        """Tell that a reload has begun; ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def watchdog(self) -> None:
        """Give a sign of life; due at least every ``watchdog_interval`` seconds."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for this much more time to start or stop, counted from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *assignments: str) -> None:
        self._notifier.notify("\n".join(line for line in assignments if line))


def _line(text: str) -> str:
    """The text in one line: a newline in it would begin another assignment."""
    return " ".join(text.split())


def _watchdog_interval() -> float | None:
    """Seconds between signs of life: half of the limit, as sd_watchdog_enabled(3) advises; None for no watchdog."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(limit) / 2_000_000 if limit.isdecimal() and int(limit) and for_us else None
