"""What is asked of an engine while something else is to happen to it: one test per row of the table of merges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vllmd.core
from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import Admit, SleepEngine, StartEngine, StopEngine, WakeEngine
from vllmd.core.events import (
    DeviceDrained,
    EngineExited,
    EngineStartFailed,
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    ModelsChanged,
    RequestGone,
    SleepAsked,
    StopAsked,
)
from vllmd.core.jobs import current, merge, new
from vllmd.core.lifecycle import MERGES, Current, Kind, New, Reason, jobs_table
from vllmd.core.model import Job
from vllmd.core.types import IdleRules, State
from vllmd.sizes import GiB


def job(kind: Kind, reason: Reason, *, force: bool = False, then: Job | None = None) -> Job:
    return Job(kind, reason, "why", 1.0, 1 if kind is Kind.SLEEP else 0, force=force, then=then)


def a_start() -> Job:
    return job(Kind.START, Reason.OPERATOR)


# What a job finds: a job, and whether its command is out.
FOUND: dict[Current, Callable[[], tuple[Job | None, bool]]] = {
    Current.NONE: lambda: (None, False),
    Current.WANTED: lambda: (a_start(), False),
    Current.STARTS: lambda: (a_start(), True),
    Current.WAKES: lambda: (job(Kind.WAKE, Reason.OPERATOR), True),
    Current.OWN: lambda: (job(Kind.SLEEP, Reason.IDLE), False),
    Current.BY_HAND: lambda: (job(Kind.SLEEP, Reason.OPERATOR), False),
    Current.SWAP: lambda: (job(Kind.SLEEP, Reason.SWAP), False),
    Current.MUST: lambda: (job(Kind.STOP, Reason.CONFIG), False),
    Current.DOWN: lambda: (job(Kind.SLEEP, Reason.IDLE), True),
    Current.STOPS: lambda: (job(Kind.STOP, Reason.IDLE), True),
}
ASKED: dict[New, Callable[[], Job]] = {
    New.START: a_start,
    New.OWN: lambda: job(Kind.STOP, Reason.IDLE),
    New.SLEEP: lambda: job(Kind.SLEEP, Reason.OPERATOR),
    New.STOP: lambda: job(Kind.STOP, Reason.OPERATOR),
    New.MUST: lambda: job(Kind.STOP, Reason.DEVICE),
    New.FORCE: lambda: job(Kind.STOP, Reason.DEVICE, force=True),
}
# What then is to happen, in order: "kind reason", and "!" where the command under way is overtaken.
# The columns: a start, own accord, operator's sleep, operator's stop, must leave, force.
AFTERWARDS: dict[Current, tuple[str, str, str, str, str, str]] = {
    Current.NONE: ("start operator", "stop idle", "sleep operator", "stop operator", "stop device", "stop device"),
    Current.WANTED: (
        "start operator",
        "start operator",
        "sleep operator",
        "stop operator",
        "stop device, start operator",
        "stop device, start operator",
    ),
    Current.STARTS: (
        "start operator",
        "start operator",
        "start request, sleep operator",
        "! stop operator",
        "start operator, stop device",
        "! stop device, start operator",
    ),
    Current.WAKES: (
        "wake operator",
        "wake operator",
        "wake request, sleep operator",
        "wake request, stop operator",
        "wake operator, stop device",
        "! stop device, wake operator",
    ),
    Current.OWN: ("start operator", "stop idle", "sleep operator", "stop operator", "stop device", "stop device"),
    Current.BY_HAND: (
        "start operator",
        "sleep operator",
        "sleep operator",
        "stop operator",
        "stop device",
        "stop device",
    ),
    Current.SWAP: (
        "sleep swap, start operator",
        "sleep swap",
        "sleep swap",
        "stop operator",
        "stop device",
        "stop device",
    ),
    Current.MUST: (
        "stop config, start operator",
        "stop config",
        "stop config",
        "stop operator",
        "stop device",
        "stop device",
    ),
    Current.DOWN: (
        "sleep idle, start operator",
        "sleep idle",
        "sleep idle, sleep operator",
        "sleep idle, stop operator",
        "sleep idle, stop device",
        "! stop device",
    ),
    Current.STOPS: ("stop idle, start operator", "stop idle", "stop idle", "stop idle", "stop idle", "stop idle"),
}


def told(job: Job | None) -> str:
    return f"{job.kind.value} {job.reason.value}{', ' * bool(job.then)}{told(job.then)}" if job else ""


@pytest.mark.parametrize("row", Current, ids=lambda row: row.name)
def test_what_a_new_job_does_to_the_current_one(row: Current) -> None:
    """Every cell of the row, told as what happens then."""
    for column, expected in zip(New, AFTERWARDS[row], strict=True):
        found, runs = FOUND[row]()
        asked = ASKED[column]()
        assert (current(found, runs), new(asked)) == (row, column)
        after = merge(found, runs, asked)
        overtaken = "! " * (runs and after is asked)
        assert overtaken + told(after) == expected, column


def test_the_table_has_a_cell_for_everything() -> None:
    """Whatever is asked, whatever is under way."""
    assert {(row, column) for row, cells in MERGES.items() for column in cells} == set(itertools.product(Current, New))


def test_what_follows_is_merged_like_the_rest() -> None:
    """A device is drained under a model that falls asleep and is wanted: it stops, and comes back elsewhere."""
    sleeps = job(Kind.SLEEP, Reason.SWAP, then=a_start())
    assert told(merge(sleeps, True, job(Kind.STOP, Reason.DEVICE))) == "sleep swap, stop device, start operator"
    assert told(merge(sleeps, True, job(Kind.STOP, Reason.OPERATOR))) == "sleep swap, stop operator"


def test_the_documents_table_is_the_codes() -> None:
    """design.md shows what the code does; ``python -m vllmd.core.lifecycle`` prints the table anew."""
    assert jobs_table() in Path(vllmd.core.__file__).with_name("design.md").read_text()


def test_one_file_changes_jobs() -> None:
    """A job that is written in many places is a flag again."""
    written = re.compile(r"\.job(\.\w+)* = |\.job, \w+\.\w+ = ")
    core = Path(vllmd.core.__file__).parent
    assert {p.name for p in core.glob("*.py") if written.search(p.read_text())} == {"engine_table.py"}


# -- what the rows are for


def test_an_operators_load_does_not_call_a_restart_off() -> None:
    """The new configuration counts: the engine of the old one goes, and then the model is loaded."""
    old, new_ = model("m", 20), model("m", 30)
    w = World([old], [GPU])
    w.load("m")
    w.ask("r", "m")
    w.do(ModelsChanged((new_,), frozenset({"m"})))
    w.do(LoadAsked("m"))
    assert w.state("m") is State.DRAINING
    (stop,) = w.finish("r")
    assert stop == StopEngine("m", "its configuration changed", False)
    (start,) = w.answer("m")
    assert isinstance(start, StartEngine) and start.memory == 30 * GiB


def test_an_operators_sleep_does_not_keep_it_on_a_drained_device() -> None:
    """What must leave stops: asleep it would still be there."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.ask("r", "m")
    w.do(DeviceDrained(0))
    w.do(SleepAsked("m", 1))
    assert isinstance(w.finish("r")[0], StopEngine)


