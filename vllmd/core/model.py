"""What the core remembers of models and their replicas: records without rules; one owner, the scheduler, changes them.

A model is what clients ask for. It has the queue, the leases, and one replica
or several. A replica is an engine: it has a state, a place on devices, memory,
and the requests that run in it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmd.core.costs import CostBook, Costs
from vllmd.core.lifecycle import AWAKE, LOADED, OWN, UP, WANTS, Kind, Reason
from vllmd.core.queues import USUAL, Queue, Rank
from vllmd.core.types import Footprint, ModelSpec, ModelView, Placement, ReplicaRules, ReplicaSpec, Source, State
from vllmd.frozen import frozen

INFINITY = math.inf
_NONE: Mapping[str, Any] = {}
_NOBODY = Queue()  # that of a model for which nobody has waited yet; it stays empty
_NOTHING_RUNS: dict[str, Any] = {}  # in an engine that was never up; it stays empty


def _none() -> Mapping[str, Any]:
    """What most models have of most things, one object for all: it is replaced, never changed."""
    return _NONE


NOWHERE = Placement()


@frozen
class Start:
    """What the log has said of a start that is under way."""

    ends: float | None = None  # when it will serve, as expected
    fetched: bool = False  # it waited for a download: how long it has taken says nothing


class HealthStatus(enum.Enum):
    """What its answers have earned a replica."""

    NEW = "new"  # it has not answered a probe since its engine came up
    SERVING = "serving"
    SLOW = "slow"  # set aside: others are much faster
    EJECTED = "ejected"  # it failed, or did not answer


@dataclass(slots=True)
class Latency:
    """Seconds to the first byte of an answer, exponentially weighted over so many ``answers``."""

    value: float
    answers: int = 1

    def learn(self, seconds: float, weight: float) -> None:
        """Take one more answer's time (seconds) into the average."""
        self.value += weight * (seconds - self.value)
        self.answers += 1


@dataclass(slots=True)
class Health:
    """What is remembered of the answers of one of several engines of a model (8 in ``design.md``)."""

    status: HealthStatus = HealthStatus.NEW
    latencies: dict[bool, Latency] = field(default_factory=dict)  # of streams (True) and of whole answers
    seen: float = -INFINITY  # when the last of them came
    took: float | None = None  # seconds, its last probe
    probed_at: float = -INFINITY  # when its last probe was sent
    late: int = 0  # answers in a row that came too late beside the fastest's
    timely: int = 0  # answers in a row that did not
    rounds: int = 0  # how often it was set aside or ejected, without a few timely answers in between
    failed: int = 0  # probes in a row that failed
    look_at: float = INFINITY  # when one that was set aside or ejected, or whose probe was not sent, is probed
    vouched: float = -INFINITY  # until when a missing answer raises no suspicion
    probe: str = ""  # the probe under way
    why: str = ""  # the reason of its status, if it does not serve
    halted: bool = False  # an operator took it down while others serve
    unanswered: dict[str, float] = field(default_factory=dict)  # request -> when it was admitted; oldest first

    @property
    def is_unseen(self) -> bool:
        """Whether the engine has just come up, and no probe of it was tried."""
        return self.status is HealthStatus.NEW and self.look_at == INFINITY

    @property
    def latency(self) -> float | None:
        """The one to be shown: that of streams, where there were any."""
        known = self.latencies.get(True) or self.latencies.get(False)
        return known.value if known else None

    @property
    def longest(self) -> float:
        """Seconds to the first byte of the kind of answer that takes longest; 0 if none is known."""
        return max([latency.value for latency in self.latencies.values()], default=0.0)

    def engine_left(self) -> None:
        """Forget what an engine that sleeps or is gone has shown: the next one begins anew."""
        self.status, self.look_at, self.probe, self.why = HealthStatus.NEW, INFINITY, "", ""
        self.late = self.timely = self.rounds = self.failed = 0
        self.unanswered.clear()


