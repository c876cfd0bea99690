"""Models that an operator has disabled: who is told what, what ends, and what does not come back by itself."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import Admit, Answer, Reject, RejectReason, SleepEngine, StartEngine, StopEngine
from vllmd.core.events import (
    EngineAdopted,
    EngineExited,
    LoadAsked,
    ModelDisabled,
    ModelEnabled,
    ModelsChanged,
    PoolAsked,
    SleepAsked,
    StopAsked,
    TimePassed,
)
from vllmd.core.types import Placement, ReplicaRules, State

WORDS = "back on Monday"


def refused(request: str) -> Reject:
    return Reject(request, RejectReason.DISABLED, WORDS)


def test_who_comes_is_told_the_operators_words_and_what_runs_ends_first() -> None:
    w = World([model("m")], [GPU])
    w.load("m")
    w.ask("runs", "m")
    assert w.do(ModelDisabled("m", WORDS)) == []
    assert w.ask("late", "m") == [refused("late")]
    assert w.finish("runs") == [StopEngine("m", "an operator asked for it")]
    w.answer("m")
    assert w.ask("later", "m") == [refused("later")]
    assert w.seen.models[0].disabled == w.view("m").disabled == WORDS


def test_who_waits_is_told_at_once_and_the_start_is_ended() -> None:
    w = World([model("m")], [GPU])
    w.ask("waits", "m")
    assert w.do(ModelDisabled("m", WORDS)) == [refused("waits"), StopEngine("m", "an operator asked for it")]


def test_nothing_starts_it_before_it_is_given_back() -> None:
    """Neither an operator's load nor preloading: one word must be enough to keep it off the devices."""
    w = World([model("m", preload=True)], [GPU])
    w.do(ModelDisabled("m", WORDS))
    assert w.do(TimePassed()) == []
    assert w.do(LoadAsked("m", ask="load")) == [
        Answer("load", refused=f"m is disabled: {WORDS}", error=RejectReason.CONFLICT)
    ]
    assert w.do(LoadAsked("m", device=0, ask="there")) == [
        Answer("there", refused=f"m is disabled: {WORDS}", error=RejectReason.CONFLICT)
    ]
    assert w.do(ModelEnabled("m")) == []
    assert isinstance(w.do(TimePassed())[0], StartEngine), "what is to be preloaded is loaded again"
    w.answer("m")
    assert isinstance(w.ask("r", "m")[0], Admit)
    assert w.seen.models[0].disabled == ""


def test_a_crash_while_it_drains_brings_nothing_back() -> None:
    w = World([model("m", restart_backoff=1.0)], [GPU])
    w.load("m")
    w.ask("runs", "m")
    w.do(ModelDisabled("m", WORDS))
    w.do(EngineExited("m", "crashed"))
    assert w.pass_time(100.0) == []


def test_an_engine_that_is_adopted_is_stopped_once_the_order_is_known() -> None:
    """The daemon tells the order of an earlier one again, when it has found what runs."""
    w = World([model("m")], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.READY))
    assert w.do(ModelDisabled("m", WORDS)) == [StopEngine("m", "an operator asked for it")]


def test_put_to_sleep_it_stops_all_the_same() -> None:
    """Its memory is to be free: a later word of an operator's must not leave it half way."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.ask("runs", "m")
    w.do(ModelDisabled("m", WORDS))
    w.do(SleepAsked("m", 1))
    assert w.finish("runs") == [StopEngine("m", "an operator asked for it")]


def test_the_place_that_it_leaves_is_free_for_others() -> None:
    w = World([model("m", pinned=True), model("n")], [GPU])
    w.load("m")
    w.do(ModelDisabled("m", WORDS))
    w.answer("m")
    assert isinstance(w.ask("r", "n")[0], StartEngine), "a pin keeps no place of a model that is out of use"


def test_a_pool_goes_to_another_of_its_models() -> None:
    w = World([model("m"), model("n")], PAIR)
    w.load("m")
    w.do(ModelDisabled("m", WORDS))
    (answer,) = w.do(PoolAsked(("m", "n"), ask="p"))
    assert answer == Answer("p", "n")
    w.do(ModelDisabled("n", WORDS))
    (answer,) = w.do(PoolAsked(("m", "n"), ask="q"))
    assert isinstance(answer, Answer)
    assert w.ask("r", answer.chosen) == [refused("r")], "with all of them disabled the client is told so"


def test_a_replica_is_taken_out_and_the_others_serve() -> None:
    """And none is brought up in its stead by the number that is wanted."""
    w = World(replicas(2, rules=ReplicaRules(least=2, probe=False)), PAIR)
    w.ask("first", "m")
    while w.pending:
        w.answer(next(iter(w.pending)))
    w.finish("first")
    assert w.do(ModelDisabled("m@1", WORDS)) == [StopEngine("m@1", "an operator asked for it")]
    w.answer("m@1")
    assert [view.disabled for view in w.engines_seen] == [WORDS, ""]
    assert w.seen.models[0].disabled == ""
    for number in range(4):
        assert w.ask(f"r{number}", "m") == [Admit(f"r{number}", "m@2")]
    assert not any(isinstance(command, StartEngine) for command in w.pass_time(60.0))
    for number in range(4):
        w.finish(f"r{number}")
    w.do(ModelDisabled("m@2", WORDS))
    assert w.ask("late", "m") == [refused("late")], "with all of its replicas the model is disabled"
    w.do(ModelEnabled("m"))
    assert [view.disabled for view in w.engines_seen] == ["", ""]


def test_a_disabled_replica_stays_down_when_an_operator_has_stopped_the_others() -> None:
    """With the last that an operator took down all may come up again for the next request: but not this one."""
    w = World(replicas(2, rules=ReplicaRules(least=2, probe=False)), PAIR)
    w.do(ModelDisabled("m@1", WORDS))
    w.do(StopAsked("m@2"))
    (start,) = w.ask("r", "m")
    assert isinstance(start, StartEngine) and start.replica == "m@2"
    w.answer("m@2")
    assert not any(isinstance(command, StartEngine) for command in w.pass_time(60.0))


@pytest.mark.parametrize("known", [["m", "n"], ["n"]])
def test_a_reload_keeps_the_order_as_long_as_it_has_the_model(known: list[str]) -> None:
    w = World([model("m"), model("n")], PAIR)
    w.load("m")
    w.do(ModelDisabled("m", WORDS))
    w.do(ModelsChanged(tuple(model(name, 40) for name in known)))  # its engine is still on its way out
    w.do(ModelsChanged((model("m", 30), model("n"))))
    assert w.seen.models[0].disabled == (WORDS if "m" in known else "")


def test_frozen_requests_of_a_disabled_model_are_finished() -> None:
    """They were let in: it wakes for them once more, and stops then."""
    w = World([model("m", preempt=True), model("n", drain_limit=0.0)], [GPU])
    w.load("m")
    if w.pending:
        w.answer("m")  # the proof that freezing loses nothing
    w.ask("runs", "m")
    w.do(LoadAsked("n"))
    if not any(isinstance(command, SleepEngine) and command.freeze for command in w.pending.values()):
        w.pass_time(w.now + 60.0)
    assert w.frozen == {"runs"}
    w.do(ModelDisabled("m", WORDS))
    w.settle()
    assert w.state("m") is State.STOPPED and "runs" not in w.rejected
