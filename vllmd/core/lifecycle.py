"""The life of an engine: its states, the one table of transitions, its job, and the one table of what merges with what.

Nothing else in vllmd says what may follow what. ``design.md`` draws both tables
(``python -m vllmd.core.lifecycle`` prints them, a test keeps them equal). A step
that the first one does not have changes nothing and raises :class:`LifecycleError`,
which says whose step it was.

A replica has at most one job, as a unit of systemd's has: what is to happen to its
engine next. A job *waits* (for the last request to end, for a device to come to
rest, for the policy) until its command is out, and then *runs* until the command is
answered. A new job is merged into it by :data:`MERGES` (``jobs.py``). What must come
after it hangs on it (``then``): a stop that may not cost the model its place in the
queue is followed by the start that was wanted.
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
    ADOPTED_FAILED = "adopted failed"


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
            Step.ADOPTED_FAILED: S.FAILED,
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


# -- jobs


class Kind(enum.Enum):
    """What is to happen to an engine."""

    START = "start"
    WAKE = "wake"  # a start of one that sleeps
    SLEEP = "sleep"  # with a level
    STOP = "stop"
    PROVE = "prove"  # that freezing its requests loses nothing


class Reason(enum.Enum):
    """On whose account. The values stand in the journal (``cause``) and in the metrics."""

    REQUEST = "request"  # clients wait for it
    OPERATOR = "operator"
    PRELOAD = "preload"
    REPLICA = "replica"  # so many replicas are wanted; this one hangs
    RESTART = "restart"  # it crashed, and comes up again if somebody asks
    LEASE = "lease"  # the last one ended
    IDLE = "idle"
    DEEPEN = "deepen"
    PROOF = "proof"
    SWAP = "swap"  # another one needs its place
    MOVED = "moved"  # it can never wake where it is
    CONFIG = "config"
    DEVICE = "device"
    FAILED = "failed"  # its state is unknown


UP = frozenset({Kind.START, Kind.WAKE})
WANTS = frozenset({Reason.OPERATOR, Reason.PRELOAD, Reason.REPLICA})  # a start for these is wanted without a request
OWN = frozenset({Reason.IDLE, Reason.DEEPEN, Reason.PROOF})  # what it does for itself: a request calls that off
BY_HAND = frozenset({Reason.OPERATOR, Reason.LEASE})  # whoever has it leave for these wants it no more


class Current(enum.Enum):
    """What a new job finds: the rows of the table."""

    NONE = "nothing"
    WANTED = "start or wake, waits"
    STARTS = "start, runs"
    WAKES = "wake, runs"
    OWN = "of its own accord, waits"
    BY_HAND = "by an operator or a lease, waits"
    SWAP = "for a swap, waits"
    MUST = "must leave, waits"
    DOWN = "sleep or proof, runs"
    STOPS = "stop, runs"


class New(enum.Enum):
    """The columns: a start, and the ways to leave."""

    START = "start"
    OWN = "of its own accord"
    SLEEP = "operator's sleep"
    STOP = "operator's stop"
    MUST = "swap, lease, must leave"
    FORCE = "force"


class Merge(enum.Enum):
    """What becomes of the two."""

    TAKE = "takes over"  # one that waits is called off; a command under way is overtaken by the stop
    KEEP = "dropped"  # the current one is as good, or matters more
    JOIN = "joins"  # the same; it counts for both, and nothing follows it any more
    AFTER = "after"  # merged into what follows the current one
    FIRST = "first"  # and the current one follows


_T, _K, _J, _A, _F = Merge.TAKE, Merge.KEEP, Merge.JOIN, Merge.AFTER, Merge.FIRST
MERGES: Mapping[Current, Mapping[New, Merge]] = MappingProxyType(
    {
        row: MappingProxyType(dict(zip(New, cells, strict=True)))
        for row, cells in {
            #                 start own sleep stop must force
            Current.NONE: (_T, _T, _T, _T, _T, _T),
            Current.WANTED: (_J, _K, _T, _T, _F, _F),
            Current.STARTS: (_J, _K, _A, _T, _A, _T),
            Current.WAKES: (_J, _K, _A, _A, _A, _T),
            Current.OWN: (_T, _T, _T, _T, _T, _T),
            Current.BY_HAND: (_T, _K, _T, _T, _T, _T),
            Current.SWAP: (_A, _K, _K, _T, _T, _T),
            Current.MUST: (_A, _K, _K, _T, _T, _T),
            Current.DOWN: (_A, _K, _A, _A, _A, _T),
            Current.STOPS: (_A, _K, _K, _K, _K, _K),
        }.items()
    }
)


def jobs_table() -> str:
    """The table of merges in Markdown: what a new job (the columns) does to the current one (the rows)."""
    lines = [f"| | {' | '.join(column.value for column in New)} |", f"|---|{'---|' * len(New)}"]
    lines += [f"| {row.value} | {' | '.join(verb.value for verb in cells.values())} |" for row, cells in MERGES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram(), jobs_table(), sep="\n\n")
