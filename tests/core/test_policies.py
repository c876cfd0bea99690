"""The policies as pure functions: one view in, one plan out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.helpers import by_device
from vllmd.core.eviction import Candidate, cover
from vllmd.core.policies import Adaptive, Lru
from vllmd.core.policy import (
    INFINITY,
    DeviceSupply,
    Knobs,
    OffloadOption,
    Plan,
    Policy,
    PolicyInput,
    Resident,
    Waiting,
)
from vllmd.simulate.baselines import ALL, LlamaSwap, Ollama

NOW = 1000.0
NAP = OffloadOption(1, 10, 1.0, 1.0)  # frees 10 bytes, a second each way
STOP = OffloadOption(0, 11, 3.0, 40.0)


def resident(model: str, **other: Any) -> Resident:
    """Idle for 100 s, on device 0, 10 bytes; nobody has asked for it lately."""
    r = Resident(model, (0,), False, (NAP, STOP), 0.0, NOW - 100, 0, 0, 4.0, 0.0, 0.0, NOW, False, False, 1.0)
    return r._replace(**other)


def busy(model: str, **other: Any) -> Resident:
    return resident(model, **{"running": 2, "used": NOW, "rate": 0.1, "rate_long": 0.1} | other)


def waiting(model: str, age: float = 1.0, **other: Any) -> Waiting:
    """One request, ``age`` seconds old; needs 10 bytes on device 0 and a second to wake."""
    w = Waiting(model, 1, NOW - age, NOW - age, 1.0, 1.0, 4.0, 10, (0,), 1, 1.0, False)
    return w._replace(**other)


def supply(device: int = 0, **other: Any) -> DeviceSupply:
    """Full, at rest; 100 bytes could come free by sleeping."""
    return DeviceSupply(device, 0, 100, 0.0, False, 0.0)._replace(**other)


def see(ws: list[Waiting], rs: list[Resident], *supplies: DeviceSupply) -> PolicyInput:
    there = {each.device: each for each in supplies or (supply(),)}
    return PolicyInput(NOW, sorted(ws, key=lambda w: w.oldest), by_device(rs), there, Knobs())


def victims(plan: Plan | None) -> list[str] | None:
    return sorted(v.model for v in plan.victims) if plan else None


def test_what_fits_is_loaded_at_once() -> None:
    """Nobody leaves for a model for which there is room."""
    plan = Adaptive().choose(see([waiting("w")], [resident("a")], supply(free=10)))
    assert plan is not None
    assert (plan.target, plan.devices, plan.victims) == ("w", (0,), ())


def test_an_idle_victim_leaves_before_a_busy_one() -> None:
    """Even where the busy one was asked for longer ago."""
    idle = resident("idle", used=NOW - 1, rate=0.01)
    assert victims(Adaptive().choose(see([waiting("w")], [busy("busy"), idle]))) == ["idle"]


def test_a_busy_victim_is_drained_only_at_the_deadline() -> None:
    """A drain leaves a whole engine idle; past the deadline the price is not asked."""
    assert Adaptive().choose(see([waiting("w", age=59)], [busy("busy")])) is None
    plan = Adaptive().choose(see([waiting("w", age=61)], [busy("busy")]))
    assert victims(plan) == ["busy"]
    assert plan is not None
    assert plan.drain == INFINITY


def test_a_busy_victim_that_may_be_frozen_leaves_earlier() -> None:
    """Freezing idles nobody: rent is paid sooner."""
    plan = Adaptive().choose(see([waiting("w", age=20)], [busy("busy", freezable=True)]))
    assert victims(plan) == ["busy"]
    assert plan is not None
    assert plan.drain < INFINITY


def test_sleepers_that_start_quickly_are_stopped_rather_than_the_busy_waited_for() -> None:
    """In a batch of 20 models their remainders took a third place; who starts slowly, or is waited for, stays."""
    quick, slow = OffloadOption(0, 1, 0.1, 0.25), OffloadOption(0, 1, 3.0, 20.0)
    w, there = waiting("w", age=3.0, need=11), [busy("busy"), resident("idle")]
    for stop, leave in ((quick, ["idle", "rest"]), (slow, None), (STOP._replace(frees=1), None)):
        rest = resident("rest", asleep=True, options=(stop,))
        assert victims(Adaptive().choose(see([w], [*there, rest]))) == leave
    asked = waiting("rest", age=1.0, need=200)  # which does not fit either
    assert Adaptive().choose(see([w, asked], [*there, resident("rest", asleep=True, options=(quick,))])) is None


def test_a_model_that_was_just_loaded_serves_its_time() -> None:
    """Else two busy models would only swap places."""
    assert Adaptive().choose(see([waiting("w", age=60)], [busy("new", since=NOW - 1)])) is None


def test_an_idle_victim_leaves_at_once() -> None:
    """A device must not stand idle while somebody waits for it, whatever the victim's past and priority."""
    for once_popular in (resident("a", rate=0.9, rate_long=0.5), resident("a", rate=0.3, priority=100.0)):
        assert victims(Adaptive().choose(see([waiting("w", age=0.0)], [once_popular]))) == ["a"]


