"""What people ask: load, sleep, stop, pins, leases, reloads."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.api.verbs import VERBS
from vllmd.core.commands import Admit, CutRequest, Reject, SleepEngine, StartEngine, StopEngine, WakeEngine
from vllmd.core.events import (
    DeviceDrained,
    EngineStartFailed,
    Event,
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    ModelsChanged,
    PinSet,
    SleepAsked,
    StopAsked,
)
from vllmd.core.types import IdleRules, Placement, State
from vllmd.sizes import GiB


def test_loading_starts_it_and_wakes_it() -> None:
    """An operator's load is as good as a request."""
    w = World([model("m")], [GPU])
    assert w.do(LoadAsked("m")) == [StartEngine("m", Placement((0,)), 50 * GiB)]
    assert w.do(LoadAsked("m")) == []
    w.answer("m")
    w.do(SleepAsked("m", 2))
    w.answer("m")
    assert w.do(LoadAsked("m")) == [WakeEngine("m", 2)]


def test_loading_does_not_mind_a_back_off() -> None:
    """The operator has just repaired it."""
    w = World([model("m", restart_backoff=300.0)], [GPU])
    w.ask("r", "m")
    w.do(EngineStartFailed("m", "broken"))
    assert isinstance(w.do(LoadAsked("m"))[0], StartEngine)


def test_loading_what_can_never_fit_is_refused_with_the_reason() -> None:
    """No request hears of it, so what is shown of the model says it."""
    w = World([model("huge", 100)], [GPU])
    assert w.do(LoadAsked("huge")) == []
    assert "needs 100 GiB on 1 device" in w.seen.models[0].never


def test_sleep_is_drained_first() -> None:
    """Nothing is put to sleep with a request inside."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.ask("r", "m")
    assert w.do(SleepAsked("m", 1)) == []
    assert w.finish("r") == [SleepEngine("m", 1)]


def test_a_sleeper_goes_deeper_by_way_of_a_wake() -> None:
    """vLLM ignores a second /sleep."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    assert w.do(SleepAsked("m", 2)) == [WakeEngine("m", 1)]
    assert w.answer("m") == [SleepEngine("m", 2)]


def test_level_three_is_a_stop() -> None:
    """As in ``vllmctl sleep --level 3``."""
    w = World([model("m")], [GPU])
    w.load("m")
    assert w.do(SleepAsked("m", 3)) == [StopEngine("m", "an operator asked for it")]


def test_stopping_a_start_tells_those_who_wait() -> None:
    """They are answered, not left to start it again."""
    w = World([model("m")], [GPU])
    w.ask("r", "m")
    told = w.do(StopAsked("m"))
    assert [type(c) for c in told] == [Reject, StopEngine]
    assert w.answer("m") == []


def test_a_request_that_races_a_stop_is_answered() -> None:
    """It waits for the end of the stop, and starts the model anew."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(StopAsked("m"))
    assert w.ask("r", "m") == []
    assert w.answer("m") == [StartEngine("m", Placement((0,)), 50 * GiB)]
    assert w.answer("m") == [Admit("r", "m")]


def test_force_cuts_and_kills() -> None:
    """Without a drain; the cut request still ends by RequestFinished."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.ask("r", "m")
    assert w.do(StopAsked("m", force=True)) == [
        CutRequest("r", "the model was stopped by force"),
        StopEngine("m", "an operator forced it", kill=True),
    ]


def test_a_drain_limit_cuts_what_is_left() -> None:
    """After the limit the stop waits only for the cut requests' ends."""
    w = World([model("m", drain_limit=20.0)], [GPU])
    w.load("m")
    w.ask("r", "m")
    w.do(StopAsked("m"))
    assert w.pass_time(19.0) == []
    (cut,) = w.pass_time(21.0)
    assert isinstance(cut, CutRequest)
    assert isinstance(w.finish("r")[0], StopEngine)


