"""The snapshot: what ``vllmctl ps`` and ``why`` can tell."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, model
from tests.core.world import World
from vllmd.core.commands import Reject
from vllmd.core.events import EngineExited, EngineStopped, LeaseTaken, LoadAsked, PinSet, SleepAsked, StopAsked
from vllmd.core.types import ModelView, State
from vllmd.core.views import _model, _so_far
from vllmd.sizes import GiB


def view(w: World, name: str = "m") -> ModelView:
    return next(m for m in w.seen.models if m.name == name)


def test_why_a_request_waits_is_told_at_every_stage() -> None:
    """Start, place, drain of others, falling asleep, wake: each in a few words."""
    w = World([model("m", concurrency=1), model("other")], [GPU])
    w.ask("r1", "m")
    w.now = 12.0
    assert view(w).waiting_for == "its start (12 of about 48 s)"
    w.answer("m")
    w.ask("r2", "m")
    assert view(w).waiting_for == "a place in the engine (1 run at a time)"
    w.ask("r3", "other")
    w.pass_time(400.0)
    assert view(w, "other").waiting_for.startswith("m to leave (1 request runs there), in about ")
    w.finish("r1")
    assert view(w, "other").waiting_for == "m to leave, in about 14 s"
    assert view(w).waiting_for == "the end of its falling asleep"


def test_a_crashed_models_waiters_are_told_of_the_restart() -> None:
    """The reason and the seconds left."""
    w = World([model("m", concurrency=1, restart_backoff=5.0)], [GPU])
    w.load("m")
    w.ask("r1", "m")
    w.ask("r2", "m")
    w.do(EngineExited("m", "exit status 139"))
    assert view(w).waiting_for == "a restart in 5 s after: exit status 139"


def test_a_wedged_device_is_named() -> None:
    """Whoever waits for it should know."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(StopAsked("m"))
    w.do(EngineStopped("m", missing={0: 40 * GiB}))
    w.ask("r", "m")
    assert view(w).waiting_for == "room; device 0 is avoided: 40 GiB did not come back after a stop"


def test_who_keeps_the_room_is_named() -> None:
    """One may ask him, and need not wonder why the policy does nothing."""
    w = World([model("m"), model("other")], [GPU])
    w.load("m")
    w.do(LeaseTaken("ada-17", "m"))
    w.ask("r", "other")
    assert view(w, "other").waiting_for == "room beside m (leased)"
    w.do(PinSet("m", True))
    assert view(w, "other").waiting_for == "room beside m (pinned)"


def test_a_sleepers_row() -> None:
    """Level, remainder, age, leases: as ``ps`` prints them."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 2))
    w.answer("m")
    w.do(LeaseTaken("l", "m"))
    w.now = 7.0
    row = view(w)
    assert (row.state, row.level, row.devices, row.memory) == (State.SLEEPING, 2, (0,), 1 * GiB)
    assert (row.idle, row.since, row.leases, row.waiting_for) == (7.0, 7.0, ("l",), "")


def test_a_snapshot_is_a_copy() -> None:
    """What was handed out does not change behind the reader's back."""
    w = World([model("m")], [GPU])
    before = w.seen
    w.load("m")
    assert before.models[0].state is State.STOPPED
    assert before.decisions == ()


def test_who_waits_is_told_the_plan() -> None:
    """For whom, until when, and after that how long: never a cause that is not the cause."""
    w = World([model("a"), model("b")], [GPU])
    w.load("a")
    w.ask("r1", "a")
    w.ask("r2", "b")
    told = next(m.waiting_for for m in w.seen.models if m.name == "b")
    assert told.startswith("a to be idle (1 request runs there); its requests are no longer let in from ")
    w.pass_time(200.0)
    told = next(m.waiting_for for m in w.seen.models if m.name == "b")
    assert told.startswith("a to leave (1 request runs there), in about ")
    w.finish("r1")
    assert next(m.waiting_for for m in w.seen.models if m.name == "b").startswith("a swap in ") or w.pending


def test_coming_back_makes_sense_once_the_plan_is_done() -> None:
    """Retry-After is the time until the model serves: the swap with its cold start, not a second."""
    w = World([model("a", start_time=30.0), model("b", queue_limit=1, start_time=30.0)], [GPU])
    w.ask("r1", "a")
    w.now = 30.0  # so long its start takes, as was expected
    w.answer("a")
    w.ask("r2", "b")
    refused = w.ask("r3", "b")[0]
    assert isinstance(refused, Reject) and refused.retry_after is not None
    assert 60.0 < refused.retry_after < 120.0  # the patience with a, its drain, its sleep, the start


def test_an_operators_start_acts_at_once() -> None:
    """Busy models are drained for it without the patience that a request has."""
    w = World([model("a"), model("b")], [GPU])
    w.load("a")
    w.ask("r1", "a")
    w.do(LoadAsked("b"))
    assert w.state("a") is State.DRAINING


@pytest.mark.parametrize(
    ("passed", "usual", "told"),
    [
        (8.4, 0.0, "8.4 s"),
        (8.4, 0.5, "8.4 s, 0.5 s usually"),
        (0.2, 0.5, "0.2 of about 0.5 s"),
        (12, 48, "12 of about 48 s"),
    ],
)
def test_what_it_usually_takes_is_told_where_it_says_something(passed: float, usual: float, told: str) -> None:
    """Never "8 of about 0 s"."""
    assert _so_far(passed, usual) == told


def test_the_view_of_an_unused_model_is_kept_until_something_changes() -> None:
    """Of ten thousand models nearly all are never used; a lease, a request or a reload is seen at once all the same."""
    w = World([model("m"), model("other")], [GPU])
    unused = view(w, "other")
    core = w.scheduler.core
    assert unused == _model(core, core.models["other"], 0.0, lambda r: ""), "drawn by a shorter way"
    w.now = 100.0
    assert view(w, "other") is unused
    w.do(LeaseTaken("ada-17", "other"))
    assert view(w, "other").leases == ("ada-17",)
    w.ask("r", "m")
    assert view(w).waiting_for
    w.answer("m")
    assert view(w).in_flight == 1
    assert [each.name for each in w.scheduler.activity(w.now).models] == ["m"], "nothing goes on with the other one"
    assert [each.id for each in w.scheduler.replicas_of("other", w.now)] == ["other"]
    assert w.scheduler.replicas_of("nobody", w.now) == []