def test_an_idle_victim_that_is_expected_back_is_spared_for_one_swap_and_no_longer() -> None:
    """Rent at most the price of buying: two requests a second, and a swap that is known to take two."""
    known = resident("popular", rate=2.0, options=(NAP._replace(learnt=1.0), STOP))
    for age, leaves in ((0.1, None), (1.9, None), (2.1, ["popular"])):
        assert victims(Adaptive().choose(see([waiting("w", age=age, learnt=1.0)], [known]))) == leaves


def test_what_nobody_has_measured_spares_nobody() -> None:
    """A prior of forty seconds for an engine that was never loaded kept another out for as long."""
    popular = resident("popular", rate=2.0)
    assert victims(Adaptive().choose(see([waiting("w", age=0.1, load=40.0)], [popular]))) == ["popular"]


def test_a_drain_limit_is_a_promise() -> None:
    """Who waits behind a busy model with a limit waits no longer than that, and the swap."""
    at_once = busy("busy", drain_limit=2.0)
    assert victims(Adaptive().choose(see([waiting("w", age=0.1)], [at_once]))) == ["busy"]
    later = busy("busy", drain_limit=20.0)  # its two requests take some 5 s: there is time for patience
    assert Adaptive().choose(see([waiting("w", age=10.0)], [later])) is None
    assert victims(Adaptive().choose(see([waiting("w", age=15.5)], [later]))) == ["busy"]


def test_a_drain_limit_bounds_the_time_that_a_new_model_is_left_alone() -> None:
    """It was kept for three swaps by figures that nobody had measured, and twenty models waited for it in turn."""
    new = busy("new", since=NOW - 2.5, drain_limit=2.0, options=(NAP._replace(takes=4.0, back=4.0), STOP))
    assert victims(Adaptive().choose(see([waiting("w", age=1.0)], [new]))) == ["new"]


@pytest.mark.parametrize("policy", [Adaptive(), Lru()])
def test_priority_orders_those_who_wait(policy: Policy) -> None:
    """Of two who come together, and of one who waits a little longer; but age counts: nobody is starved by it."""
    models = [resident("a")]
    dear, cheap = waiting("dear", age=1.0, priority=10.0), waiting("cheap", age=3.0)
    plan = policy.choose(see([dear, cheap], models))
    assert plan and plan.target == "dear"
    plan = policy.choose(see([dear, cheap._replace(oldest=NOW - 25, arrived=NOW - 25)], models))
    assert plan and plan.target == "cheap"


def test_priority_protects_work_in_progress() -> None:
    """A busy model is dearer by its priority: the other busy one is drained."""
    models = [busy("dear", priority=10.0), busy("cheap", rate=0.2)]
    assert victims(Adaptive().choose(see([waiting("w", age=61)], models))) == ["cheap"]


def test_sleepers_are_not_stopped_for_want_of_patience() -> None:
    """All that is awake is on the move: waiting for it beats a cold start later on."""
    sleeper = resident("sleeper", asleep=True, options=(STOP,))
    for policy in (Adaptive(), Lru()):
        assert policy.choose(see([waiting("w", age=60)], [sleeper], supply(until=NOW + 2.0))) is None


@pytest.mark.parametrize("policy", [Adaptive(), Lru()])
def test_sleepers_are_stopped_where_nothing_else_is_enough(policy: Policy) -> None:
    """What all sleepers hold can be the difference."""
    sleeper = resident("sleeper", asleep=True, options=(STOP,))
    s = see([waiting("w", age=60, need=20)], [sleeper, resident("a")], supply(sleepable=10))
    assert victims(policy.choose(s)) == ["a", "sleeper"]


