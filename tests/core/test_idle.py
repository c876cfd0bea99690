"""Unused models: sleep, sleep deeper, stop; the clock starts when the last request ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.core.helpers import GPU, NEVER, PAIR, model
from tests.core.world import World
from vllmd.core.commands import Admit, SleepEngine, StartEngine, StopEngine, WakeEngine
from vllmd.core.events import (
    EngineAdopted,
    EngineReady,
    EngineStopped,
    KeptAlive,
    LeaseTaken,
    MachineSlept,
    MemorySampled,
    PinSet,
    StopAsked,
    TimePassed,
)
from vllmd.core.lifecycle import LifecycleError
from vllmd.core.types import Device, Footprint, IdleRules, Placement, Settings, State
from vllmd.sizes import GiB

RULES = IdleRules(sleep_after=300.0, level=1, deepen_after=900.0, stop_after=1800.0)


def idle_world(**fields: object) -> World:
    w = World([model("m", 20, **{"idle": RULES, **fields})], [GPU])
    w.load("m")
    return w


def test_levels_in_order() -> None:
    """Asleep at 300 s, deeper (by a wake and a sleep) at 900 s, stopped at 1800 s."""
    w = idle_world()
    assert w.pass_time(299.0) == []
    assert w.pass_time(300.0) == [SleepEngine("m", 1)]
    w.answer("m")
    assert w.pass_time(900.0) == [WakeEngine("m", 1)]
    assert w.answer("m") == [SleepEngine("m", 2)]
    w.answer("m")
    assert w.pass_time(1800.0) == [StopEngine("m", "unused for 1800 s")]
    w.answer("m")
    assert w.scheduler.next_timer() is None


def test_the_clock_starts_when_the_last_request_ends() -> None:
    """A long stream is not cut, however long it takes."""
    w = idle_world()
    w.ask("stream", "m")
    assert w.pass_time(5000.0) == []
    w.finish("stream")
    assert w.pass_time(5299.0) == []
    assert w.pass_time(5300.0) == [SleepEngine("m", 1)]


def test_a_request_calls_off_a_sleep_that_has_not_begun() -> None:
    """Its device was busy with another model: the gate opens again, nobody waits."""
    w = World([model("m", 20, idle=RULES), model("other", 20)], [GPU])
    w.load("m")
    w.pass_time(299.0)
    w.ask("r1", "other")
    w.pass_time(301.0)
    assert w.state("m") is State.DRAINING
    assert w.ask("r2", "m") == [Admit("r2", "m")]


def test_a_request_ends_the_deepening() -> None:
    """It was woken only to sleep deeper, but now somebody wants it."""
    w = idle_world()
    w.pass_time(300.0)
    w.answer("m")
    w.pass_time(900.0)
    w.ask("r", "m")
    assert w.answer("m") == [Admit("r", "m")]


def test_sleeping_deeper_waits_for_room() -> None:
    """Nobody leaves for it; it is looked at again every few seconds."""
    w = World([model("m", 50, idle=RULES), model("big", 60)], [GPU])
    w.load("m")
    w.pass_time(300.0)
    w.answer("m")
    w.load("big")
    assert w.pass_time(1700.0) == []
    assert w.pass_time(1801.0) == [StopEngine("m", "unused for 1800 s")]


def test_an_engine_that_cannot_sleep_stops_instead() -> None:
    """At the time when it should have slept."""
    w = idle_world(sleep_levels=frozenset())
    assert w.pass_time(300.0) == [StopEngine("m", "unused for 300 s")]


def test_level_three_stops_at_once() -> None:
    """``unload_mode: 3`` of old configurations: no sleep at all."""
    w = idle_world(idle=IdleRules(300.0, 3, 900.0, 1800.0))
    assert w.pass_time(300.0) == [StopEngine("m", "unused for 300 s")]


def test_without_host_memory_it_sleeps_at_level_two() -> None:
    """The budget for level-1 sleepers is never exceeded."""
    w = World([model("m", 20, idle=RULES)], [GPU], Settings(host_memory=0))
    w.load("m")
    assert w.pass_time(300.0) == [SleepEngine("m", 2)]


def test_a_pinned_model_has_no_idle_rules() -> None:
    """Pinned means loaded; unpinned, its age counts from then."""
    w = idle_world(pinned=True)
    assert w.pass_time(5000.0) == []
    w.do(PinSet("m", False))
    assert w.pass_time(5299.0) == []
    assert w.pass_time(5300.0) == [SleepEngine("m", 1)]


def test_an_adopted_engine_keeps_its_age() -> None:
    """A restart of the daemon does not make an unused model young."""
    w = World([model("m", 20, idle=RULES)], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.READY, idle=250.0))
    assert w.scheduler.next_timer() == 50.0
    assert w.pass_time(50.0) == [SleepEngine("m", 1)]


def test_a_sleeper_may_be_adopted() -> None:
    """Its level tells how it is woken."""
    w = World([model("m", 20)], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.SLEEPING, level=2))
    assert w.ask("r", "m") == [WakeEngine("m", 2)]


def test_a_start_may_be_adopted() -> None:
    """The daemon was restarted while the engine loaded: its start is joined, not repeated."""
    w = World([model("m", 20), model("other", 20)], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.STARTING))
    assert w.ask("r1", "m") == []
    assert w.ask("r2", "other") == []
    assert [type(c) for c in w.answer("m")] == [Admit, StartEngine]


def test_preloading_loads_what_fits_in_order() -> None:
    """The third does not fit beside the others: it is left for its first request, and nobody leaves for it."""
    specs = [model(name, 30, preload=True, idle=NEVER) for name in "abc"]
    w = World(specs, [GPU])
    w.do(EngineAdopted("b", Placement((0,)), State.READY))
    assert w.scheduler.next_timer() == 0.0
    (start,) = w.do(TimePassed())
    assert isinstance(start, StartEngine)
    assert start.replica == "a"
    assert w.answer("a") == []
    assert w.scheduler.next_timer() is None
    assert w.state("c") is State.STOPPED


def test_an_adopted_engine_brings_its_measured_footprint() -> None:
    """What it was measured to hold is booked, not what was configured."""
    w = World([model("m", 20)], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.READY, footprint=Footprint(0, 23 * GiB)))
    assert w.seen.models[0].memory == 23 * GiB


def test_an_engine_that_fills_its_device_is_started_again() -> None:
    """What was measured of it is more than can be promised: a part lay in the reserve. It ran, so it will run again."""
    w = World([model("m", 78)], [Device(0, "gpu0", 80 * GiB, reserve=GiB)])
    w.ask("r1", "m")
    w.do(EngineReady("m", Footprint(81 * GiB, 80 * GiB)))
    w.finish("r1")
    w.do(StopAsked("m"))
    w.do(EngineStopped("m"))
    assert [type(c) for c in w.ask("r2", "m")] == [StartEngine]


def test_no_engine_is_adopted_twice() -> None:
    """The second report is refused, and the first one's devices stay as they are."""
    w = World([model("m", 20)], PAIR)
    w.do(EngineAdopted("m", Placement((0,)), State.READY))
    with pytest.raises(LifecycleError, match="adopted awake"):
        w.scheduler.handle(EngineAdopted("m", Placement((1,)), State.READY), 0)
    assert w.seen.models[0].devices == (0,)