@dataclass(slots=True)
class Job:
    """What is to happen to an engine. Only ``engine_table.py`` changes a replica's, by the rules in ``jobs.py``."""

    kind: Kind
    reason: Reason
    why: str  # readable
    since: float  # when it was asked for
    level: int = 0  # of a sleep
    freeze_at: float = INFINITY  # running requests are frozen from here on
    cut_at: float = INFINITY  # running requests are cut from here on
    force: bool = False  # what runs is cut already, and the engine is killed
    retried: bool = False  # this start failed for lack of memory, and is tried once more
    target: Replica | None = None  # it leaves for this one's sake
    then: Job | None = None  # what follows

    @property
    def leaves(self) -> bool:
        """Whether the job ends with the engine not serving, or closes its gate for a while."""
        return self.kind not in UP

    @property
    def yields(self) -> bool:
        """A new request calls it off."""
        return self.reason in OWN and self.kind not in UP


def wanted_start(job: Job | None) -> Job | None:
    """The start among a job and what follows it that somebody wants without a request; None: there is none."""
    while job and not (job.kind in UP and job.reason in WANTS):
        job = job.then
    return job


@dataclass(slots=True)
class Lease:
    """Somebody keeps the model: until the deadline this replica is not made to leave."""

    deadline: float
    replica: Replica


_NO_START = Start()


@frozen
class KeepAlive:
    """What clients said of when they will use the model again. It holds off idle rules, and nobody who needs room."""

    until: Mapping[str, float] = field(default_factory=_none)  # client -> when its wish ends
    let_go: float = -INFINITY  # when the last client that had a wish, or had none, said that it needs it no more


_NO_WISHES = KeepAlive()


@dataclass(slots=True)
class Scale:
    """How many of a model's replicas are to serve, and since when there are too few or too many (8.4)."""

    wanted: int = 1  # of those that take devices
    crowded: float = INFINITY  # since when there is too much for those who serve
    calm: float = INFINITY  # since when one fewer would be enough
    tried: float = -INFINITY  # when room for another one was last looked for
    due: float = INFINITY  # when time alone changes something


_ALONE = Scale()  # of all models with one replica; it stays as it is


@dataclass(slots=True, eq=False)
class Model:
    """What clients ask for: a queue, leases, and the replicas that serve it, in the order of the configuration.

    Of ten thousand models hardly any is in use. What such a one has is the same object for all, which is replaced when
    it is to be changed.
    """

    spec: ModelSpec
    replicas: tuple[Replica, ...] = ()
    retired: tuple[Replica, ...] = ()  # those that the configuration has no more, and that still run
    queue: Queue = field(default_factory=lambda: _NOBODY)
    nominee: Replica | None = None  # the replica that is to come up for the queue, or is the only one
    leases: Mapping[str, Lease] = field(default_factory=_none)
    keep_alive: KeepAlive = _NO_WISHES
    used: float = -INFINITY  # when a request last came
    promised: tuple[float, ...] = ()  # when it was chosen for requests that are yet to come
    scale: Scale = field(default_factory=lambda: _ALONE)
    disabled: str = ""  # what clients are told of a model that an operator has disabled
    unused_view: ModelView | None = None  # what is shown of one that was never used, until something changes (views.py)

    @property
    def name(self) -> str:
        """The name by which clients call the model."""
        return self.spec.name

    def enqueue(self, request: str, key: str, now: float, rank: Rank = USUAL) -> None:
        """Have ``request`` wait from ``now`` on, see ``Queue.add``."""
        if self.queue is _NOBODY:
            self.queue = Queue()
        self.queue.add(request, key, now, rank)

    def scale_by(self, rules: ReplicaRules | None) -> None:
        """Scale from now on by these rules, if there are any."""
        if rules and self.scale is _ALONE:
            self.scale = Scale()

    @property
    def disabled_because(self) -> str:
        """What whoever comes is told, if nobody is served: it is disabled, or all its replicas are; else ""."""
        if self.disabled or not self.replicas or not self.replicas[0].disabled:
            return self.disabled
        return self.replicas[0].disabled if all(r.disabled for r in self.replicas) else ""

    @property
    def rules(self) -> ReplicaRules | None:
        """How its replicas share its requests; None for one that is the only one."""
        return self.spec.balancing


