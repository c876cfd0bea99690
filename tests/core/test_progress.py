"""What the log of a running first start has shown says how much of it is left."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, model
from tests.core.world import World
from vllmd.core.events import RequestArrived, StartProgressed, StopAsked
from vllmd.core.policy_input import remaining
from vllmd.core.types import State


def starting(**fields: float) -> World:
    """``m`` starts from second 0 on, which is believed to take 40 s."""
    w = World([model("m", start_time=40.0, **fields)], (GPU,))
    w.ask("r", "m")
    assert w.state("m") is State.STARTING
    return w


def left(w: World) -> float:
    return remaining(w.scheduler.core.replicas["m"], w.now)


def waits_for(w: World) -> str:
    return next(m.waiting_for for m in w.scheduler.snapshot(w.now).models if m.name == "m")


def test_without_a_word_it_takes_what_is_believed() -> None:
    w = starting()
    w.now += 10.0
    assert left(w) == pytest.approx(30.0)


def test_half_of_it_in_two_seconds_means_that_the_rest_is_short_too() -> None:
    """Half was seen, so its pace counts for half: (2 s at that pace + 20 s as believed) * 1/2."""
    w = starting()
    w.now += 2.0
    w.do(StartProgressed("m", 0.5))
    assert left(w) == pytest.approx(0.5 * (2.0 + 0.5 * 40.0))
    w.now += 1.0
    w.do(StartProgressed("m", 0.9))
    assert left(w) == pytest.approx(0.1 * (3.0 + 0.1 * 40.0))
    assert "of about 3.7 s" in waits_for(w)


def test_a_slow_one_takes_longer() -> None:
    w = starting()
    w.now += 60.0
    w.do(StartProgressed("m", 0.5))
    assert left(w) == pytest.approx(0.5 * (60.0 + 20.0))


def test_a_download_says_nothing_of_its_pace() -> None:
    """Gigabytes over the network take what they take; afterwards the rest is as long as was believed."""
    w = starting()
    w.now += 5.0
    w.do(StartProgressed("m", 0.0))
    assert left(w) == pytest.approx(40.0)
    w.now += 300.0
    w.do(StartProgressed("m", 0.25))
    assert left(w) == pytest.approx(0.75 * 40.0)


def test_once_a_start_was_measured_that_is_the_better_word() -> None:
    w = starting()
    w.now += 8.0
    w.answer("m")
    w.finish("r")
    w.do(StopAsked("m"))
    w.answer("m")
    w.ask("again", "m")
    w.do(StartProgressed("m", 0.9))
    assert left(w) == pytest.approx(8.0)


def test_a_word_that_comes_late_or_for_nobody_changes_nothing() -> None:
    w = starting()
    w.answer("m")
    assert w.do(StartProgressed("m", 0.5)) == w.do(StartProgressed("nobody", 0.5)) == []
    assert w.do(RequestArrived("r2", "m"))