def rests_in(w: World) -> float | None:
    return w.seen.models[0].rests_in


def test_keep_alive_holds_its_age_off() -> None:
    """The longest of what clients said counts; when it is over, its age is what it is."""
    w = idle_world()
    w.do(KeptAlive("m", "ada", 1000.0))
    w.do(KeptAlive("m", "bob", 500.0))
    assert rests_in(w) == 1000.0
    assert w.pass_time(999.0) == []
    assert w.pass_time(1000.0) == [SleepEngine("m", 1)]


def test_a_clients_last_word_counts() -> None:
    """As its next request may want it shorter; without a limit it stays, and the snapshot does not say infinite."""
    w = idle_world()
    w.do(KeptAlive("m", "ada", float("inf")))
    assert rests_in(w) is None
    w.do(KeptAlive("m", "ada", 400.0))
    assert rests_in(w) == 400.0


def test_a_short_keep_alive_takes_nothing_from_others() -> None:
    """The configured age is what everybody can count on."""
    w = idle_world()
    w.do(KeptAlive("m", "ada", 5.0))
    assert w.pass_time(299.0) == []
    assert w.pass_time(300.0) == [SleepEngine("m", 1)]


def test_who_needs_it_no_more_lets_it_go() -> None:
    """At once, as it would go at its age: asleep where it can sleep, whatever its rules say of time."""
    w = idle_world(idle=NEVER)
    w.ask("r1", "m")
    w.do(KeptAlive("m", "ada", 0.0))  # while r1 runs
    w.now = 10.0
    w.finish("r1")
    assert rests_in(w) is None  # and whoever sent r1 did not say that it was its last
    w.do(KeptAlive("m", "ada", 0.0))
    assert w.pass_time(10.0) == [SleepEngine("m", 1)]


