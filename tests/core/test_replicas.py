"""Several engines of one model: who gets a request, who is probed, set aside, ejected, brought up and let go.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import (
    AddReplica,
    Admit,
    CutRequest,
    ProbeReplica,
    Reject,
    RejectReason,
    RenameReplica,
    SleepEngine,
    StartEngine,
)
from vllmd.core.events import (
    EngineExited,
    EngineReady,
    EngineStartFailed,
    EngineStopped,
    LoadAsked,
    ModelDisabled,
    ModelsChanged,
    ProbeAsked,
    ReplicaProbed,
    ReplicaRefused,
    RequestAnswered,
    RequestArrived,
    RequestFinished,
    SleepAsked,
    StopAsked,
    TimePassed,
)
from vllmd.core.model import HealthStatus
from vllmd.core.types import Device, IdleRules, ModelSpec, ReplicaRules, State
from vllmd.sizes import GiB

REMOTE = {"device_count": 0, "sleep_levels": frozenset()}


def serving(number: int, *, rules: ReplicaRules | None = None, remote: bool = True, **fields: object) -> World:
    """A world in which all replicas of ``m`` serve."""
    kind = REMOTE if remote else {}
    w = World(replicas(number, rules=rules, **kind, **fields), [Device(i, str(i), 80 * GiB) for i in range(number)])
    w.ask("first", "m")
    while w.pending:
        w.answer(next(iter(w.pending)))
    for name in dict(w.probes).values():
        w.probed(name)
    w.finish("first")
    assert {r.health for r in w.engines_seen} == {"serving"}
    return w


def serve(w: World, request: str, seconds: float) -> str:
    """Have one request answered after so long; who did."""
    (admitted,) = w.ask(request, "m")
    assert isinstance(admitted, Admit)
    w.now += seconds
    w.do(RequestAnswered(request))
    w.finish(request)
    return admitted.replica


def health(w: World, name: str) -> str:
    return w.view(name).health


# -- coming up


def test_all_come_up_with_the_first_request_where_they_fit() -> None:
    """Two replicas, two devices: one start each, side by side."""
    w = World(replicas(2), PAIR)
    first, second = w.ask("r", "m")
    assert isinstance(first, StartEngine)
    assert isinstance(second, StartEngine)
    assert {first.replica, second.replica} == {"m@1", "m@2"}
    assert first.placement != second.placement


def test_nobody_leaves_for_a_second_replica_and_none_shares_a_device_with_the_first() -> None:
    """The first is a request's need, a second one only a wish; two on one GPU would be no gain."""
    w = World([*replicas(2, 20), model("other", 70)], PAIR)
    w.load("other")
    (start,) = w.ask("r", "m")
    assert isinstance(start, StartEngine)
    assert w.answer("m@1") == [ProbeReplica("probe-1", "m@1", 5.0)]
    w.pass_time(60.0)
    assert w.state("m@2") is State.STOPPED


def test_an_operator_who_wants_the_model_gets_one_replica_for_sure_and_more_only_where_they_fit() -> None:
    """None of them puts another one to sleep, nor another model."""
    w = World(replicas(3), PAIR)
    w.do(LoadAsked("m"))
    assert set(w.pending) == {"m@1", "m@2"}
    w.answer("m@1")
    w.answer("m@2")
    w.settle()
    assert (w.state("m@1"), w.state("m@2"), w.state("m@3")) == (State.READY, State.READY, State.STOPPED)


def test_a_replica_that_was_taken_down_comes_up_again_with_its_model() -> None:
    """Whoever wants the model wants all of it."""
    w = serving(2, remote=False)
    w.do(StopAsked("m@2"))
    w.answer("m@2")
    w.pass_time(30.0)
    assert w.state("m@2") is State.STOPPED
    assert [type(c) for c in w.do(LoadAsked("m"))] == [StartEngine]


def test_an_operators_probe_runs_as_a_request_does_and_earns_nobody_anything() -> None:
    """It keeps its engine from sleeping; that it fails is for the operator to judge."""
    w = serving(2, remote=False)
    w.do(ProbeAsked("p", "m@2"))
    assert w.do(SleepAsked("m@2", 1)) == []
    assert [type(c) for c in w.do(ReplicaProbed("p", None, "too late"))] == [SleepEngine]
    assert health(w, "m@1") == "serving"
    assert w.view("m@2").failure == ""


