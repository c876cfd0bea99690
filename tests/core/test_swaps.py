"""More models than memory: who stays, who leaves, in what order, and that nobody starves."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, PAIR, model
from tests.core.world import World
from vllmd.core.commands import (
    Admit,
    Command,
    ReadAhead,
    SleepEngine,
    StartEngine,
    StopEngine,
    StopReadAhead,
    WakeEngine,
)
from vllmd.core.events import (
    EngineAdopted,
    EngineAsleep,
    Event,
    LoadAsked,
    MemorySampled,
    ModelsChanged,
    RequestArrived,
    SleepAsked,
    StopAsked,
)
from vllmd.core.types import Footprint, Placement, Settings, State
from vllmd.sizes import GiB

POLICIES = ("adaptive", "lru")


@pytest.mark.parametrize("policy", POLICIES)
def test_three_that_fit_stay(policy: str) -> None:
    """Everything that fits is loaded beside the others; nobody leaves."""
    w = World([model(name, 25) for name in "abc"], [GPU], Settings(policy, 64 * GiB))
    w.load("a", "b", "c")
    assert [m.state for m in w.seen.models] == [State.READY] * 3


def test_the_least_recently_used_leaves_first() -> None:
    """A was touched last, so B leaves although A was loaded first."""
    w = World([model(name, 35) for name in "abc"], [GPU], Settings("lru", 64 * GiB))
    w.load("a", "b")
    w.now = 10.0
    w.ask("touch", "a")
    w.finish("touch")
    w.now = 20.0
    assert w.ask("r", "c") == [SleepEngine("b", 1)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_swap_step_by_step(policy: str) -> None:
    """Gate closed, drained, asleep, and only then does the target start; the victim's new requests wait."""
    w = World([model("a"), model("b")], [GPU], Settings(policy, 64 * GiB))
    w.load("a")
    w.ask("running", "a")
    w.ask("r", "b")
    w.pass_time(400.0)
    assert w.ask("late", "a") == []
    assert w.finish("running") == [SleepEngine("a", 1)]
    assert w.answer("a") == [StartEngine("b", Placement((0,)), 50 * GiB)]
    assert w.answer("b") == [Admit("r", "b")]
    w.settle()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_waiter_behind_a_never_idle_model_is_served(policy: str) -> None:
    """Twenty streams keep A busy for ever; B is served within its deadline and one drain."""
    w = World([model("a"), model("b")], [GPU], Settings(policy, 64 * GiB))
    w.load("a")
    w.ask("s0", "a")
    w.ask("rare", "b")
    n = 0
    while "rare" in w.queued:
        assert w.now < 300.0, "B starves"
        n += 1
        w.ask(f"s{n}", "a")
        w.pass_time(w.now + 2.0)
        for request in [r for r in w.running if w.running[r] == "a"][:1]:
            w.finish(request)
        for name in list(w.pending):
            w.answer(name)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_leaves_for_what_would_not_fit_even_then(policy: str) -> None:
    """Plan first: other programs hold too much, so evicting would be for nothing."""
    w = World([model("a", 20), model("b", 60)], [GPU], Settings(policy, 64 * GiB))
    w.load("a")
    w.do(MemorySampled({0: 30 * GiB}, {}))
    w.ask("r", "b")
    assert w.pass_time(590.0) == []
    assert "other programs hold 30 GiB on device 0" in next(m.waiting_for for m in w.seen.models if m.name == "b")


def test_a_target_takes_as_many_victims_as_it_needs_and_no_more() -> None:
    """Two of three leave for one of 50 GiB."""
    w = World([*(model(n, 25) for n in "abc"), model("big", 50, on_busy="evict")], [GPU], Settings(host_memory=0))
    w.load("a", "b", "c")
    w.ask("r", "big")
    w.settle()
    states = [m.state for m in w.seen.models]
    assert states.count(State.SLEEPING) == 2
    assert states.count(State.READY) == 2