def test_first_comes_who_has_waited_most_per_second_of_load() -> None:
    """A swap first goes where it ends most waiting: to many who came later, or to one that loads in a moment."""

    def first(*ws: Waiting) -> str | None:
        plan = Adaptive().choose(see(list(ws), [resident("idle")]))
        return plan and plan.target

    many = waiting("many", age=4, waiters=5, arrived=5 * (NOW - 4))
    assert first(waiting("old", age=9), many) == "many"
    assert first(waiting("slow", age=9, load=20.0), waiting("quick", age=4)) == "quick"
    assert first(waiting("old", age=9), waiting("dear", age=8, priority=2.0)) == "dear"
    assert first(waiting("old", age=9), waiting("young", age=8)) == "old"


def test_past_the_deadline_the_oldest_comes_first_however_many_others_wait() -> None:
    """Else one lone request could be overtaken for ever."""
    many = waiting("many", age=50, waiters=9, arrived=9 * (NOW - 50))
    plan = Adaptive().choose(see([waiting("late", age=62), many], [resident("idle")]))
    assert plan is not None
    assert plan.target == "late"


def test_nobody_overtakes_one_that_is_overdue() -> None:
    """A large one waits for a busy model to serve its time; a small one may not take the idle one's place meanwhile."""
    large = waiting("large", age=61, need=20)
    small = waiting("small", age=5)
    models = [resident("idle"), busy("new", since=NOW - 1)]
    assert Adaptive().choose(see([large, small], models)) is None
    assert victims(Adaptive().choose(see([small], models))) == ["idle"]


def test_another_device_is_not_held() -> None:
    """The order holds only where it is a matter of the same memory."""
    large = waiting("large", age=61, need=20)
    small = waiting("small", age=5, devices=(1,))
    models = [resident("idle"), busy("new", since=NOW - 1), resident("there", devices=(1,))]
    plan = Adaptive().choose(see([large, small], models, supply(0), supply(1)))
    assert plan is not None
    assert (plan.target, victims(plan)) == ("small", ["there"])


def test_gates_are_not_closed_for_a_transfer_that_cannot_begin() -> None:
    """The device is taken for 20 s yet: the victim may serve until then."""
    for policy in (Adaptive(), Lru()):
        assert policy.choose(see([waiting("w", age=60)], [resident("a")], supply(until=NOW + 20.0))) is None
        assert policy.choose(see([waiting("w", age=60)], [resident("a")], supply(until=NOW + 0.5))) is not None


def test_lru_takes_the_least_recently_used_for_the_oldest() -> None:
    """Its two rules, and no other."""
    models = [resident("recent", used=NOW - 1), resident("old", used=NOW - 50), busy("busy", used=NOW - 70)]
    plan = Lru().choose(see([waiting("young", 1), waiting("elder", 2)], models))
    assert plan is not None
    assert (plan.target, victims(plan)) == ("elder", ["old"])


def test_llama_swap_waits_for_idle_victims_and_lets_others_pass() -> None:
    """Its queue is walked until somebody's victims are idle."""
    models = [busy("busy"), resident("idle", options=(NAP._replace(frees=5), STOP))]
    s = see([waiting("big", 99), waiting("little", 1, need=5)], models)
    plan = LlamaSwap().choose(s)
    assert plan is not None
    assert (plan.target, victims(plan)) == ("little", ["idle"])


def test_ollamas_head_of_the_queue_blocks_it() -> None:
    """Even for a model that would fit."""
    s = see([waiting("big", 99, need=50), waiting("little", 1, need=5)], [busy("busy")], supply(free=7))
    assert Ollama().choose(s) is None


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_planned_where_nobody_waits(name: str) -> None:
    """Policies act for somebody."""
    assert ALL[name].choose(see([], [resident("a")])) is None


def candidate(price: float, frees: int) -> Candidate:
    return Candidate(price, resident(f"{price}/{frees}"), OffloadOption(1, frees, 1.0, 1.0))


def test_the_cheapest_set_is_found() -> None:
    """Not the one with the cheapest member, nor the smallest."""
    group = [candidate(5.0, 10), candidate(1.0, 4), candidate(2.0, 6), candidate(0.5, 1)]
    chosen = cover(group, 10, most=4)
    assert chosen is not None
    assert sorted(each.price for each in chosen) == [1.0, 2.0]


def test_more_than_the_usual_number_leave_where_fewer_are_not_enough() -> None:
    """A large model beside many small ones must not wait for ever."""
    group = [candidate(float(n), 1) for n in range(8)]
    chosen = cover(group, 6, most=4)
    assert chosen is not None
    assert sum(each.option.frees for each in chosen) == 6
    assert cover(group, 9, most=4) is None
