"""Following one model, all decisions, or an engine's log, for as long as the caller listens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from vllmd.api.answers import ErrorText, ModelLine, Progress
from vllmd.core.types import State
from vllmd.daemon.changes import Changes
from vllmd.daemon.current import Current, Later
from vllmd.daemon.status import Status, StatusInput, line_of
from vllmd.errors import Unavailable, UnknownModel

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

MOVING = frozenset({State.STARTING, State.WAKING, State.DRAINING, State.FALLING_ASLEEP, State.STOPPING})


class Following:
    """Implements ``vllmd.admin.control.Following``."""

    def __init__(self, current: Current, status: Status, changes: Changes, back: Later[BackEnd]) -> None:
        self.watch = changes.watch
        self._current = current
        self._status = status
        self._changes = changes
        self._back = back

    async def progress(self, model: str) -> AsyncIterator[Progress]:
        """How it comes along, until it has come to rest."""
        began = time.monotonic()
        try:
            async for step in self._steps(model, began):
                yield step
            yield _at_rest(self._status.line(model), time.monotonic() - began)
        except UnknownModel as error:  # a reload removed it meanwhile
            yield Progress("removed", done=True, error=ErrorText(error.message))

    async def _steps(self, model: str, began: float) -> AsyncIterator[Progress]:
        shown = ("", "", "")
        with self._changes.following():
            while True:
                changed = self._changes.next_change  # before looking: what changes while the reader is busy counts
                seen = self._status.status_input(model)
                if not _moves(seen, model):
                    return
                line = line_of(seen, model)
                if (line.state, line.phase, line.detail) != shown:
                    shown = (line.state, line.phase, line.detail)
                    yield Progress(*shown, elapsed=time.monotonic() - began)
                await changed.wait()

    async def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and what comes; of one that has ended its last ones."""
        back = await self._back.wait()
        engine = self._status.only(model)
        process = back.engines.processes.get(engine)
        if process is None:
            for text in await self._ended_log(back, engine, lines):
                yield text
            return
        async for text in back.engines.log_of(process, lines, follow=follow):
            yield text

    async def _ended_log(self, back: BackEnd, engine: str, lines: int) -> list[str]:
        """What its last engine wrote at last. Raises Unavailable."""
        config, runs = self._current.engines.get(engine), back.learnt.runs.get(engine)
        if config is None or not runs:
            raise Unavailable(f"{engine} has no engine now, and none is known that has ended")
        instance, at = runs[-1]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        return [*await back.engines.log_of_ended(config, instance, lines), f"-- its engine ended at {when} --"]


def _moves(seen: StatusInput, model: str) -> bool:
    """Whether it is on its way somewhere, or about to be."""
    views = seen.snapshot.replicas_of(model) if seen.snapshot else ()
    return any(view.state in MOVING or view.waiting_for for view in views)


def _at_rest(line: ModelLine, elapsed: float) -> Progress:
    """The last line of a progress."""
    if line.state == State.FAILED.value:
        return Progress(line.state, done=True, error=ErrorText(line.failure))
    return Progress(line.state, done=True, seconds=elapsed)