def test_a_replica_that_is_to_use_certain_devices_does() -> None:
    """Whoever lists the same device twice means it."""
    w = World(replicas(2, 30, devices=(0,)), PAIR)
    assert [c.replica for c in w.ask("r", "m")] == ["m@1"]
    w.answer("m@1")
    assert w.state("m@2") is State.STARTING or w.pass_time(20.0)
    assert w.state("m@2") is State.STARTING


def test_it_serves_once_it_has_answered_a_probe() -> None:
    """A server whose health is fine may still hang at the first question."""
    w = World(replicas(1, **REMOTE), [])
    w.ask("r", "m")
    assert w.do(EngineReady("m@1")) == [ProbeReplica("probe-1", "m@1", 5.0)]
    assert w.probed("m@1", 0.2) == [Admit("r", "m@1")]


def test_without_probes_it_serves_at_once() -> None:
    """``probe: none``."""
    w = World(replicas(1, rules=ReplicaRules(probe=False), **REMOTE), [])
    w.ask("r", "m")
    assert w.do(EngineReady("m@1")) == [Admit("r", "m@1")]


def test_whoever_serves_first_takes_all_who_wait() -> None:
    """They wait for the model, not for one of its engines."""
    w = World(replicas(2, **REMOTE), [])
    w.ask("r1", "m")
    w.ask("r2", "m")
    w.answer("m@1")
    w.answer("m@2")
    assert w.probed("m@2") == [Admit("r1", "m@2"), Admit("r2", "m@2")]


def test_a_probe_is_abandoned_once_it_is_much_slower_than_the_best() -> None:
    """S's get_fastest_server: the time of the fastest bounds that of the others, but by no less than half a second."""
    w = serving(2)
    w.do(EngineExited("m@2", "gone"))
    w.pass_time(10.0)
    probe = next(c for c in w.answer("m@2") if isinstance(c, ProbeReplica))
    assert probe.limit == max(0.5, 4 * 0.1)


# -- who gets a request


def test_two_choices_of_three_even_out() -> None:
    """No replica is forgotten, none is flooded."""
    w = serving(3)
    who = Counter(c.replica for n in range(90) for c in w.ask(f"r{n}", "m") if isinstance(c, Admit))
    assert set(who) == {"m@1", "m@2", "m@3"}
    assert max(who.values()) - min(who.values()) <= 2


def test_the_faster_gets_more() -> None:
    """In flight times latency: one that is three times faster has three times as many at a time."""
    w = serving(2, rules=ReplicaRules(growth=100.0))
    speed = {"m@1": 0.3, "m@2": 0.9}
    for n in range(20):
        (admitted,) = w.ask(f"warm{n}", "m")
        w.now += speed[admitted.replica]
        w.do(RequestAnswered(f"warm{n}"))
        w.finish(f"warm{n}")
    who = Counter(c.replica for n in range(40) for c in w.ask(f"r{n}", "m") if isinstance(c, Admit))
    assert 2.0 < who["m@1"] / who["m@2"] < 4.5


def test_one_that_is_full_is_passed_over_and_all_full_wait_for_the_next_place() -> None:
    """``concurrency`` is each replica's."""
    w = serving(2, concurrency=1)
    (a,), (b,) = w.ask("r1", "m"), w.ask("r2", "m")
    assert {a.replica, b.replica} == {"m@1", "m@2"}
    assert w.ask("r3", "m") == []
    assert w.finish("r2") == [Admit("r3", b.replica)]


# -- slow ones


def test_S_latency_growing_rate_a_slow_one_is_set_aside_and_comes_back() -> None:
    """Three answers in a row beyond the bound; after a pause it is asked, and a good answer brings it back."""
    w = serving(2)
    for n in range(3):
        for name, other, seconds in (("m@1", "m@2", 5.0), ("m@2", "m@1", 0.2)):
            assert w.do(RequestArrived(f"{name} {n}", "m", avoid=frozenset({other}))) == [Admit(f"{name} {n}", name)]
            w.now += seconds
            w.do(RequestAnswered(f"{name} {n}"))
            w.finish(f"{name} {n}")
    assert health(w, "m@1") == "serving", "nothing is slow before it is known what is fast"
    for n in range(3):
        w.do(RequestArrived(f"later {n}", "m", avoid=frozenset({"m@2"})))
        w.now += 5.0
        w.do(RequestAnswered(f"later {n}"))
        w.finish(f"later {n}")
    assert health(w, "m@1") == "slow"
    assert {serve(w, f"after{n}", 0.2) for n in range(10)} == {"m@2"}
    assert list(w.probes.values()) == ["m@1"]
    w.probed("m@1", 0.2)
    assert health(w, "m@1") == "serving"


