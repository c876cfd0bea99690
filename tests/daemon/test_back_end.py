"""What the gate asks of the back end for each request that waits, which must cost next to nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.core.helpers import GPU, model
from vllmd.core import events
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Snapshot
from vllmd.daemon.back_end import BackEnd
from vllmd.daemon.dispatcher import Dispatcher
from vllmd.engines.base import Progress


def test_a_waiting_clients_progress_is_told_without_looking_at_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred streams that wait ask every few seconds; a snapshot of a hundred models took 4 ms each time."""

    def snapshot(self: Scheduler, now: float) -> Snapshot:
        raise AssertionError("everything was looked at")

    monkeypatch.setattr(Scheduler, "snapshot", snapshot)

    async def play() -> None:
        scheduler = Scheduler([model("m"), model("idle")], [GPU])
        dispatcher = Dispatcher(scheduler, {})
        process = SimpleNamespace(phase=Progress("weights"), phase_text="weights")
        engines: Any = SimpleNamespace(processes={})
        nothing: Any = None
        back = BackEnd("", nothing, dispatcher, engines, nothing, nothing, nothing, nothing)
        assert back.phase_of("m") == ""
        back.post(events.LoadAsked("m"))
        assert back.phase_of("m") == "starting"
        engines.processes["m"] = process
        assert back.phase_of("m") == "weights"
        back.post(events.EngineReady("m", None))
        assert (back.phase_of("m"), back.phase_of("idle"), back.phase_of("no such model")) == ("", "", "")
        dispatcher.close()

    asyncio.run(play())
