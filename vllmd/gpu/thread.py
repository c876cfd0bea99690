"""Calls that may never return, in threads that the interpreter does not wait for.

``asyncio.to_thread`` borrows from the loop's executor, whose threads are joined
when the loop closes: one call stuck in a wedged driver would keep the daemon
from ever exiting. These threads are daemonic and are left behind instead.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def answer_within(seconds: float, function: Callable[[], T]) -> T | None:
    """What ``function`` returns, None if it has not returned by then: a driver that hangs cannot be interrupted.

    Its thread is left behind.
    """
    answers: list[T] = []
    thread = threading.Thread(target=lambda: answers.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def in_thread(function: Callable[[], T], name: str = "gpu") -> asyncio.Future[T]:
    """Call ``function`` in a thread of its own; its result or exception comes by the future, if it ever does.

    A future that was cancelled, or whose loop is closed, drops what comes.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:  # whatever it is, it belongs to whoever waits
            error = raised
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
