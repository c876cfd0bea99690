"""Thousands of models and of waiting requests cost an event no more than ten do: calls are counted, not time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from tests.core.helpers import GPU, model
from tests.core.world import World
from vllmd.core.events import RequestArrived, RequestFinished, RequestGone, TimePassed
from vllmd.core.scheduler import Scheduler


def calls(function: Callable[..., object], *arguments: object) -> int:
    """How many functions it calls, builtin ones and list comprehensions included."""
    number = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

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