def test_one_late_answer_is_no_outlier() -> None:
    """A long prompt begins late anywhere: it takes three in a row."""
    w = serving(2)
    for n in range(3):
        for name, other in (("m@1", "m@2"), ("m@2", "m@1")):
            w.do(RequestArrived(f"{name} {n}", "m", avoid=frozenset({other})))
            w.now += 0.2
            w.do(RequestAnswered(f"{name} {n}"))
            w.finish(f"{name} {n}")
    for n in range(3):
        assert health(w, "m@1") == "serving", f"after {n} late answers"
        w.do(RequestArrived(f"late {n}", "m", avoid=frozenset({"m@2"})))
        w.now += 50.0
        w.do(RequestAnswered(f"late {n}"))
        w.finish(f"late {n}")
    assert health(w, "m@1") == "slow"


def test_streams_and_whole_answers_are_not_held_against_each_other() -> None:
    """A whole answer begins when it is made, a stream long before: the one that has only streams is not faster."""
    w = serving(2)
    for n in range(6):
        for name, other, seconds, streamed in (("m@1", "m@2", 5.0, False), ("m@2", "m@1", 0.1, True)):
            w.do(RequestArrived(f"{name} {n}", "m", avoid=frozenset({other})))
            w.now += seconds
            w.do(RequestAnswered(f"{name} {n}", streamed))
            w.finish(f"{name} {n}")
    assert health(w, "m@1") == "serving"
    who = Counter(c.replica for n in range(20) for c in w.ask(f"r{n}", "m") if isinstance(c, Admit))
    assert who["m@1"] == who["m@2"]


def test_a_slow_one_is_better_than_none() -> None:
    """When the fast one goes, requests go where they are answered at all."""
    w = serving(2)
    w.scheduler.core.replicas["m@1"].health.status = HealthStatus.SLOW  # type: ignore[union-attr]
    w.do(EngineExited("m@2", "gone"))
    assert w.ask("r", "m") == [Admit("r", "m@1")]


@pytest.mark.timeout(60)
def test_an_ejected_one_at_its_proof_is_not_nominated_for_being_idle() -> None:
    """Its gate would be opened for the queue, which passes it over, and closed for the proof, without an end."""
    w = World(replicas(2, preempt=True, rules=ReplicaRules(least=1, retries=2)), PAIR)
    w.ask("r", "m")
    w.answer("m@1")
    w.probed("m@1", None)  # it is ejected, has nothing to do, and drains for its proof; the request waits
    assert (w.state("m@1"), w.state("m@2")) == (State.FALLING_ASLEEP, State.STARTING)
    w.answer("m@2")
    assert Admit("r", "m@2") in w.probed("m@2")
    w.settle()


def test_the_bound_of_a_probe_grows_with_each_attempt() -> None:
    """S's bound times its growing rate: one that stays slow is accepted in the end."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    w.do(RequestFinished("r", failed="the connection broke off"))
    limits = []
    for _ in range(3):
        commands = w.pass_time(w.now + 70.0)
        limits += [c.limit for c in commands if isinstance(c, ProbeReplica)]
        w.probed("m@1", None)
    assert limits == sorted(limits)
    assert limits[-1] > limits[0]


# -- failing ones


def test_S_max_retry_a_failed_request_goes_elsewhere() -> None:
    """The daemon says who failed it; another one that serves gets it at once."""
    w = serving(2)
    (admitted,) = w.ask("r", "m")
    other = {"m@1": "m@2", "m@2": "m@1"}[admitted.replica]
    w.do(RequestFinished("r", failed="nobody listens"))
    assert health(w, admitted.replica) == "ejected"
    assert w.do(RequestArrived("r again", "m", avoid=frozenset({admitted.replica}))) == [Admit("r again", other)]


def test_one_that_was_ejected_is_probed_after_a_pause_that_doubles() -> None:
    """Not at once, not for ever, and not with a client's request."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    w.do(RequestFinished("r", failed="nobody listens"))
    began = w.now
    w.pass_time(began + 0.9)
    assert not w.probes
    w.pass_time(began + 1.1)
    assert list(w.probes.values()) == ["m@1"]
    w.probed("m@1", None)
    failed = w.now
    w.pass_time(failed + 1.9)
    assert not w.probes
    w.pass_time(failed + 2.1)
    assert list(w.probes.values()) == ["m@1"]