def test_a_model_on_two_devices_takes_both_with_their_victims() -> None:
    """Tensor parallel 2: devices and victims are chosen together, and it starts once."""
    specs = [model("a", devices=(0,)), model("b", devices=(1,)), model("wide", 60, device_count=2, on_busy="evict")]
    w = World(specs, PAIR)
    w.load("a", "b")
    commands = w.ask("r", "wide")
    assert {type(c) for c in commands} == {SleepEngine}
    assert {c.replica for c in commands if isinstance(c, SleepEngine)} == {"a", "b"}
    assert w.answer("a") == []
    assert w.answer("b") == [StartEngine("wide", Placement((0, 1)), 60 * GiB)]


def test_a_newcomer_goes_where_nobody_has_to_leave() -> None:
    """The second device is empty."""
    w = World([model("a"), model("b")], PAIR)
    w.load("a")
    assert w.ask("r", "b") == [StartEngine("b", Placement((1,)), 50 * GiB)]


def test_starts_on_one_device_wait_for_each_other() -> None:
    """vLLM mis-sizes itself when two start together; on another device the start goes ahead."""
    w = World([model("a", 20, devices=(0,)), model("b", 20, devices=(0,)), model("c", 20, devices=(1,))], PAIR)
    assert [type(c) for c in w.ask("r1", "a")] == [StartEngine]
    assert w.ask("r2", "b") == []
    assert [type(c) for c in w.ask("r3", "c")] == [StartEngine]
    assert [type(c) for c in w.answer("a")] == [Admit, StartEngine]


def test_what_sleeping_freed_gates_the_wake() -> None:
    """Measured: 45 of 50 GiB came free, 5 stay; the wake needs those 45 back."""
    w = World([model("a"), model("b", 34)], [GPU])
    w.load("a")
    w.do(SleepAsked("a", 1))
    w.do(EngineAsleep("a", 1, {0: 45 * GiB}))
    assert w.seen.devices[0].promised == 5 * GiB
    w.load("b")
    w.ask("r", "a")
    w.pass_time(60.0)
    assert w.pending == {"b": SleepEngine("b", 1)}
    assert w.answer("b") == [WakeEngine("a", 1)]


def hints(w: World, event: Event) -> list[Command]:
    """What an event leads to that only saves time."""
    w.do(event)
    return [c for c in w.raw if isinstance(c, ReadAhead | StopReadAhead)]


def test_who_is_next_in_line_has_its_files_read_meanwhile() -> None:
    """From the moment the swap begins; what the sleeper takes of the host's memory is not for the files."""
    asleep = Footprint(50 * GiB, 50 * GiB, GiB, 20 * GiB)
    w = World([model("a", footprint=asleep), model("b")], [GPU])
    w.load("a")
    w.ask("kept", "a")
    assert hints(w, RequestArrived("r", "b")) == []  # nothing is decided yet
    assert hints(w, LoadAsked("b")) == [ReadAhead("b", 20 * GiB)]
    assert hints(w, StopAsked("b")) == [StopReadAhead("b")]


def test_what_wakes_from_host_memory_reads_no_file() -> None:
    """At level 1 the weights are in memory; at level 2 they are read again."""
    for level, wanted in ((1, []), (2, [ReadAhead("a", 0)])):
        w = World([model("a"), model("b", sleep_levels=frozenset())], [GPU])
        w.load("a")
        w.do(SleepAsked("a", level))
        w.do(EngineAsleep("a", level, {0: 49 * GiB}))
        w.load("b")
        assert hints(w, LoadAsked("a")) == wanted


def test_sleepers_stop_when_their_remainders_are_in_the_way() -> None:
    """A sleeper's gigabytes count: where all awake ones asleep are not enough, sleepers go."""
    left = Footprint(60 * GiB, 60 * GiB, 15 * GiB, 0)
    w = World([model("a", footprint=left), model("big", 70, on_busy="evict")], [GPU])
    w.load("a")
    w.do(SleepAsked("a", 2))
    w.answer("a")
    w.ask("r", "big")
    assert isinstance(w.pending["a"], StopEngine)
    assert isinstance(w.answer("a")[0], StartEngine)


