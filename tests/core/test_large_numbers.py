"""Thousands of models and of waiting requests cost an event no more than ten do: calls are counted, not time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from tests.core.helpers import GPU, model
from tests.core.world import World
from vllmd.core.commands import StartEngine
from vllmd.core.events import EngineReady, ModelsChanged, RequestArrived, RequestFinished, RequestGone, TimePassed
from vllmd.core.scheduler import Scheduler
from vllmd.daemon.collector import paused
from vllmd.sizes import GiB


def calls(function: Callable[..., object], *arguments: object) -> int:
    """How many functions it calls, builtin ones and list comprehensions included.

    Not those that Python's cycle collector calls, whenever it comes: Hypothesis has one note how long that takes.
    """
    number = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    with paused():
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            function(*arguments)
        finally:
            sys.setprofile(before)
    return number


def test_a_request_that_waits_costs_the_same_however_many_do() -> None:
    """To arrive, to have its client told what the model is doing, and to leave."""
    s = Scheduler([model("m", queue_limit=10_000)], [GPU])
    s.handle(TimePassed(), 0.0)
    costs = []
    for number in range(1002):
        arrival, gone = RequestArrived(str(number), "m"), RequestGone(str(number // 2))
        if number in (10, 1001):
            costs.append((calls(s.handle, arrival, 0.0), calls(s.foremost, "m"), calls(s.handle, gone, 0.0)))
        else:
            s.handle(arrival, 0.0)
    assert costs[0] == costs[1]


def cost_of_a_request(models: int) -> tuple[int, ...]:
    """To begin, to end, to find the next moment that time changes, and to see what goes on."""
    w = World([model("m"), *(model(f"other-{number}") for number in range(models))], [GPU])
    s = w.scheduler
    w.load("m")
    w.ask("warm", "m")
    w.finish("warm")
    arrived = calls(s.handle, RequestArrived("counted", "m"), w.now)
    finished = calls(s.handle, RequestFinished("counted"), w.now)
    return arrived, finished, calls(s.next_timer), calls(s.activity, w.now)


def test_a_request_to_a_ready_model_costs_the_same_however_many_models_there_are() -> None:
    """Nothing looks at the other models."""
    assert cost_of_a_request(models=10) == cost_of_a_request(models=1000)


def test_a_reload_costs_seven_calls_for_a_model_that_stays_as_it_is_and_sixteen_for_one_at_rest_that_changes() -> None:
    """All of ten thousand may be changed by one line of ``defaults``; streams wait while the core takes that in."""

    def cost(before: int, after: int, number: int) -> int:
        names = [f"m{n}" for n in range(number)]
        s = Scheduler([model(name, before) for name in names], [GPU])
        s.handle(TimePassed(), 0.0)
        specs = tuple(model(name, after) for name in names) if after != before else tuple(s.specs.values())
        return calls(s.handle, ModelsChanged(specs, frozenset(names)), 1.0)

    assert cost(50, 50, 200) - cost(50, 50, 100) <= 100 * 7
    assert cost(50, 40, 200) - cost(50, 40, 100) <= 100 * 16


def test_what_a_reload_says_of_a_model_at_rest_holds_and_is_shown() -> None:
    """It was shown before: what was kept of that is drawn anew. A pin, a size and a preload count."""
    w = World([model("m", 30), model("n", 30)], [GPU])
    assert [view.pinned for view in w.scheduler.snapshot(w.now).models] == [False, False]
    w.do(ModelsChanged((model("m", 40, pinned=True), model("n", 20, preload=True)), frozenset({"m", "n"})))
    assert [view.pinned for view in w.scheduler.snapshot(w.now).models] == [True, False]
    started = [command.replica for command in w.do(TimePassed()) if isinstance(command, StartEngine)]
    assert started == ["n"]
    w.do(EngineReady("n"))
    w.ask("r", "m")
    assert w.scheduler.snapshot(w.now).models[0].devices == (0,)
    assert w.scheduler.snapshot(w.now).models[0].memory == 40 * GiB