def test_it_is_let_go_by_the_last_who_wants_it() -> None:
    """Nobody unloads what another client has just asked to keep."""
    w = idle_world()
    w.do(KeptAlive("m", "ada", 600.0))
    w.do(KeptAlive("m", "bob", 0.0))
    assert w.pass_time(10.0) == []
    w.do(KeptAlive("m", "ada", 0.0))
    assert w.pass_time(10.0) == [SleepEngine("m", 1)]


def test_use_after_it_was_let_go_counts_from_its_end() -> None:
    """Somebody else's request starts the clock as ever; the word of before is void."""
    w = idle_world()
    w.do(PinSet("m", True))
    w.do(KeptAlive("m", "ada", 0.0))
    w.now = 10.0
    w.ask("r1", "m")
    w.finish("r1")
    w.do(PinSet("m", False))
    assert rests_in(w) == 300.0


def test_keep_alive_is_no_claim_on_memory() -> None:
    """Clients send it by habit with every request: who needs the room gets it, as from any unused model."""
    w = World([model("m", 50, idle=RULES), model("other", 50)], [GPU])
    w.load("m")
    w.do(KeptAlive("m", "ada", 3600.0))
    assert w.ask("r1", "other") == [SleepEngine("m", 1)]


def test_a_sleeper_is_left_to_its_age() -> None:
    """It makes nothing free that anybody waits for: it goes deeper, or stops, when it is time."""
    w = idle_world()
    w.pass_time(300.0)
    w.answer("m")
    w.do(KeptAlive("m", "ada", 9000.0))
    assert w.pass_time(900.0) == [WakeEngine("m", 1)]


def test_the_time_that_the_machine_slept_counts_for_what_was_unused() -> None:
    """Five minutes before and eight hours asleep: it is not kept for another 25 minutes."""
    w = idle_world()
    w.do(KeptAlive("m", "ada", 1000.0))
    w.pass_time(200.0)
    assert w.do(MachineSlept(500.0)) == []  # ada's wish ends at 500 now
    assert w.pass_time(499.0) == []
    assert w.pass_time(501.0) == [SleepEngine("m", 1)]
    w.answer("m")
    assert w.do(MachineSlept(28_800.0)) == [StopEngine("m", "unused for 29801 s")]


def test_a_lease_ends_by_the_time_of_day() -> None:
    """An hour is an hour, also of a machine that slept for half of it."""
    w = idle_world()
    w.do(LeaseTaken("l", "m", 3600.0))
    w.pass_time(1700.0)
    w.do(MachineSlept(1800.0))
    assert w.pass_time(1799.0) == []
    assert [type(command) for command in w.pass_time(1801.0)] == [StopEngine]


def test_what_runs_or_waits_is_not_late_for_the_machines_sleep() -> None:
    """Nothing could happen meanwhile: neither is a queue's patience over, nor a request cut."""
    w = World([model("m", 60, drain_limit=10.0), model("n", 60, queue_timeout=100.0)], [GPU])
    w.load("m")
    w.ask("r1", "m")
    w.ask("r2", "n")
    assert w.do(MachineSlept(5000.0)) == []


def test_a_model_that_has_drawn_enough_unused_sleeps_before_its_time() -> None:
    """Counted from its last request on, and never what is older; a client's wish still holds it off."""
    w = idle_world(idle=replace(RULES, sleep_after=1000.0, energy=18_000.0))
    w.pass_time(100.0)
    assert w.do(MemorySampled({}, {}, drawn={"m": 17_999.0})) == []
    w.do(KeptAlive("m", "ada", 500.0))
    assert w.do(MemorySampled({}, {}, drawn={"m": 18_001.0})) == []
    w.ask("r1", "m")
    w.finish("r1")
    assert w.pass_time(350.0) == []  # what it drew before that request is not held against it
    w.do(MemorySampled({}, {}, drawn={"m": 18_001.0}))
    assert w.pass_time(599.0) == []  # ada's wish
    assert w.pass_time(600.0) == [SleepEngine("m", 1)]


def test_without_a_limit_of_energy_it_may_draw_what_it_likes() -> None:
    """That is so by default."""
    w = idle_world()
    assert w.do(MemorySampled({}, {}, drawn={"m": 1e9, "unknown": 5.0})) == []