def test_one_that_leaves_requests_unanswered_is_asked_and_cut_off_if_it_does_not_answer() -> None:
    """A hanging server: its requests are broken off, so that the daemon can send them elsewhere."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    commands = w.pass_time(20.0)
    assert [c.replica for c in commands if isinstance(c, ProbeReplica)] == ["m@1"]
    assert CutRequest("r", "its replica does not answer") in w.probed("m@1", None)
    assert health(w, "m@1") == "ejected"


def test_one_that_only_takes_its_time_is_left_alone() -> None:
    """A long answer is no fault: the probe that it inspires comes back."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    w.pass_time(20.0)
    assert w.probed("m@1", 0.3) == []
    assert health(w, "m@1") == "serving"
    assert w.running["r"] == "m@1"


def test_one_that_answers_others_meanwhile_is_busy_and_does_not_hang() -> None:
    """A full engine has requests wait for longer than any bound: breaking them off would only move them to its like."""
    w = serving(2)
    elsewhere = frozenset({"m@2"})
    w.do(RequestArrived("long", "m", avoid=elsewhere))
    commands = []
    for n in range(8):
        w.do(RequestArrived(f"r{n}", "m", avoid=elsewhere))
        commands += w.pass_time(w.now + 3.0)
        w.do(RequestAnswered(f"r{n}"))
        w.finish(f"r{n}")
    assert commands == []
    assert w.running["long"] == "m@1"


def test_a_probe_that_is_lost_while_another_was_answered_proves_nothing() -> None:
    """It waited in the same queue as everybody; silence from then on does."""
    w = serving(2)
    elsewhere = frozenset({"m@2"})
    w.do(RequestArrived("long", "m", avoid=elsewhere))
    w.do(RequestArrived("other", "m", avoid=elsewhere))
    w.pass_time(20.0)
    w.do(RequestAnswered("other"))
    assert w.probed("m@1", None) == []
    assert health(w, "m@1") == "serving"
    w.pass_time(w.now + 100.0)
    assert CutRequest("long", "its replica does not answer") in w.probed("m@1", None)


