"""The launcher's event loop, of one thread: callbacks for descriptors, timers and signals.

Not asyncio's, whose import alone takes 6.6 MiB of resident memory (Python 3.11, measured) in a process that stays as
long as any engine runs, and needs no more than these hundred lines.
"""

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
    """A future call. ``cancel`` may be called at any time, also after it."""

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
        """Call ``readable`` whenever ``fd`` has data to read, or has ended."""
        self._selector.register(fd, selectors.EVENT_READ, {selectors.EVENT_READ: readable})

    def watch_write(self, fd: int, writable: Callback | None) -> None:
        """Also call ``writable`` for a descriptor that is watched already; None: stop that."""
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
        """Call these for the process's signals; several signals of one number may be one call."""
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
                    # An earlier callback may have unwatched the descriptor, or closed it and opened another one.
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
