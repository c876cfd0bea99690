"""The table of lives: every transition happens, no other does, and the document's diagram is the table's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import vllmd.core
from tests.core.helpers import GPU, model
from tests.core.world import World
from vllmd.core.commands import StartEngine
from vllmd.core.events import (
    EngineAdopted,
    EngineAsleep,
    EngineAwake,
    EngineExited,
    EngineReady,
    EngineSleepFailed,
    EngineStartFailed,
    EngineWakeFailed,
    FailureRemembered,
    FreezeProved,
    LoadAsked,
    RequestArrived,
    SleepAsked,
    StopAsked,
    TimePassed,
)
from vllmd.core.lifecycle import CORE_STEPS, TRANSITIONS, LifecycleError, Step, diagram, follow
from vllmd.core.types import Placement, State

Script = Callable[[World], object]


def world(**fields: object) -> World:
    return World([model("m", **fields)], [GPU])


def do(*steps: Script) -> Script:
    """One script after the other."""

    def all_of_them(w: World) -> None:
        for step in steps:
            step(w)

    return all_of_them


def post(event: object) -> Script:
    return lambda w: w.do(event)  # type: ignore[arg-type]


def answered(w: World) -> object:
    return w.answer("m")


def asked(w: World) -> object:
    return w.ask("r", "m")


def ended(w: World) -> object:
    return w.finish("r")


starting = do(asked)
ready = do(asked, answered, ended)
busy = do(asked, answered)
draining = do(busy, post(SleepAsked("m", 1)))
falling = do(ready, post(SleepAsked("m", 1)))
sleeping = do(falling, answered)
waking = do(sleeping, asked)
stopping = do(ready, post(StopAsked("m")))
failed = do(starting, post(EngineStartFailed("m", "no such file")))
proving = do(asked, answered, ended)
PREEMPT = {"preempt": True}


def overtaken(before: Script) -> Script:
    """An operator's force overtakes the command under way; its answer is already on its way."""
    return do(before, post(StopAsked("m", force=True)))


# (state, step): how the model gets into the state, and what makes it take the step
STORIES: dict[tuple[State, Step], tuple[Script, Script]] = {
    (State.STOPPED, Step.START): (do(), asked),
    (State.STOPPED, Step.ADOPTED_AWAKE): (do(), post(EngineAdopted("m", Placement((0,)), State.READY))),
    (State.STOPPED, Step.ADOPTED_ASLEEP): (do(), post(EngineAdopted("m", Placement((0,)), State.SLEEPING, 1))),
    (State.STOPPED, Step.ADOPTED_STARTING): (do(), post(EngineAdopted("m", Placement((0,)), State.STARTING))),
    (State.STOPPED, Step.ADOPTED_FAILED): (do(), post(FailureRemembered("m", "no such file", 50.0))),
    (State.STARTING, Step.READY): (starting, answered),
    (State.STARTING, Step.START_FAILED): (starting, post(EngineStartFailed("m", "no such file"))),
    (State.STARTING, Step.EXITED): (starting, post(EngineExited("m", "killed"))),
    (State.STARTING, Step.STOP): (starting, post(StopAsked("m"))),
    (State.READY, Step.DRAIN): (busy, post(StopAsked("m"))),
    (State.READY, Step.EXITED): (ready, post(EngineExited("m", "killed"))),
    (State.DRAINING, Step.REOPEN): (draining, post(LoadAsked("m"))),
    (State.DRAINING, Step.SLEEP): (draining, ended),
    (State.DRAINING, Step.STOP): (do(busy, post(StopAsked("m"))), ended),
    (State.DRAINING, Step.EXITED): (draining, post(EngineExited("m", "killed"))),
    (State.FALLING_ASLEEP, Step.ASLEEP): (falling, answered),
    (State.FALLING_ASLEEP, Step.SLEEP_FAILED): (falling, post(EngineSleepFailed("m", "500"))),
    (State.FALLING_ASLEEP, Step.STOP): (falling, post(StopAsked("m", force=True))),
    (State.FALLING_ASLEEP, Step.EXITED): (falling, post(EngineExited("m", "killed"))),
    (State.FALLING_ASLEEP, Step.PROVED): (proving, answered),
    (State.FALLING_ASLEEP, Step.DISPROVED): (proving, post(FreezeProved("m", survived=False))),
    (State.SLEEPING, Step.WAKE): (sleeping, asked),
    (State.SLEEPING, Step.STOP): (sleeping, post(StopAsked("m"))),
    (State.SLEEPING, Step.EXITED): (sleeping, post(EngineExited("m", "killed"))),
    (State.WAKING, Step.AWAKE): (waking, answered),
    (State.WAKING, Step.WAKE_FAILED): (waking, post(EngineWakeFailed("m", "500"))),
    (State.WAKING, Step.STOP): (waking, post(StopAsked("m", force=True))),
    (State.WAKING, Step.EXITED): (waking, post(EngineExited("m", "killed"))),
    (State.STOPPING, Step.STOPPED): (stopping, answered),
    (State.STOPPING, Step.EXITED): (stopping, post(EngineExited("m", "terminated"))),
    (State.STOPPING, Step.READY): (overtaken(starting), post(EngineReady("m"))),
    (State.STOPPING, Step.START_FAILED): (overtaken(starting), post(EngineStartFailed("m", "terminated"))),
    (State.STOPPING, Step.ASLEEP): (overtaken(falling), post(EngineAsleep("m", 1))),
    (State.STOPPING, Step.SLEEP_FAILED): (overtaken(falling), post(EngineSleepFailed("m", "gone"))),
    (State.STOPPING, Step.AWAKE): (overtaken(waking), post(EngineAwake("m"))),
    (State.STOPPING, Step.WAKE_FAILED): (overtaken(waking), post(EngineWakeFailed("m", "gone"))),
    (State.STOPPING, Step.PROVED): (overtaken(proving), post(FreezeProved("m", survived=True))),
    (State.STOPPING, Step.DISPROVED): (overtaken(proving), post(FreezeProved("m", survived=False))),
    (State.FAILED, Step.FORGIVE): (failed, post(StopAsked("m"))),
}
NOT_STEPPED_ALONE = {
    # a proof follows its drain within the same event
    (State.DRAINING, Step.PROVE): "test_freezing.py",
}
PROOFS = {Step.PROVED, Step.DISPROVED}