def test_a_model_pinned_while_it_leaves_stays() -> None:
    """A pin ends the swap that would have taken it."""
    w = World([model("m"), model("other")], [GPU])
    w.load("m")
    w.ask("r1", "m")
    w.ask("r2", "other")
    w.pass_time(400.0)
    assert w.state("m") is State.DRAINING
    w.do(PinSet("m", True))
    assert w.state("m") is State.READY
    assert w.finish("r1") == []


def test_a_leased_model_is_no_victim() -> None:
    """Until its deadline; then it drains and stops, and the waiter is served."""
    w = World([model("m"), model("other")], [GPU])
    w.load("m")
    w.do(LeaseTaken("l", "m", deadline=100.0))
    w.ask("r", "other")
    assert w.pass_time(99.0) == []
    assert w.pass_time(101.0) == [StopEngine("m", "its last lease, 'l', ended")]
    assert isinstance(w.answer("m")[0], StartEngine)


def test_a_lease_taken_again_replaces_its_deadline() -> None:
    """reset_shutdown_timer: alive until five seconds after the second call."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(LeaseTaken("l", "m", deadline=5.0))
    w.now = 3.0
    w.do(LeaseTaken("l", "m", deadline=8.0))
    assert w.pass_time(7.9) == []
    assert [type(c) for c in w.pass_time(8.0)] == [StopEngine]


def test_anothers_lease_keeps_the_model() -> None:
    """Only the last lease to end may stop it."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(LeaseTaken("mine", "m", deadline=5.0))
    w.do(LeaseTaken("theirs", "m", deadline=50.0))
    assert w.pass_time(49.0) == []
    assert [type(c) for c in w.pass_time(50.0)] == [StopEngine]


def test_a_released_lease_leaves_the_model_to_its_idle_rules() -> None:
    """auto_terminate never: released without a stop."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(LeaseTaken("l", "m"))
    assert w.do(LeaseReleased("l")) == []
    w.do(LeaseTaken("l", "m"))
    assert [type(c) for c in w.do(LeaseReleased("l", stop=True))] == [StopEngine]


def test_a_removed_model_is_drained_stopped_and_forgotten() -> None:
    """Whoever runs in it ends in peace; whoever comes after is told that it is gone."""
    w = World([model("m"), model("stays", 10)], [GPU])
    w.load("m")
    w.ask("r", "m")
    assert w.do(ModelsChanged((model("stays", 10),))) == []
    (refusal,) = w.ask("late", "m")
    assert isinstance(refusal, Reject)
    assert isinstance(w.finish("r")[0], StopEngine)
    w.answer("m")
    assert [m.name for m in w.seen.models] == ["stays"]


def test_a_changed_model_restarts_with_its_new_devices() -> None:
    """``assign --devices 1 --restart``: the next start is on the other device."""
    w = World([model("m", devices=(0,))], PAIR)
    w.load("m")
    (stop,) = w.do(ModelsChanged((model("m", devices=(1,)),), frozenset({"m"})))
    assert stop == StopEngine("m", "its configuration changed")
    w.answer("m")
    assert w.ask("r", "m") == [StartEngine("m", Placement((1,)), 50 * GiB)]


def test_waiters_of_a_model_that_grew_too_large_are_told() -> None:
    """A reload can make waiting pointless."""
    w = World([model("m"), model("king", pinned=False)], [GPU])
    w.load("king")
    w.ask("busy", "king")
    w.ask("r", "m")
    (told,) = w.do(ModelsChanged((model("m", 200), model("king"))))
    assert isinstance(told, Reject)
    assert told.error == "ModelTooLarge"


def test_a_stop_of_a_model_with_frozen_requests_wakes_it_first() -> None:
    """What was promised to finish finishes, even through a stop."""
    w = World([model("m", preempt=True), model("other", on_busy="evict")], [GPU])
    w.load("m")
    w.answer("m")
    w.ask("inside", "m")
    w.ask("r", "other")
    w.pass_time(400.0)
    assert w.pending["m"] == SleepEngine("m", 1, freeze=True)
    w.answer("m")
    w.answer("other")
    assert w.do(StopAsked("m")) == []
    w.finish("r")
    w.pass_time(550.0)
    while "m" not in w.pending:
        w.answer(next(iter(w.pending)))
    assert w.pending["m"] == WakeEngine("m", 1)
    w.answer("m")
    assert [type(c) for c in w.finish("inside")] == [StopEngine]


def test_a_stop_asked_while_it_falls_asleep_follows_the_sleep() -> None:
    """One command at a time; the wish is not forgotten."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    assert w.do(StopAsked("m")) == []
    assert w.answer("m") == [StopEngine("m", "an operator asked for it")]


