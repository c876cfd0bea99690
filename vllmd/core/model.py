"""What the core remembers of one model: a record without rules; one owner, the scheduler, changes it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from vllmd.core.costs import Costs
from vllmd.core.lifecycle import AWAKE, LOADED
from vllmd.core.queues import Queue
from vllmd.core.types import Footprint, ModelSpec, Placement, Source, State

INFINITY = math.inf
NOWHERE = Placement()


@dataclass(slots=True)
class Run:
    """A request in the engine: when it was admitted, and how often it was frozen."""

    began: float
    frozen: int = 0


class Standing(enum.Enum):
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
        """One more answer."""
        self.value += weight * (seconds - self.value)
        self.answers += 1


@dataclass(slots=True)
class Replica:
    """What is remembered of one of several engines of a model."""

    standing: Standing = Standing.NEW
    latencies: dict[bool, Latency] = field(default_factory=dict)  # of streams (True) and of whole answers
    seen: float = -INFINITY  # when the last of them came
    took: float | None = None  # seconds, its last probe
    asked: float = -INFINITY  # when its last probe was sent
    late: int = 0  # answers in a row that came too late beside the fastest's
    timely: int = 0  # answers in a row that did not
    rounds: int = 0  # how often it was set aside or ejected, without a few timely answers in between
    failed: int = 0  # probes in a row that failed
    look_at: float = INFINITY  # when one that was set aside or ejected is probed
    vouched: float = -INFINITY  # until when a missing answer raises no suspicion
    probe: str = ""  # the probe under way
    why: str = ""  # why it is set aside or ejected
    halted: bool = False  # an operator took it down while others serve
    unanswered: dict[str, float] = field(default_factory=dict)  # request -> when it was admitted; oldest first

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
        """Its engine sleeps or is gone: it will have to show itself anew."""
        self.standing, self.look_at, self.probe, self.why = Standing.NEW, INFINITY, "", ""
        self.late = self.timely = self.rounds = self.failed = 0
        self.unanswered.clear()


@dataclass(slots=True)
class Leave:
    """Where a model goes once it has drained, and on whose account. ``level`` 0 stops it."""

    level: int
    cause: str  # "idle", "exchange", "operator", "lease", "config", "proof", "deepen", "moved", "replica", "device"
    why: str
    freeze_at: float = INFINITY  # running requests are frozen from here on
    cut_at: float = INFINITY  # running requests are cut from here on
    kill: bool = False

    @property
    def yields(self) -> bool:
        """A new request calls it off."""
        return self.cause in ("idle", "deepen", "proof")


@dataclass(slots=True)
class Model:
    """One model's engine, its requests, its claims on staying, and its failures."""

    spec: ModelSpec
    name: str = field(init=False)
    costs: Costs
    changed: float  # since when it is in this state
    state: State = State.STOPPED
    level: int = 0
    placement: Placement = NOWHERE
    queue: Queue = field(default_factory=Queue)
    running: dict[str, Run] = field(default_factory=dict)
    orphans: set[str] = field(default_factory=set)  # their engine died; RequestFinished is still owed
    ready_at: float = 0.0  # when it last became ready
    used: float = -INFINITY  # when a request last came or ended
    idle_since: float = 0.0
    leave: Leave | None = None  # why the gate is closed (DRAINING), or what a sleeper still has to do
    asked: Leave | None = None  # an operator's wish that must wait for the command under way
    deepen: bool = False  # woken only to sleep deeper
    exchange: str = ""  # the target of the exchange it is a victim of
    wanted: float | None = None  # since when an operator wants it loaded
    pinned: bool = False
    leases: dict[str, float] = field(default_factory=dict)  # lease -> deadline
    failures: int = 0  # in a row
    failed_at: float = 0.0  # when the last of them was
    failure: str = ""
    given_up: bool = False
    retry_at: float = 0.0
    room_retried: bool = False  # a start for lack of memory was tried once more
    freezes: bool | None = None  # its engine proved that frozen requests survive
    slept_shallow: bool = False  # at level 1 since it started: its host memory stays taken
    sleep_failures: int = 0  # sleeps and wakes that ended in a stop
    look_again: float = -INFINITY  # no earlier look at whether it can sleep deeper
    removed: bool = False  # the configuration has it no more
    replica: Replica | None = None  # of one of several engines of a model
    due: float = INFINITY  # when time alone changes something for it

    def __post_init__(self) -> None:
        self.name = self.spec.name

    @property
    def at_rest(self) -> bool:
        """It does not serve, nor is anything under way that ends in serving."""
        return self.state in (State.STOPPED, State.SLEEPING, State.FAILED)

    @property
    def on(self) -> bool:
        """Its engine serves, gate open or not."""
        return self.state in AWAKE

    @property
    def loaded(self) -> bool:
        """It has an engine."""
        return self.state in LOADED

    @property
    def kept(self) -> bool:
        """It may not be made to leave: pinned, or leased."""
        return self.pinned or bool(self.leases)

    @property
    def full(self) -> bool:
        """Its engine has all the requests it may have at a time."""
        return self.spec.concurrency is not None and len(self.running) >= self.spec.concurrency

    @property
    def demand(self) -> int:
        """How many wait for it to be on: requests queued, requests frozen, a load that was asked for."""
        frozen = len(self.running) if self.running and self.state not in AWAKE else 0
        return len(self.queue) + frozen + (self.wanted is not None)

    @property
    def freezable(self) -> bool:
        """Its running requests may be frozen by a sleep."""
        return self.spec.preempt and self.freezes is True

    @property
    def footprint(self) -> Footprint:
        """Measured before configured before estimated."""
        return self.costs.footprint or self.spec.footprint

    @property
    def booking(self) -> int:
        """Bytes per device that must be free for a start: it must survive both loading and serving."""
        f = self.footprint
        return max(f.starting, f.awake, self.costs.asked)

    @property
    def told(self) -> int:
        """Bytes per device that its engine is told to take.

        Not the measured figure: an engine that takes a little more than it was told would grow with every start.
        """
        return max(self.spec.footprint.awake, self.costs.asked)

    def granted(self, size: int) -> None:
        """It starts with ``size`` bytes per device: what it held when it had another size says nothing of that."""
        f = self.footprint
        self.costs.footprint = Footprint(size, size, min(f.asleep, size), f.host, Source.CONFIGURED)

    def learn(self, seen: Footprint) -> None:
        """Take a measured footprint; figures it does not have (0) stay as they were."""
        f = self.footprint
        self.costs.footprint = Footprint(
            starting=max(seen.starting, seen.awake),
            awake=seen.awake,
            asleep=seen.asleep or f.asleep,
            host=seen.host or f.host,
            source=Source.MEASURED,
        )

    def measured(self, awake: int | None = None, asleep: int | None = None, host: int | None = None) -> None:
        """Learn what it really takes, bytes per device; what starting takes beyond serving stays as it was."""
        f = self.footprint
        extra = max(0, f.starting - f.awake)
        awake = f.awake if awake is None else awake
        self.costs.footprint = Footprint(
            starting=awake + extra,
            awake=awake,
            asleep=f.asleep if asleep is None else asleep,
            host=f.host if host is None else host,
            source=Source.MEASURED,
        )