def test_one_that_is_suspected_has_all_the_time_of_a_probe() -> None:
    """It is not to show how fast it is but that it lives: a model that sleeps over there has to wake first."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    assert [c.limit for c in w.pass_time(20.0) if isinstance(c, ProbeReplica)] == [5.0]


def test_where_no_other_serves_nobody_is_too_slow() -> None:
    """All have to load their model first: what they were able to do when it was loaded is no measure now."""
    w = serving(2)
    for name in ("m@1", "m@2"):
        w.do(EngineExited(name, "gone"))
    w.pass_time(w.now + 10.0)
    limits = [c.limit for name in ("m@1", "m@2") for c in w.answer(name) if isinstance(c, ProbeReplica)]
    assert limits == [5.0, 5.0]


def test_a_local_one_that_hangs_is_started_anew() -> None:
    """Nobody else would: after ``retries`` failed probes its engine is killed, and comes up again."""
    w = serving(2, rules=ReplicaRules(least=2, retries=1), remote=False)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    w.pass_time(20.0)
    w.probed("m@1", None)
    w.do(RequestFinished("r", failed="its replica does not answer"))
    w.pass_time(w.now + 5.0)
    w.probed("m@1", None)
    assert w.state("m@1") is State.STOPPING
    w.ask("other", "m")
    w.do(EngineStopped("m@1"))
    w.pass_time(w.now + 10.0)
    assert w.state("m@1") is State.STARTING


def test_a_remote_that_is_gone_has_its_requests_cut() -> None:
    """Whoever is cut off from us leaves our connections open; nothing else would end them."""
    w = serving(2)
    w.do(RequestArrived("r", "m", avoid=frozenset({"m@2"})))
    assert CutRequest("r", "unreachable") in w.do(EngineExited("m@1", "unreachable"))


def test_who_waits_for_one_that_fails_waits_for_another() -> None:
    """A start that fails costs its waiters nothing as long as there is another replica."""
    w = World(replicas(2), PAIR)
    w.ask("r", "m")
    w.do(EngineStartFailed("m@1", "no such model", permanent=True))
    assert "r" in w.queued
    w.answer("m@2")
    assert w.probed("m@2") == [Admit("r", "m@2")]


def test_who_waits_for_one_that_fails_waits_for_another_that_may_come_back() -> None:
    """A failed probe is no verdict yet: whoever waits is refused when there is nobody left to wait for."""
    w = World(replicas(2, **REMOTE), [])
    w.ask("r", "m")
    w.do(EngineReady("m@2"))
    w.probed("m@2", None)
    w.do(EngineStartFailed("m@1", "no route to gpu1"))
    assert "r" in w.queued
    w.pass_time(w.now + 2.0)
    assert Admit("r", "m@2") in w.probed("m@2")


def test_S_turn_off_running_flag_all_down_is_a_clear_503_and_recovers_by_itself() -> None:
    """With every replica's reason; when the back-off is over somebody's request tries again."""
    w = World(replicas(2, **REMOTE), [])
    w.ask("r", "m")
    w.do(EngineStartFailed("m@1", "no route to gpu1"))
    w.do(EngineStartFailed("m@2", "no route to gpu2"))
    w.ask("again", "m")
    for told in w.rejected["r"], w.rejected["again"]:
        assert told.error == "Unavailable"
        assert "m@1: no route to gpu1; m@2: no route to gpu2" in told.message
        assert told.retry_after is not None
    w.pass_time(told.retry_after + 1.0)
    assert w.state("m@1") is State.STARTING
    w.answer("m@1")
    w.probed("m@1")
    assert w.ask("later", "m") == [Admit("later", "m@1")]


def test_one_that_comes_back_is_taken_back_without_a_request() -> None:
    """As long as the model is used its remotes are tried again when their back-off is over."""
    w = serving(2)
    w.do(EngineExited("m@2", "gone"))
    commands = w.pass_time(w.now + 6.0)
    assert any(isinstance(c, StartEngine) and c.replica == "m@2" for c in commands)


# -- more and fewer


def crowd(w: World, number: int) -> None:
    for n in range(number):
        w.ask(f"crowd{n}", "m")


def test_one_more_is_started_when_there_was_too_much_for_long_enough() -> None:
    """``busy`` requests per replica for ``busy_for``; on a device of its own."""
    w = World(replicas(2, rules=ReplicaRules(least=1, busy=4, busy_for=10.0)), PAIR)
    w.ask("r", "m")
    w.answer("m@1")
    w.probed("m@1")
    crowd(w, 6)
    assert not any(isinstance(c, StartEngine) for c in w.pass_time(w.now + 9.0))
    (start,) = [c for c in w.pass_time(w.now + 2.0) if isinstance(c, StartEngine)]
    assert (start.replica, start.placement.devices) == ("m@2", (1,))


def test_one_fewer_gets_requests_when_it_is_calm_and_its_idle_rules_take_it() -> None:
    """It rests, ready to help again, until its age puts it to sleep; the other one stays."""
    rules = ReplicaRules(least=1, busy=2, busy_for=1.0, calm_for=20.0)
    w = World(replicas(2, rules=rules, idle=IdleRules(60.0, 1, None, None)), PAIR)
    w.ask("r", "m")
    w.answer("m@1")
    w.probed("m@1")
    crowd(w, 4)
    w.pass_time(w.now + 2.0)
    w.answer("m@2")
    w.probed("m@2")
    for request in [r for r in w.running if r not in w.probes]:
        w.finish(request)
    w.pass_time(w.now + 21.0)
    assert health(w, "m@2") == "resting"
    commands = []
    for n in range(9):
        assert serve(w, f"calm{n}", 0.1) == "m@1"
        commands += w.pass_time(w.now + 5.0)
    assert SleepEngine("m@2", 1) in commands
    assert w.state("m@1") is State.READY


def test_replicas_that_are_wanted_age_together() -> None:
    """Chance has one of them unused for long; it is not put to sleep for that while the model is in use."""
    w = serving(2, remote=False, idle=IdleRules(60.0, 1, None, None))
    for n in range(30):
        w.do(RequestArrived(f"r{n}", "m", avoid=frozenset({"m@2"})))
        w.now += 0.1
        w.finish(f"r{n}")
        w.pass_time(w.now + 5.0)
    assert [r.state for r in w.engines_seen] == [State.READY] * 2


# -- operators


def test_one_that_an_operator_stops_stays_down_while_others_serve() -> None:
    """Maintenance of one GPU."""
    w = serving(2, remote=False)
    w.do(StopAsked("m@2"))
    w.answer("m@2")
    for n in range(5):
        assert serve(w, f"r{n}", 0.1) == "m@1"
        w.pass_time(w.now + 5.0)
    assert w.state("m@2") is State.STOPPED
    assert [c.replica for c in w.do(LoadAsked("m@2")) if isinstance(c, StartEngine)] == ["m@2"]


def test_a_model_that_an_operator_stops_comes_back_with_the_next_request() -> None:
    """As any model; nothing comes up by itself."""
    w = serving(2, remote=False)
    for name in ("m@1", "m@2"):
        w.do(StopAsked(name))
        w.answer(name)
    w.pass_time(w.now + 30.0)
    assert [r.state for r in w.engines_seen] == [State.STOPPED] * 2
    assert {c.replica for c in w.ask("r", "m") if isinstance(c, StartEngine)} == {"m@1", "m@2"}


def test_a_model_that_gets_replicas_keeps_its_engine() -> None:
    """It goes on as the first replica, by another name: a reload starts only the others."""
    w = World([model("m")], PAIR)
    w.load("m")
    rename, probe, start = w.do(ModelsChanged(tuple(replicas(2))))
    assert rename == RenameReplica("m", "m@1")
    assert isinstance(probe, ProbeReplica)
    assert isinstance(start, StartEngine)
    assert (w.state("m@1"), w.state("m@2")) == (State.READY, State.STARTING)
    w.probed("m@1")
    assert w.ask("r", "m") == [Admit("r", "m@1")]


def test_a_model_that_loses_its_replicas_keeps_the_first_ones_engine() -> None:
    """And a start that is under way meanwhile is answered by the new name."""
    w = World(replicas(2), PAIR)
    w.ask("r", "m")
    w.do(ModelsChanged((model("m"),)))
    assert set(w.pending) == {"m", "m@2"}
    assert w.answer("m") == [Admit("r", "m")]


def test_a_replica_that_is_called_something_else_keeps_its_engine() -> None:
    """A label in the configuration is only a name."""
    w = World(replicas(1), PAIR)
    w.ask("r", "m")
    w.answer("m@1")
    (spec,) = replicas(1)
    blue = replace(spec, replicas=(replace(spec.replicas[0], id="m@blue"),))
    assert w.do(ModelsChanged((blue,))) == [RenameReplica("m@1", "m@blue")]
    assert w.state("m@blue") is State.READY
    assert w.probed("m@blue") == [Admit("r", "m@blue")]


def test_what_one_replica_alone_has_is_not_asked_of_another() -> None:
    """A stored response: its engine, or a refusal at once."""
    w = serving(2)
    assert w.do(RequestArrived("r", "m", only="m@2")) == [Admit("r", "m@2")]
    w.finish("r")
    w.do(EngineExited("m@2", "gone"))
    w.do(RequestArrived("again", "m", only="m@2"))
    assert "which alone has it" in w.rejected["again"].message


def test_an_answer_to_a_probe_of_an_engine_that_is_gone_means_nothing() -> None:
    """It may come after the engine's successor has begun."""
    w = World([*replicas(1, **REMOTE)], [GPU])
    w.ask("r", "m")
    w.answer("m@1")
    (probe,) = w.probes
    w.do(EngineExited("m@1", "gone"))
    assert w.do(ReplicaProbed(probe, 0.1)) == []
    w.pass_time(10.0)
    w.answer("m@1")
    assert health(w, "m@1") == "new"


