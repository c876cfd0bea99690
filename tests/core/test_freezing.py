"""Freezing running requests: never before it was proved, and never more than it was proved for."""

from __future__ import annotations

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import Admit, ProveFreeze, SleepEngine, StopEngine, WakeEngine
from vllmd.core.events import FreezeProved
from vllmd.core.types import State


def test_the_proof_is_asked_for_at_the_first_idle_moment() -> None:
    """No client's request is risked: the engine is idle, the gate closed."""
    w = World([model("m", preempt=True)], [GPU])
    w.ask("r1", "m")
    w.answer("m")
    assert w.finish("r1") == [ProveFreeze("m")]
    assert w.ask("r2", "m") == []
    assert w.answer("m") == [Admit("r2", "m")]
    assert w.finish("r2") == []


def test_without_preempt_nothing_is_proved() -> None:
    """Draining is the default."""
    w = World([model("m")], [GPU])
    w.load("m")
    assert not w.pending


def test_an_engine_that_loses_a_frozen_request_is_only_ever_drained() -> None:
    """Its state after a lost request is unknown: it is stopped once, and never frozen."""
    w = World([model("m", preempt=True), model("other", on_busy="evict")], [GPU])
    w.load("m")
    (stop,) = w.do(FreezeProved("m", survived=False))
    assert isinstance(stop, StopEngine)
    w.answer("m")
    w.load("m")
    assert not w.pending
    w.ask("long", "m")
    w.ask("r", "other")
    w.pass_time(500.0)
    assert w.state("m") is State.DRAINING


def test_frozen_requests_go_on_after_the_wake() -> None:
    """They are in flight all the time: the model is woken for them although nobody else waits for it."""
    w = World([model("m", preempt=True), model("other", on_busy="evict")], [GPU])
    w.load("m")
    w.answer("m")
    w.ask("inside", "m")
    w.ask("r", "other")
    w.pass_time(400.0)
    assert w.pending["m"] == SleepEngine("m", 1, freeze=True)
    w.answer("m")
    w.answer("other")
    w.finish("r")
    w.pass_time(550.0)
    while "m" not in w.pending:
        w.answer(next(iter(w.pending)))
    assert w.pending["m"] == WakeEngine("m", 1)
    w.answer("m")
    assert w.state("m") is State.READY
    assert w.finish("inside") == []


def test_a_proof_that_failed_is_seen_by_the_policy_at_once() -> None:
    """The device is busy with the stop from now on, not with the proof that began long ago."""
    w = World([model("m", preempt=True), model("other")], [GPU])
    w.load("m")
    w.ask("r", "other")
    w.pass_time(400.0)
    w.do(FreezeProved("m", survived=False))
    supply = w.scheduler.planner.look().supplies[0]
    assert supply.until > 400.0


def test_the_proof_waits_for_those_who_wait() -> None:
    """A replica that has come up is probed before it serves: its engine is idle meanwhile, and yet wanted."""
    w = World(replicas(2, preempt=True), PAIR)
    w.ask("r", "m")
    name = next(iter(w.pending))
    w.answer(name)
    assert not any(isinstance(command, ProveFreeze) for command in w.pending.values())
    assert w.probed(name) == [Admit("r", name)]
