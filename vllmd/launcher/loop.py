"""The launcher's one thread: descriptors and timers that call back, in turn."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)
Callback = Callable[[], None]


@dataclass(order=True, slots=True)
class Timer:
    """A call to come. ``cancel`` may be called at any time, also afterwards."""

    at: float
    number: int
    callback: Callback | None = field(compare=False)

    def cancel(self) -> None:
        """Drop the callback: it is not called any more."""
        self.callback = None


class Loop:
    """A selector and a heap of timers. A callback that raises is logged; it never ends the loop."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._stopped = False

    def watch(self, fd: int, readable: Callback) -> None:
        """Call ``readable`` whenever there is something to read (or the end of it)."""
        self._selector.register(fd, selectors.EVENT_READ, {selectors.EVENT_READ: readable})

    def watch_write(self, fd: int, writable: Callback | None) -> None:
        """Call ``writable`` too, on a descriptor that is watched already; None: no more."""
        callbacks = dict(self._selector.get_key(fd).data)
        callbacks.pop(selectors.EVENT_WRITE, None)
        if writable:
            callbacks[selectors.EVENT_WRITE] = writable
        self._selector.modify(fd, sum(callbacks), callbacks)

    def unwatch(self, fd: int) -> None:
        """End the calls for a descriptor; harmless if it is not watched."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def later(self, seconds: float, callback: Callback) -> Timer:
        """Call ``callback`` once, after so many seconds."""
        timer = Timer(time.monotonic() + seconds, next(self._numbers), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def on_signals(self, callbacks: dict[int, Callback]) -> None:
        """Call these for the process's signals; several signals of one number may be told as one."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in callbacks:
            signal.signal(number, lambda *_: None)

        def deliver() -> None:
            for number in set(os.read(reader, 4096)):
                callbacks.get(number, lambda: None)()

        self.watch(reader, deliver)

    def stop(self) -> None:
        """Leave ``run`` after the present callback."""
        self._stopped = True

    def run(self) -> None:
        """Call back for descriptors and timers until ``stop`` is called."""
        while not self._stopped:
            for key, mask in self._selector.select(self._seconds_to_next_timer()):
                for event, callback in tuple(key.data.items()):
                    now = self._selector.get_map().get(key.fd)
                    # A callback before this one may have unwatched it, or have given it to somebody else.
                    if mask & event and now is not None and now.data is key.data:
                        _call(callback)
            self._run_due_timers()

    def _seconds_to_next_timer(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].at - time.monotonic()) if self._timers else None

    def _run_due_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].at <= now:
            callback = heapq.heappop(self._timers).callback
            if callback:
                _call(callback)


def _call(callback: Callable[[], Any]) -> None:
    try:
        callback()
    except Exception:
        log.exception("a callback of the launcher failed")