def test_a_victim_that_stays_ends_the_swap() -> None:
    """It was stopped by hand and loaded by hand meanwhile: whoever it was to make room for is planned for anew."""
    w = World([model("a"), model("b")], [GPU])
    w.load("a")
    w.ask("r", "a")
    w.ask("r2", "b")
    w.do(LoadAsked("b"))
    assert w.state("a") is State.DRAINING
    w.do(StopAsked("a"))
    w.do(LoadAsked("a"))
    w.settle()
    assert w.rejected == {}


def test_a_lease_that_is_renewed_while_its_model_wakes_keeps_it() -> None:
    """The stop that was to follow the wake is called off."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    w.do(LeaseTaken("l", "m"))
    w.ask("r", "m")
    w.do(LeaseReleased("l", stop=True))
    w.do(LeaseTaken("l2", "m"))
    assert w.answer("m") == [Admit("r", "m")]
    assert w.finish("r") == []
    assert w.state("m") is State.READY


def test_frozen_requests_are_woken_for_before_a_stop_and_gone_ones_are_not() -> None:
    """The engine wakes for those that are in it; without any it stops where it is."""
    for leaves in (True, False):
        w = World([model("a", preempt=True), model("b", on_busy="evict")], [GPU])
        w.load("a")
        w.answer("a")  # the proof that freezing loses nothing
        w.ask("r", "a")
        w.ask("r2", "b")
        w.pass_time(400.0)
        assert w.pending["a"] == SleepEngine("a", 1, freeze=True)
        w.answer("a")
        w.do(StopAsked("a"))
        w.answer("b")
        if leaves:
            w.finish("r")
            assert isinstance(w.pending["a"], StopEngine)
        w.settle()
        assert w.state("a") is State.STOPPED


def test_a_start_for_which_memory_was_lacking_is_tried_once_more_and_no_more() -> None:
    """Also when an operator has asked for it meanwhile."""
    w = World([model("m", 20)], [GPU])
    w.ask("r", "m")
    w.do(EngineStartFailed("m", "no memory", memory=True))
    w.do(LoadAsked("m"))
    w.do(EngineStartFailed("m", "no memory", memory=True))
    assert w.rejected["r"].error == "EngineFailed"


def test_a_crash_leaves_a_restart_behind_that_nobody_needs_to_want() -> None:
    """It comes up when its back-off is over if somebody waits; if nobody does, with the next request."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(EngineExited("m", "crashed"))
    assert w.ask("r", "m") == []
    w.do(RequestGone("r"))
    assert w.pass_time(60.0) == []
    assert isinstance(w.ask("r2", "m")[0], StartEngine)


def test_the_others_of_a_loaded_model_are_not_wanted_while_they_stop() -> None:
    """Of several replicas one is loaded whatever it takes; another one that is just going may go."""
    w = World(replicas(2), PAIR)
    w.ask("r", "m")
    w.settle()
    w.do(StopAsked("m@2"))
    w.do(LoadAsked("m"))
    assert w.view("m@2").waiting_for == ""


def test_a_wake_is_for_a_deeper_sleep_only_as_long_as_nothing_else_is_to_happen() -> None:
    """A stop that is asked for meanwhile comes right after the wake."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    assert w.do(SleepAsked("m", 2)) == [WakeEngine("m", 1)]
    assert w.do(StopAsked("m")) == []
    assert w.answer("m") == [StopEngine("m", "an operator asked for it", False)]


def test_a_request_calls_off_what_a_sleeper_does_for_itself() -> None:
    """Its time to stop came while another engine was moved on its device: whoever asks meanwhile finds it asleep."""
    w = World([model("m", 20, idle=IdleRules(None, 1, None, 10.0)), model("b", 20)], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    w.ask("r", "b")
    w.pass_time(20.0)
    assert w.state("m") is State.SLEEPING
    w.ask("r2", "m")
    assert WakeEngine("m", 1) in w.answer("b")
