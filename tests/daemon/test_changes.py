"""What becomes of engines, as it is counted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from vllmd.admin.counters import Counters
from vllmd.core import events
from vllmd.daemon.changes import Changes
from vllmd.daemon.learnt import Learnt


def test_a_crash_is_counted_as_a_failure_and_a_stop_is_not() -> None:
    """Who is woken at night by ``vllmd_model_failures`` relies on it."""
    counters, gone, posted = Counters(), list[str](), list[events.Event]()

    async def play() -> None:
        current: Any = SimpleNamespace(model_of=lambda engine: engine)
        scheduler = SimpleNamespace(replicas_of=lambda name, now: [], seen=lambda name, now: None)
        dispatcher: Any = SimpleNamespace(scheduler=scheduler, now=lambda: 0.0, post=posted.append)
        changes = Changes(current, counters, Learnt(None), gone.append)
        for event in (events.EngineExited("m", "signal 11"), events.EngineStopped("m")):
            changes.engine_event(event, dispatcher)

    asyncio.run(play())
    assert dict(counters.failures) == {("m", "exit"): 1}
    assert list(counters.changes) == [("m", "stop")]
    assert (gone, len(posted)) == (["m", "m"], 2)