def test_a_sleep_asked_while_it_starts_follows_the_start() -> None:
    """Who waits is served first; then it drains."""
    w = World([model("m")], [GPU])
    w.ask("r", "m")
    w.do(SleepAsked("m", 2))
    assert w.answer("m") == [Admit("r", "m")]
    assert w.finish("r") == [SleepEngine("m", 2)]


def test_a_pin_saves_a_sleeper_that_was_to_stop() -> None:
    """Its device was busy when its time came; pinned meanwhile, it stays."""
    rules = IdleRules(10.0, 2, None, 20.0)
    w = World([model("m", 20, idle=rules), model("other", 20)], [GPU])
    w.load("m")
    w.pass_time(10.0)
    w.answer("m")
    w.ask("r", "other")
    w.pass_time(30.0)
    w.do(PinSet("m", True))
    w.answer("other")
    assert w.state("m") is State.SLEEPING
    assert not w.pending


def test_a_lease_on_another_model_ends_the_first() -> None:
    """One lease holds one model; the one given up follows its idle rules."""
    w = World([model("a", 20, idle=IdleRules(10.0, 1, None, None)), model("b", 20)], [GPU])
    w.load("a")
    w.do(LeaseTaken("l", "a"))
    assert w.scheduler.next_timer() is None
    w.now = 100.0
    w.do(LeaseTaken("l", "b"))
    assert w.pass_time(110.0) == [SleepEngine("a", 1)]


def test_an_operators_pin_outlives_a_reload_and_the_configurations_own_does_not() -> None:
    """What somebody said at the keyboard is not undone by a change of something else."""
    w = World([model("m", 20), model("n", 20, pinned=True)], [GPU])
    w.do(PinSet("m", True))
    w.do(ModelsChanged((model("m", 20), model("n", 20))))
    assert [m.pinned for m in w.seen.models] == [True, False]
    said = [command.printed for verb in VERBS if verb.name == "pin" for command in verb.commands]
    assert said and not any("reload" in each for each in said)  # and what vllmctl says is what is so


@pytest.mark.parametrize(
    ("said", "unsaid"),
    [
        (PinSet("m", True), PinSet("m", False)),
        (PinSet("king", False), PinSet("king", True)),
        (LeaseTaken("l", "m"), LeaseReleased("l")),
        (DeviceDrained(0), DeviceDrained(0, drained=False)),
    ],
)
def test_what_ends_with_the_daemon_is_known_to_be_there(said: Event, unsaid: Event) -> None:
    """So that it does not exit for want of work while an operator relies on it; what is configured is no order."""
    w = World([model("m", 20), model("king", 20, pinned=True)], [GPU])
    assert not w.scheduler.holds_orders
    w.do(said)
    assert w.scheduler.holds_orders
    w.do(unsaid)
    assert not w.scheduler.holds_orders


def test_what_is_stopped_on_a_device_is_decided_by_what_is_there() -> None:
    """Of several replicas only the one on it, or on its way there; the last one takes the model along."""
    w = World(replicas(2), PAIR)
    w.do(LoadAsked("m"))
    w.settle()
    on_0 = next(r.id for r in w.engines_seen if r.devices == (0,))
    assert [c.replica for c in w.do(StopAsked("m", device=0)) if isinstance(c, StopEngine)] == [on_0]
    assert w.do(StopAsked("m", device=0)) == []
    w.settle()
    other = next(r.id for r in w.engines_seen if r.devices == (1,))
    assert [c.replica for c in w.do(StopAsked("m", device=1)) if isinstance(c, StopEngine)] == [other]