@dataclass(slots=True, eq=False)
class Replica:
    """One engine of a model: where it is in its life, its requests, its claims on staying, and its failures."""

    model: Model
    spec: ReplicaSpec
    id: str = field(init=False)
    book: CostBook
    changed: float  # since when it is in this state
    state: State = State.STOPPED
    untouched: bool = True  # it has been in no other state
    level: int = 0
    placement: Placement = NOWHERE
    running: dict[str, float] = field(default_factory=lambda: _NOTHING_RUNS)  # request -> when it was admitted
    frozen: Mapping[str, int] = field(default_factory=_none)  # those of them that were frozen -> how often
    ready_at: float = 0.0  # when it last became ready
    used: float = -INFINITY  # when a request last came or ended
    idle_since: float = 0.0
    drawn: tuple[float, float] = (0.0, 0.0)  # the ``idle_since`` that is meant, and joules that it drew unused since
    job: Job | None = None  # what is to happen to it next, or happens: only engine_table.py changes it
    moved: float = -INFINITY  # when it was last moved to another device
    start: Start = _NO_START  # what is known of the one under way
    pinned: bool = False
    disabled: str = ""  # why an operator has disabled this one of several
    bound: int | None = None  # the device that an operator wants it on, until it stops
    failures: int = 0  # in a row
    failed_at: float = 0.0  # when the last of them was
    failure: str = ""
    retry_at: float = 0.0
    freezes: bool | None = None  # its engine proved that frozen requests survive
    slept_shallow: bool = False  # at level 1 since it started: its host memory stays taken
    sleep_failures: int = 0  # sleeps and wakes that ended in a stop
    health: Health | None = None  # of one of several engines of a model
    due: float = INFINITY  # when time alone changes something for it: only timers.py changes it
    timer: float = INFINITY  # the first entry for it there
    learnt: Costs | None = None  # what ``costs`` has opened

    def __post_init__(self) -> None:
        self.id = self.spec.id

    def touch(self, now: float) -> None:
        """Note that the replica is in another state from ``now`` on."""
        if self.untouched:
            self.untouched, self.running = False, {}
        self.changed = now

    def end(self, request: str) -> float | None:
        """The request runs no longer. Returns when it was admitted; None if it did not run."""
        if request in self.frozen:
            self.frozen = {other: often for other, often in self.frozen.items() if other != request}
        return self.running.pop(request, None)

    @property
    def costs(self) -> Costs:
        """The replica's figures, opened when they are first asked for: of ten thousand models most have none."""
        if self.learnt is None:
            self.learnt = self.book.open(self.spec)
        return self.learnt

    def take(self, spec: ReplicaSpec) -> None:
        """Be as this specification says. What was measured of another one is forgotten."""
        self.spec = spec
        self.learnt = self.book.known(spec)

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices that it may use, by index; none said: any."""
        return self.spec.devices if self.bound is None else (self.bound,)

    @property
    def at_rest(self) -> bool:
        """Whether the replica neither serves nor has anything under way that ends in serving."""
        return self.state in (State.STOPPED, State.SLEEPING, State.FAILED)

    @property
    def disabled_because(self) -> str:
        """Why it is not to be up, whoever wants it: an operator has disabled it, or its model; else ""."""
        return self.disabled or self.model.disabled

    @property
    def is_on(self) -> bool:
        """Whether the engine serves, gate open or not."""
        return self.state in AWAKE

    @property
    def loaded(self) -> bool:
        """Whether the replica has an engine, on its way up or down included."""
        return self.state in LOADED

    @property
    def leases(self) -> list[str]:
        """The leases that keep it."""
        return [name for name, lease in self.model.leases.items() if lease.replica is self]

    @property
    def kept(self) -> bool:
        """Whether the replica may not be made to leave: pinned, or leased."""
        return self.pinned or bool(self.model.leases and self.leases)

    @property
    def full(self) -> bool:
        """Whether the engine has all the requests it may have at a time."""
        return self.spec.concurrency is not None and len(self.running) >= self.spec.concurrency

    @property
    def queued(self) -> int:
        """Requests for whose sake it is to come up, or that wait for a place in it."""
        return len(self.model.queue) if self.model.nominee is self else 0

    @property
    def oldest(self) -> float | None:
        """When the first of them came."""
        return self.model.queue.oldest if self.model.nominee is self else None

    @property
    def removed(self) -> bool:
        """The configuration has it no more."""
        return self not in self.model.replicas

    @property
    def leaving(self) -> bool:
        """Whether the replica is on its way out: it drains, is being taken down, or sleeps and is to stop."""
        job = self.job
        return job is not None and job.leaves and not (job.kind is Kind.SLEEP and self.state is State.SLEEPING)

    @property
    def wanted_since(self) -> float | None:
        """When a start was asked for that no request is behind: by an operator, to preload, as one more replica."""
        start = wanted_start(self.job)
        return start.since if start else None

    @property
    def urged(self) -> bool:
        """Whether an operator wants the replica: busy models leave at once."""
        start = wanted_start(self.job)
        return start is not None and start.reason is Reason.OPERATOR

    @property
    def given_up(self) -> bool:
        """Whether it has failed, and nothing brings it up again but a request after its back-off."""
        return self.state is State.FAILED and self.job is None

    @property
    def demand(self) -> int:
        """How many wait for it to be on: requests queued, requests frozen, a load that was asked for."""
        frozen = len(self.running) if self.running and self.state not in AWAKE else 0
        return self.queued + frozen + (wanted_start(self.job) is not None)

    @property
    def freezable(self) -> bool:
        """Whether running requests may be frozen by a sleep."""
        return self.spec.preempt and self.freezes is True

    @property
    def footprint(self) -> Footprint:
        """Measured before configured before estimated."""
        return (self.learnt.footprint if self.learnt else None) or self.spec.footprint

    @property
    def drain_limit(self) -> float:
        """Seconds of a drain after which its running requests are cut; infinite for never."""
        return INFINITY if self.spec.drain_limit is None else self.spec.drain_limit

    @property
    def load_time(self) -> float:
        """Seconds until it serves, as expected: by a wake where it sleeps, or by a start."""
        return self.costs.wake(self.level if self.state is State.SLEEPING else 0)

    @property
    def booking(self) -> int:
        """Bytes per device that must be free for a start: it must survive both loading and serving."""
        f = self.footprint
        return max(f.starting, f.awake, self.learnt.needed if self.learnt else 0)

    @property
    def engine_memory(self) -> int:
        """Bytes per device that its engine is told to take.

        Not the measured figure: an engine that takes a little more than it was told would grow with every start.
        """
        return max(self.spec.footprint.awake, self.learnt.needed if self.learnt else 0)

    def granted(self, size: int) -> None:
        """Note a start with ``size`` bytes per device: what it held at another size says nothing of that."""
        f = self.footprint
        self.costs.footprint = Footprint(size, size, min(f.asleep, size), f.host, Source.CONFIGURED)

    def learn(self, seen: Footprint, most: int) -> None:
        """Take a measured footprint; figures it does not have (0) stay as they were.

        ``most``: bytes that can be promised of its device. It runs there, so it needs no more for a start, whatever
        was measured: the rest is in the reserve, or was there for a moment. Else an engine that fills its device
        could be started once and never again.
        """
        f, starting = self.footprint, max(seen.starting, seen.awake)
        asleep, host = seen.asleep or f.asleep, seen.host or f.host
        self._learnt(starting, seen.awake, asleep, host, most)

    def measured(self, most: int, awake: int | None = None, asleep: int | None = None) -> None:
        """Learn what it really takes, bytes per device; what starting takes beyond serving stays as it was."""
        f = self.footprint
        awake, asleep = f.awake if awake is None else awake, f.asleep if asleep is None else asleep
        self._learnt(awake + max(0, f.starting - f.awake), awake, asleep, f.host, most)

    def _learnt(self, starting: int, awake: int, asleep: int, host: int, most: int) -> None:
        self.costs.footprint = Footprint(
            min(starting, most), min(awake, most), min(asleep, most), host, Source.MEASURED
        )