def test_what_comes_free_less_than_promised_is_planned_anew() -> None:
    """The victim freed too little: the target does not start into memory that is not there."""
    w = World([model("a"), model("b", 75, on_busy="evict")], [GPU])
    w.load("a")
    assert w.ask("r", "b") == [SleepEngine("a", 1)]
    commands = w.do(EngineAsleep("a", 1, {0: 30 * GiB}))
    assert not any(isinstance(c, StartEngine) for c in commands)
    assert isinstance(w.pending["a"], StopEngine)
    assert isinstance(w.answer("a")[0], StartEngine)


def test_host_memory_goes_to_one_and_the_other_sleeps_deeper() -> None:
    """The budget of level-1 sleepers holds 10 GiB: enough for one of two."""
    specs = [model("a", 35), model("b", 35), model("big", 75, on_busy="evict")]
    w = World(specs, [GPU], Settings(host_memory=15 * GiB))
    w.load("a", "b")
    first = w.ask("r", "big")
    w.answer(first[0].replica)  # type: ignore[union-attr]
    (second,) = w.pending.values()
    assert {c.level for c in (*first, second) if isinstance(c, SleepEngine)} == {1, 2}


def test_what_runs_on_the_host_leaves_less_to_sleep_in() -> None:
    """Booked from the start to the stop, whatever its devices; nobody waits for it."""
    hungry = model("host", 0, device_count=0, sleep_levels=frozenset(), host_running=10 * GiB)
    w = World([hungry, model("a"), model("b", on_busy="evict")], [GPU], Settings(host_memory=15 * GiB))
    assert [type(c) for c in w.ask("r", "host")] == [StartEngine]
    assert w.seen.host_promised == 10 * GiB
    w.answer("host")
    w.load("a")
    assert w.ask("s", "b") == [SleepEngine("a", 2)]  # at level 1 it would take 10 GiB
    w.finish("r")
    w.do(StopAsked("host"))
    w.answer("host")
    assert w.seen.host_promised == 0


def test_engines_without_sleep_stop_instead() -> None:
    """The same swap, with a cold start on the way back."""
    w = World([model("a", sleep_levels=frozenset()), model("b", on_busy="evict")], [GPU])
    w.load("a")
    assert [type(c) for c in w.ask("r", "b")] == [StopEngine]
    assert [type(c) for c in w.answer("a")] == [StartEngine]


def test_every_swap_is_recorded_with_its_numbers() -> None:
    """``vllmctl why`` can say who left for whom, and what was weighed."""
    w = World([model("a"), model("b")], [GPU])
    w.load("a")
    w.ask("r", "b")
    w.pass_time(100.0)
    swap = next(d for d in w.seen.decisions if d.what == "swap")
    assert swap.model == "b"
    assert swap.numbers["victims"] == "a:1"
    assert swap.numbers["drain"] == "unlimited"
    assert {"waiting", "waited", "cost", "devices"} <= set(swap.numbers)


def test_the_last_thousand_decisions_are_kept() -> None:
    """Memory for the past is bounded."""
    w = World([model("huge", 100)], [GPU])
    for n in range(1100):
        w.ask(f"r{n}", "huge")
    assert len(w.seen.decisions) == 1000


def test_a_sleeper_that_was_seen_to_hold_more_than_there_is_wakes_all_the_same() -> None:
    """Awake it will hold less than now: nobody has to make room for that."""
    w = World([model("a", 30, queue_timeout=None)], [GPU])
    w.do(EngineAdopted("a", Placement((0,)), State.SLEEPING, 2))
    w.disturbed = True
    w.do(MemorySampled({}, {("a", 0): 90 * GiB}))
    assert w.ask("r", "a") == [WakeEngine("a", 2)]


def test_a_sleeper_wakes_in_turn_though_it_is_to_have_other_devices() -> None:
    """Where it sleeps another one moves, whatever the new configuration says of where it is to start next."""
    w = World([model("a", 30, devices=(0,)), model("b", 20, devices=(0,))], PAIR)
    w.load("a")
    w.do(SleepAsked("a", 1))
    w.answer("a")
    w.ask("r1", "b")
    w.do(ModelsChanged((model("a", 30, device_count=0), model("b", 20, devices=(0,)))))
    assert w.ask("r2", "a") == []
    assert w.answer("b") == [Admit("r1", "b"), WakeEngine("a", 1)]
