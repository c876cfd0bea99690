"""Take a coroutine's first step at once, not in the next turn of the event loop.

Most requests wait for nothing until they are on their way to the engine, so they cross the daemon within the
very callback that read them. ``asyncio.Task`` can do this itself only since Python 3.12.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any

Step = Coroutine[Any, Any, None]


def begin(coroutine: Step) -> Step | None:
    """Run it up to where it waits, and return the rest, for a task; None if it came to its end.

    Raises what it raises. This part runs outside any task: ``asyncio.timeout`` and ``asyncio.current_task`` are not
    to be had before the first wait. The rest must be begun: a task that is cancelled before its own first step
    leaves the coroutine where it is.
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return _rest(_Begun(coroutine, waits_for))


async def _rest(begun: _Begun) -> None:
    await begun


class _Begun:
    """A coroutine that has taken its first step, and what it waits for."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Step, waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, None, None]:
        """The task waits in the coroutine's place; a cancelled wait is the coroutine's to handle."""
        waits_for = self._waits_for
        try:
            while True:
                try:
                    yield waits_for
                except BaseException as error:
                    waits_for = self._coroutine.throw(error)
                else:
                    waits_for = self._coroutine.send(None)
        except StopIteration:
            return