@pytest.mark.parametrize(("state", "step"), STORIES, ids=lambda value: value.name)
def test_every_transition_happens(state: State, step: Step) -> None:
    """The table promises no transition that events cannot bring about."""
    before, then = STORIES[state, step]
    w = world(preempt=step in PROOFS)
    before(w)
    assert w.state("m") is state
    then(w)
    assert w.state("m") is TRANSITIONS[state][step] or _moved_on(w, state, step)


def _moved_on(w: World, state: State, step: Step) -> bool:
    """Where the same event takes a second step at once: what is drained leaves; a forced stop is a drain of none."""
    then = TRANSITIONS[state][step]
    return any(w.state("m") is further for further in TRANSITIONS[then].values())


def test_every_row_of_the_table_has_its_story() -> None:
    """A transition added to the table needs a story, and no story tells of one that is not there."""
    table = {(state, step) for state, steps in TRANSITIONS.items() for step in steps}
    assert set(STORIES) | set(NOT_STEPPED_ALONE) == table


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_what_is_not_in_the_table_is_refused_by_name(state: State) -> None:
    """A step out of turn says whose it was, and what would have been right."""
    for step in set(Step) - set(TRANSITIONS[state]):
        with pytest.raises(LifecycleError, match="core decided" if step in CORE_STEPS else "daemon reported"):
            follow("m", state, step)


def test_an_impossible_report_changes_nothing() -> None:
    """The daemon's mistake is told to the daemon; the model goes on as it was."""
    w = world()
    starting(w)
    before = w.seen
    with pytest.raises(LifecycleError, match="'asleep' of 'm', which is 'starting'"):
        w.scheduler.handle(EngineAsleep("m", 1), 0)
    assert w.seen == before
    assert [type(c).__name__ for c in w.answer("m")] == ["Admit"]


def test_a_report_on_a_stranger_is_refused() -> None:
    """An engine nobody configured is the daemon's mistake, not the core's model."""
    with pytest.raises(LifecycleError, match="'x', which is not configured"):
        world().scheduler.handle(EngineReady("x"), 0)


def test_the_same_request_cannot_arrive_twice() -> None:
    """Request names are unique: a second one would be owed two ends."""
    w = world()
    starting(w)
    with pytest.raises(LifecycleError, match="'r' twice"):
        w.scheduler.handle(RequestArrived("r", "m"), 0)


def test_a_failed_model_starts_again_with_the_next_request_after_its_back_off() -> None:
    """FAILED is never for good: after the back-off a request is forgiveness enough."""
    w = world()
    failed(w)
    w.now += 5.0
    assert isinstance(w.ask("again", "m")[0], StartEngine)


def test_the_documents_diagram_is_drawn_from_the_table() -> None:
    """design.md shows what the code does; ``python -m vllmd.core.lifecycle`` prints the diagram anew."""
    document = Path(vllmd.core.__file__).with_name("design.md").read_text()
    assert diagram() in document


def test_time_alone_moves_nothing_that_has_no_timer() -> None:
    """A model without idle rules stays as it is."""
    w = world()
    ready(w)
    assert w.scheduler.next_timer() is None
    w.at(1e6, TimePassed())
    assert w.state("m") is State.READY
