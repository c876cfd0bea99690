"""Following one model, all decisions, or an engine's log, for as long as the caller listens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from vllmd.api.answers import ErrorText, Progress
from vllmd.core.types import State
from vllmd.daemon.changes import Changes
from vllmd.daemon.current import Current, Later
from vllmd.daemon.status import Status, line_of
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
        """The progress of a load or another change, a line at each step, until the model has come to rest."""
        began, shown = time.monotonic(), ("", "", "")
        try:
            with self._changes.following():
                while True:
                    changed = self._changes.next_change  # before looking: what changes while the reader is busy counts
                    seen = self._status.status_input(model)
                    views = seen.snapshot.replicas_of(model) if seen.snapshot else ()
                    if not any(view.state in MOVING or view.waiting_for for view in views):
                        break
                    line = line_of(seen, model)
                    if (line.state, line.phase, line.detail) != shown:
                        shown = (line.state, line.phase, line.detail)
                        yield Progress(*shown, elapsed=time.monotonic() - began)
                    await changed.wait()
            line = self._status.line(model)
        except UnknownModel as error:  # a reload removed it meanwhile
            yield Progress("removed", done=True, error=ErrorText(error.message))
            return
        if line.state == State.FAILED.value:
            yield Progress(line.state, done=True, error=ErrorText(line.failure))
        else:
            yield Progress(line.state, done=True, seconds=time.monotonic() - began)

    async def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """An engine's last log lines, and with ``follow`` those that come; of one that has ended its last ones.

        Raises Unavailable where the model has had no engine.
        """
        back = await self._back.wait()
        engine = self._status.only(model)
        process = back.engines.processes.get(engine)
        if process is not None:
            async for text in back.engines.log_of(process, lines, follow=follow):
                yield text
            return
        config, runs = self._current.engines.get(engine), back.learnt.runs.get(engine)
        if config is None or not runs:
            raise Unavailable(f"{engine} has no engine now, and none is known that has ended")
        instance, at = runs[-1]
        for text in await back.engines.log_of_ended(config, instance, lines):
            yield text
        yield f"-- its engine ended at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} --"
