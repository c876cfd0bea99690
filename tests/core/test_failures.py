"""Failures: bounded restarts, one more try with more room, wedged devices; never a permanent wedge."""

from __future__ import annotations

from tests.core.helpers import GPU, PAIR, model
from tests.core.world import World
from vllmd.core.commands import Admit, CutRequest, Reject, SleepEngine, StartEngine, StopEngine
from vllmd.core.events import (
    EngineAdopted,
    EngineExited,
    EngineReady,
    EngineSleepFailed,
    EngineStartFailed,
    EngineStopped,
    EngineWakeFailed,
    FailureRemembered,
    MemorySampled,
    RequestFinished,
    SleepAsked,
    StopAsked,
)
from vllmd.core.types import Footprint, Placement, State
from vllmd.sizes import GiB


def test_a_failed_start_is_told_to_every_waiter() -> None:
    """The reason, which ends with the last log lines, reaches them all at once."""
    w = World([model("m")], [GPU])
    w.ask("r1", "m")
    w.ask("r2", "m")
    told = w.do(EngineStartFailed("m", "no such file: /models/m"))
    assert [(c.request, c.error, c.message) for c in told if isinstance(c, Reject)] == [
        ("r1", "EngineFailed", "no such file: /models/m"),
        ("r2", "EngineFailed", "no such file: /models/m"),
    ]


def test_a_failed_model_refuses_until_its_back_off_is_over() -> None:
    """No storm of starts; and who comes after the back-off gets a new try."""
    w = World([model("m", restart_backoff=5.0)], [GPU])
    w.ask("r1", "m")
    w.do(EngineStartFailed("m", "broken"))
    (refusal,) = w.ask("r2", "m")
    assert isinstance(refusal, Reject)
    assert refusal.retry_after == 5.0
    w.now = 5.0
    assert isinstance(w.ask("r3", "m")[0], StartEngine)


def test_the_back_off_doubles_with_each_failure_in_a_row() -> None:
    """A model that keeps failing is tried ever more seldom, but at least every 300 s."""
    w = World([model("m", restart_backoff=5.0)], [GPU])
    waits = []
    for n in range(9):
        w.ask(f"r{n}", "m")
        refusals = w.do(EngineStartFailed("m", "broken"))
        waits.append(next(c.retry_after for c in refusals if isinstance(c, Reject)))
        w.now += waits[-1] or 0
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_failures_with_good_service_between_are_not_in_a_row() -> None:
    """One failed start a day, with hours of service between, is the first failure of its day."""
    w = World([model("m", restart_backoff=5.0)], [GPU])
    for day in range(4):
        w.ask(f"bad{day}", "m")
        refusals = w.do(EngineStartFailed("m", "once a day"))
        assert [c.retry_after for c in refusals if isinstance(c, Reject)] == [5.0]
        w.now += 400
        w.ask(f"good{day}", "m")
        w.do(EngineReady("m"))
        w.do(RequestFinished(f"good{day}"))
        w.now += 3600
        w.do(StopAsked("m"))
        w.do(EngineStopped("m"))


def test_waiters_wait_through_the_restart_after_a_crash() -> None:
    """Those inside are the proxy's to answer; those who wait are served by the new engine."""
    w = World([model("m", concurrency=1, restart_backoff=5.0)], [GPU])
    w.load("m")
    w.ask("r1", "m")
    w.ask("r2", "m")
    assert w.do(EngineExited("m", "exit status 139")) == []
    w.do(RequestFinished("r1"))
    (start,) = w.pass_time(6.0)
    assert isinstance(start, StartEngine)
    assert w.answer("m") == [Admit("r2", "m")]


def test_a_model_that_keeps_crashing_is_given_up() -> None:
    """Restarts are bounded; then the reason is told."""
    w = World([model("m", concurrency=1, max_restarts=2, restart_backoff=1.0)], [GPU])
    w.load("m")
    w.ask("inside0", "m")
    w.ask("waiter", "m")
    told: list[object] = []
    for n in range(3):
        told = w.do(EngineExited("m", f"crash {n}"))
        for request in list(w.running):
            w.finish(request)
        w.pass_time(w.now + 10)
        if w.pending and n < 2:
            w.ask(f"fresh{n}", "m")
            w.answer("m")
            w.ask(f"behind{n}", "m")
    assert any(isinstance(c, Reject) and c.message == "crash 2" for c in told)
    assert w.state("m") is State.FAILED