def test_a_model_none_of_whose_replicas_can_ever_fit_is_refused_with_the_arithmetic() -> None:
    """That it is unavailable, for no reason and with a Retry-After, would have clients try it for ever."""
    w = World(replicas(2, 200), PAIR)
    (refused,) = w.ask("r", "m")
    assert isinstance(refused, Reject)
    assert (refused.error, refused.retry_after) == (RejectReason.MODEL_TOO_LARGE, None)
    assert refused.message == "'m@1' needs 200 GiB on 1 device; devices 0, 1 have 80 GiB each"


def test_each_replica_that_is_down_is_named_with_its_reason() -> None:
    """One is disabled, and the other too large: the client cannot do anything about it, and the operator reads why."""
    (small,), (_, large) = replicas(1)[0].replicas, replicas(2, 200)[0].replicas
    w = World([ModelSpec("m", (small, large), ReplicaRules())], [GPU])
    w.do(ModelDisabled("m@1", "no more of this one"))
    (refused,) = w.ask("r", "m")
    assert isinstance(refused, Reject)
    assert refused.error == RejectReason.UNAVAILABLE
    assert "m@1: disabled: no more of this one; m@2: 'm@2' needs 200 GiB" in refused.message


# -- on a certain device


def test_three_at_once_who_want_the_model_on_a_device_get_one_engine_there() -> None:
    """The core decides, so nobody decides by what was true before the other."""
    w = World([model("m", 20)], PAIR)
    w.load("m")
    (there,) = w.view("m").devices
    other = 1 - there
    assert w.do(LoadAsked("m", there)) == []
    assert w.do(LoadAsked("m", other)) == [AddReplica("m", other)]
    assert w.do(LoadAsked("m", other)) == []
    (spec,) = replicas(2, 20)
    second = replace(spec.replicas[1], devices=(other,))
    several = replace(spec, replicas=(spec.replicas[0], second))
    started = [c for c in w.do(ModelsChanged((several,))) if isinstance(c, StartEngine)]
    assert [(c.replica, c.placement.devices) for c in started] == [("m@2", (other,))]
    assert w.do(LoadAsked("m", other)) == []


