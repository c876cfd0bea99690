"""The event loop of the daemon: asyncio's own, less the turns and the look-ups that a request does not need.

The problem. A request is a task, and asyncio begins and resumes a task in a turn of its own: a handle, a queue, and a
system call that asks for events only to be told that nobody waits. A request through the daemon has two such turns, one
before its first step and one after its last byte; together they cost as much as 60 function calls.

So where a callback of the loop has just read what a task waits for, the task goes on within that callback: ``begin``
takes a new task's first step at once (what Python 3.12 calls an eager task), ``resume`` sets a future's result and has
the task that waits for it go on at once. Both are ordinary tasks before and afterwards: they have time limits, can be
cancelled and are found by ``asyncio.current_task``.

The rule. Tasks do not nest: within a task, and on another loop than this one, both do what asyncio does. So requests
that came together on a connection and are answered without a wait do not recurse either.

How: asyncio hands a task's steps to ``call_soon``, and this one carries out the next of them where it was told so.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple, cast

Ts = TypeVarTuple("Ts")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
MASKS = {select.EPOLLIN: READ, select.EPOLLOUT: WRITE}  # of what epoll says; a loss is told to whoever is interested
MOST_EVENTS = 256  # taken at a time; others are taken at the next


class Selector(selectors.EpollSelector):
    """The standard library's, whose ``select`` costs a third for each event."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """The keys that are ready, and for what, within ``timeout`` seconds; None: however long that takes."""
        wait = -1.0 if timeout is None else math.ceil(timeout * 1e3) * 1e-3 if timeout > 0 else 0.0
        try:
            found = self._selector.poll(wait, MOST_EVENTS)  # type: ignore[attr-defined]
        except InterruptedError:
            return []
        keys, masks = self._fd_to_key, MASKS  # type: ignore[attr-defined]
        return [(keys[fd], masks.get(event, READ | WRITE)) for fd, event in found if fd in keys]


class Loop(asyncio.SelectorEventLoop):
    """asyncio's, on which ``begin`` and ``resume`` need no turn of their own."""

    def __init__(self, selector: Selector | None = None) -> None:
        super().__init__(selector or Selector())
        self.at_once = False  # the next call is carried out where it is asked for

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Have it called in the next turn; the step of a task that goes on at once, now."""
        if self.at_once and context is not None:
            self.at_once = False
            return cast(asyncio.Handle, context.run(callback, *args))  # a task does not look at it
        return super().call_soon(callback, *args, context=context)


def begin(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task; its first step has been taken, if that can be, and it may be over."""
    if not isinstance(loop, Loop) or asyncio.current_task(loop) is not None:
        return loop.create_task(coroutine)
    loop.at_once = True
    try:
        return asyncio.Task(coroutine, loop=loop)
    finally:
        loop.at_once = False


def resume(future: asyncio.Future[None]) -> None:
    """Set the result; the task that waits for it has gone on when this returns, if that can be."""
    loop = future.get_loop()
    if not isinstance(loop, Loop) or asyncio.current_task(loop) is not None:
        future.set_result(None)
        return
    loop.at_once = True
    try:
        future.set_result(None)
    finally:
        loop.at_once = False