def test_an_engine_that_served_long_has_put_its_failures_behind_it() -> None:
    """One crash a day is not a crash loop."""
    w = World([model("m", max_restarts=1, restart_backoff=1.0)], [GPU])
    for n in range(4):
        w.ask(f"r{n}", "m")
        w.pass_time(w.now + 2)
        w.answer("m")
        w.finish(f"r{n}")
        w.now += 3600
        w.do(EngineExited("m", "cosmic ray"))
        w.now += 2
    assert w.ask("again", "m") != []


def test_an_operators_stop_forgets_a_failure() -> None:
    """``vllmctl stop`` clears the error, and the next request starts at once."""
    w = World([model("m", restart_backoff=300.0)], [GPU])
    w.ask("r1", "m")
    w.do(EngineStartFailed("m", "broken"))
    w.do(StopAsked("m"))
    assert w.state("m") is State.STOPPED
    assert isinstance(w.ask("r2", "m")[0], StartEngine)


def test_a_start_without_memory_is_tried_once_more_with_more_room() -> None:
    """What it said it needs is learnt, booked and told to it; others make that room."""
    w = World([model("small", 20), model("m", 50)], [GPU])
    w.load("small")
    w.ask("r", "m")
    assert w.do(EngineStartFailed("m", "out of memory", memory=True, needed=65 * GiB)) == [] or w.pending
    w.pass_time(60.0)
    while "m" not in w.pending:
        w.answer(next(iter(w.pending)))
    assert w.pending["m"] == StartEngine("m", Placement((0,)), 65 * GiB)
    (told,) = w.do(EngineStartFailed("m", "out of memory", memory=True))
    assert isinstance(told, Reject)


def test_a_permanent_failure_is_not_tried_again() -> None:
    """No room in the world helps a command that does not exist."""
    w = World([model("m")], [GPU])
    w.ask("r", "m")
    (told,) = w.do(EngineStartFailed("m", "no such command", memory=True, permanent=True))
    assert isinstance(told, Reject)


def test_needing_more_than_the_machine_has_is_said() -> None:
    """The second try is spared when no device could hold it."""
    w = World([model("m", 50)], [GPU])
    w.ask("r", "m")
    (told,) = w.do(EngineStartFailed("m", "out of memory", memory=True, needed=90 * GiB))
    assert isinstance(told, Reject)
    assert told.error == "ModelTooLarge"


