"""Take a coroutine's first step at once, not in the next turn of the event loop.

Most requests wait for nothing until they are on their way to the engine, so they cross the daemon within the
very callback that read them. ``asyncio.Task`` can do this itself only since Python 3.12.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Begun(Generic[T]):
    """A coroutine that has run up to where it waits; await it for the rest, in a task. Raises what it raises.

    The first part may run outside any task: ``asyncio.timeout`` and ``asyncio.current_task`` are not to be had
    before the first wait. Whoever begins must go on: cancelled before that, the coroutine stays where it is.
    """

    __slots__ = ("_coroutine", "_value", "_waits_for", "over")

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self.over = False  # it waited for nothing and is through
        try:
            self._waits_for = coroutine.send(None)
        except StopIteration as end:
            self.over, self._value = True, end.value

    def __await__(self) -> Generator[Any, None, T]:
        """The task waits in the coroutine's place; a cancelled wait is the coroutine's to handle."""
        if self.over:
            return self._value  # type: ignore[no-any-return]
        waits_for = self._waits_for
        try:
            while True:
                try:
                    yield waits_for
                except BaseException as error:
                    waits_for = self._coroutine.throw(error)
                else:
                    waits_for = self._coroutine.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def rest(self) -> T:
        """The rest as a coroutine, for a task."""
        return await self