def test_one_that_is_not_loaded_is_bound_to_the_device_that_is_asked_for() -> None:
    """One on its way to a device is not called away to another; a stop sets it free."""
    w = World(replicas(2, 20, rules=ReplicaRules(least=1)), [*PAIR, Device(2, "2", 80 * GiB)])
    (start,) = w.do(LoadAsked("m", 2))
    assert isinstance(start, StartEngine)
    assert start.placement.devices == (2,)
    (other,) = w.do(LoadAsked("m", 1))
    assert isinstance(other, StartEngine)
    assert (other.replica != start.replica, other.placement.devices) == (True, (1,))
    assert w.do(LoadAsked("m", 0)) == [AddReplica("m", 0)]
    w.do(ReplicaRefused("m", 0, "a file says how many there are"))
    assert w.do(LoadAsked("m", 0)) == [AddReplica("m", 0)]
    w.do(StopAsked(start.replica))
    w.answer(start.replica)
    assert w.view(start.replica).bound is None


def test_a_probe_that_was_never_sent_tells_nothing_of_the_replica() -> None:
    """We had no file descriptor for it: one that serves goes on, one that is new is asked again, none is ejected."""
    w = serving(2)
    w.ask("long", "m")
    w.now += 1000.0
    w.do(TimePassed())
    (probe, name) = next(iter(w.probes.items()))
    w.do(ReplicaProbed(probe, None, "Too many open files", unsent=True))
    assert health(w, name) == "serving"
    assert w.probes == {}

    w = World(replicas(1, **REMOTE), [GPU])
    w.ask("first", "m")
    w.answer("m@1" if "m@1" in w.pending else next(iter(w.pending)))
    (probe,) = w.probes
    assert w.do(ReplicaProbed(probe, None, "Too many open files", unsent=True)) == [], "nor without a pause"
    (again,) = w.pass_time(w.now + 1.0)
    assert isinstance(again, ProbeReplica)
    assert w.probed(again.replica) == [Admit("first", again.replica)]