def test_a_failed_sleep_or_wake_ends_in_a_full_stop() -> None:
    """A half-done sleep is an unknown state; vLLM serves garbage from some of them."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    assert w.do(EngineSleepFailed("m", "500")) == [StopEngine("m", "falling asleep failed: 500")]
    w.answer("m")
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    w.ask("r", "m")
    assert w.do(EngineWakeFailed("m", "500")) == [StopEngine("m", "waking failed: 500")]
    assert [type(c).__name__ for c in w.answer("m")] == ["StartEngine"]
    assert w.answer("m") == [Admit("r", "m")]


def test_who_fails_to_sleep_twice_is_stopped_instead() -> None:
    """An engine whose sleep is broken is not asked a third time."""
    w = World([model("m")], [GPU])
    for _ in range(2):
        w.load("m")
        w.do(SleepAsked("m", 1))
        w.do(EngineSleepFailed("m", "500"))
        w.answer("m")
    w.load("m")
    assert isinstance(w.do(SleepAsked("m", 1))[0], StopEngine)


def test_memory_that_does_not_come_back_wedges_the_device() -> None:
    """The next start goes elsewhere until a sample shows the memory free again."""
    w = World([model("a"), model("b", devices=(0,))], PAIR)
    w.load("a")
    w.do(StopAsked("a"))
    w.do(EngineStopped("a", missing={0: 40 * GiB}))
    assert w.seen.devices[0].wedged == "40 GiB did not come back after a stop"
    assert w.ask("r1", "a") == [StartEngine("a", Placement((1,)), 50 * GiB)]
    assert w.ask("r2", "b") == []
    assert w.do(MemorySampled({0: 0, 1: 0}, {})) == [StartEngine("b", Placement((0,)), 50 * GiB)]


def test_a_sleeper_on_a_wedged_device_moves() -> None:
    """It is stopped there and started where it can run."""
    w = World([model("a", 20), model("b", 20, devices=(0,))], PAIR)
    w.do(EngineAdopted("a", Placement((0,)), State.SLEEPING, level=2))
    w.load("b")
    w.do(StopAsked("b"))
    w.do(EngineStopped("b", missing={0: 15 * GiB}))
    w.ask("r", "a")
    assert isinstance(w.pending["a"], StopEngine)
    assert w.answer("a") == [StartEngine("a", Placement((1,)), 20 * GiB)]


def test_nvml_that_lies_is_cut_to_size() -> None:
    """Negative or impossible figures neither make room nor take more than there is."""
    w = World([model("m")], [GPU])
    w.do(MemorySampled({0: -10, 7: 5}, {("m", 0): -3, ("ghost", 0): 5}))
    assert w.seen.devices[0].external == 0
    w.do(MemorySampled({0: 10**15}, {}))
    assert w.seen.devices[0].external == 80 * GiB
    assert w.ask("r", "m") == []
    w.do(MemorySampled({0: 0}, {}, failed={0: "GPU is lost"}))
    assert w.seen.devices[0].external == 80 * GiB
    w.do(MemorySampled({0: 0}, {}))
    assert isinstance(w.pending["m"], StartEngine)


def test_requests_inside_a_broken_engine_are_cut() -> None:
    """Frozen requests die with a wake that failed, and are told so."""
    w = World([model("m", preempt=True, drain_limit=None), model("other", on_busy="evict")], [GPU])
    w.load("m")
    w.answer("m")  # the proof of freezing
    w.ask("inside", "m")
    w.ask("r", "other")
    w.pass_time(w.now + 400)
    assert w.pending["m"] == SleepEngine("m", 1, freeze=True)
    w.answer("m")
    w.answer("other")
    w.finish("r")
    w.pass_time(w.now + 150)
    while "m" not in w.pending:
        w.answer(next(iter(w.pending)))
    told = w.do(EngineWakeFailed("m", "500"))
    assert CutRequest("inside", "waking failed: 500") in told


def test_a_measured_footprint_replaces_the_configured_one() -> None:
    """Measured beats configured beats estimated; what the engine is told stays as configured."""
    w = World([model("m", 50)], [GPU])
    w.ask("r", "m")
    w.do(EngineReady("m", Footprint(55 * GiB, 54 * GiB)))
    assert w.seen.models[0].memory == 54 * GiB
    w.do(MemorySampled({0: 0}, {("m", 0): 2 * GiB}))
    assert w.seen.models[0].memory == 54 * GiB, "a sample from before it was ready"
    w.now = 10.0
    w.do(MemorySampled({0: 0}, {("m", 0): 53 * GiB}))
    assert w.seen.models[0].memory == 53 * GiB
    w.finish("r")
    w.do(StopAsked("m"))
    w.answer("m")
    assert w.ask("again", "m") == [StartEngine("m", Placement((0,)), 50 * GiB)]
    assert w.seen.models[0].memory == 54 * GiB


def test_a_failure_that_an_earlier_daemon_saw_is_shown_and_may_be_tried_again_at_once() -> None:
    """Whoever restarts the daemon has often mended the cause; who looks into it wants to see the cause."""
    w = World([model("m")], [GPU])
    w.now = 100.0
    w.do(FailureRemembered("m", "no such file", since=40.0))
    seen = w.seen.models[0]
    assert (seen.state, seen.failure, seen.since) == (State.FAILED, "no such file", 40.0)
    assert isinstance(w.ask("r", "m")[0], StartEngine)


def test_a_failure_is_not_remembered_of_an_engine_that_runs_or_is_to_be_preloaded() -> None:
    """It has been started since, or is about to be."""
    w = World([model("a"), model("b", preload=True)], PAIR)
    w.do(EngineAdopted("a", Placement((0,)), State.READY))
    w.do(FailureRemembered("a", "no such file"))
    w.do(FailureRemembered("b", "no such file"))
    assert [view.failure for view in w.seen.models] == ["", ""]
