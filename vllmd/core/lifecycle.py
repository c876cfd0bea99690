"""The life of an engine: its states and the one table of transitions.

Nothing else in vllmd says what may follow what. ``design.md`` draws its
diagram from this table (``python -m vllmd.core.lifecycle`` prints it, a test
keeps the two equal), and a step that the table does not have changes nothing
and raises :class:`LifecycleError`, which says whose step it was.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from vllmd.core.types import State

S = State


class Step(enum.Enum):
    """What can happen to an engine: decisions of the core first, then what the daemon reports."""

    START = "start"
    DRAIN = "drain"
    REOPEN = "reopen"
    SLEEP = "sleep"
    WAKE = "wake"
    STOP = "stop"
    PROVE = "prove freezing"
    FORGIVE = "forgive"
    READY = "ready"
    START_FAILED = "start failed"
    ASLEEP = "asleep"
    SLEEP_FAILED = "sleep failed"
    AWAKE = "awake"
    WAKE_FAILED = "wake failed"
    PROVED = "freezing proved"
    DISPROVED = "freezing disproved"
    STOPPED = "stopped"
    EXITED = "exited"
    ADOPTED_AWAKE = "adopted awake"
    ADOPTED_ASLEEP = "adopted asleep"
    ADOPTED_STARTING = "adopted starting"


CORE_STEPS = frozenset(
    {Step.START, Step.DRAIN, Step.REOPEN, Step.SLEEP, Step.WAKE, Step.STOP, Step.PROVE, Step.FORGIVE}
)

# A stop may overtake a command under way (an operator ends a start, a failed sleep ends in a stop);
# the answer to that command may then already be on its way, and changes nothing any more.
_TOO_LATE = (
    Step.READY,
    Step.START_FAILED,
    Step.ASLEEP,
    Step.SLEEP_FAILED,
    Step.AWAKE,
    Step.WAKE_FAILED,
    Step.PROVED,
    Step.DISPROVED,
)

TRANSITIONS: Mapping[State, Mapping[Step, State]] = MappingProxyType(
    {
        S.STOPPED: {
            Step.START: S.STARTING,
            Step.ADOPTED_AWAKE: S.READY,
            Step.ADOPTED_ASLEEP: S.SLEEPING,
            Step.ADOPTED_STARTING: S.STARTING,
        },
        S.STARTING: {
            Step.READY: S.READY,
            Step.START_FAILED: S.FAILED,
            Step.EXITED: S.FAILED,
            Step.STOP: S.STOPPING,
        },
        S.READY: {Step.DRAIN: S.DRAINING, Step.EXITED: S.FAILED},
        S.DRAINING: {
            Step.REOPEN: S.READY,
            Step.SLEEP: S.FALLING_ASLEEP,
            Step.PROVE: S.FALLING_ASLEEP,
            Step.STOP: S.STOPPING,
            Step.EXITED: S.FAILED,
        },
        S.FALLING_ASLEEP: {
            Step.ASLEEP: S.SLEEPING,
            Step.SLEEP_FAILED: S.STOPPING,
            Step.PROVED: S.READY,
            Step.DISPROVED: S.STOPPING,
            Step.STOP: S.STOPPING,
            Step.EXITED: S.FAILED,
        },
        S.SLEEPING: {Step.WAKE: S.WAKING, Step.STOP: S.STOPPING, Step.EXITED: S.FAILED},
        S.WAKING: {
            Step.AWAKE: S.READY,
            Step.WAKE_FAILED: S.STOPPING,
            Step.STOP: S.STOPPING,
            Step.EXITED: S.FAILED,
        },
        S.STOPPING: {
            Step.STOPPED: S.STOPPED,
            Step.EXITED: S.STOPPED,
            **dict.fromkeys(_TOO_LATE, S.STOPPING),
        },
        S.FAILED: {Step.FORGIVE: S.STOPPED},
    }
)

AWAKE = frozenset({S.READY, S.DRAINING})  # its engine serves
MOVING = frozenset({S.STARTING, S.FALLING_ASLEEP, S.WAKING, S.STOPPING})  # a command to it is outstanding
LOADED = frozenset(S) - {S.STOPPED, S.FAILED}  # it has processes


class LifecycleError(Exception):
    """A step that the table does not allow. Nothing has changed; the message names who broke the rule."""


def follow(engine: str, state: State, step: Step) -> State:
    """The state after ``step``. Raises LifecycleError where the table has no such step."""
    try:
        return TRANSITIONS[state][step]
    except KeyError:
        raise LifecycleError(_blame(engine, state, step)) from None


def _blame(engine: str, state: State, step: Step) -> str:
    who = "the core decided" if step in CORE_STEPS else "the daemon reported"
    legal = ", ".join(s.value for s in TRANSITIONS[state]) or "nothing"
    return f"{who} {step.value!r} of {engine!r}, which is {state.value!r}: only {legal} may follow there"


def diagram() -> str:
    """The table as a Mermaid state diagram, the steps of one arrow together."""
    lines = ["stateDiagram-v2", f"    [*] --> {S.STOPPED.value}"]
    for state, steps in TRANSITIONS.items():
        arrows: dict[State, list[str]] = {}
        for step, then in steps.items():
            arrows.setdefault(then, []).append(step.value)
        lines += [f"    {state.value} --> {then.value}: {', '.join(names)}" for then, names in arrows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
