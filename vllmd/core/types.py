"""The nouns of the core, all frozen. Memory is in bytes, time in seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from vllmd.frozen import frozen

CPU = "cpu"  # as a device's runtime


class State(enum.Enum):
    """The life of an engine; ``lifecycle.py`` holds the transition table."""

    __hash__ = object.__hash__  # every event asks whether a state is one of several, and Enum's own is no built-in

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "running"
    DRAINING = "draining"
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"  # with a level, 1 or 2
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "error"


COMING = frozenset({State.STARTING, State.WAKING})  # on its way up
READY = State.READY  # every request asks for it: found so it costs a twentieth of what a look into an Enum does


class Source(enum.IntEnum):
    """Where a figure comes from; a higher one wins."""

    ESTIMATED = 0
    CONFIGURED = 1
    MEASURED = 2


@frozen
class Footprint:
    """What a model takes, in bytes: on each of its devices, and of the host when asleep at level 1."""

    starting: int
    awake: int
    asleep: int = 0
    host: int = 0
    source: Source = Source.ESTIMATED


@frozen
class Device:
    """A GPU. ``index`` is the number users write; ``id`` is NVML's UUID, or ``str(index)`` where declared.

    ``runtime``: the one whose variable makes the device visible to an engine (``cuda``, ``hip``, ``xpu``); "" for a
    declared device, CPU for the CPU where there is no GPU.
    ``number``: what that runtime calls it, counting in the order of the PCI bus; None where that is not certain.
    ``links``: indices of the devices that it is joined with directly; ``node``: its NUMA node, None if unknown.
    ``switch``: devices with the same one talk through a PCIe switch of their own; "" if unknown. ``cpus``: those of
    its node, where the machine has more than one. ``shared``: its memory is the host's, so that what sleeps in host
    memory frees none of it. ``read``: what is held of it is read from time to time; else only the ledger knows that.
    """

    index: int
    id: str
    memory: int
    reserve: int = 0
    name: str = ""
    runtime: str = ""
    number: int | None = None
    links: frozenset[int] = frozenset()
    node: int | None = None
    switch: str = ""
    cpus: tuple[int, ...] = ()
    shared: bool = False
    read: bool = False


@frozen
class IdleRules:
    """When an unused model sleeps and stops. ``None``: never. Ages count from the last request's end.

    ``energy``: joules that its engine may draw unused before it sleeps, whatever its age.
    """

    sleep_after: float | None = 300.0
    level: int = 1
    deepen_after: float | None = 900.0  # level 1 -> 2
    stop_after: float | None = 1800.0
    energy: float | None = None


@frozen
class Balancing:
    """When a model's replicas become more or fewer, and which of them get its requests. Times in seconds.

    One more is wanted when for ``busy_for`` there were more than ``busy`` requests per replica, waiting ones
    included; one fewer when for ``calm_for`` half as many would have been enough for one fewer.
    A probe may take ``growth`` times as long as the fastest replica's did, or ``probe_limit`` while nobody's is
    known; each attempt in a row may take ``growth`` times longer than the one before.
    A replica whose answers begin ``growth`` times later than the fastest one's is set aside for a while.
    ``retries``: so many other attempts a request gets that failed before a byte of its answer; a replica that
    failed so often in a row counts as down.
    """

    busy: int = 8
    busy_for: float = 10.0
    calm_for: float = 60.0
    probe_limit: float = 5.0
    growth: float = 4.0
    retries: int = 3


@frozen
class ReplicaRules(Balancing):
    """How several engines of one model, its replicas, share its requests.

    ``least``: so many are brought up, where they fit, while the model is used. ``probe``: a replica serves once it
    has answered a short request of the daemon's own.
    """

    least: int = 1
    probe: bool = True


@frozen
class WhenFree:
    """A start waits for devices that others leave free, and takes what is free enough to take.

    ``used_below``: others must hold less than so many bytes of each. ``shares``: from which free ratio on which
    share of the device is booked, and told to the engine; below the least ratio it waits. Empty: by its footprint.
    """

    used_below: int = 10_000 << 20
    shares: Mapping[float, float] = field(default_factory=lambda: {0.95: 0.80, 0.85: 0.70})

    def share(self, free: float) -> float | None:
        """Of a device of which the ratio ``free`` is free; None: too little is."""
        return self.shares[max(reached)] if (reached := [ratio for ratio in self.shares if ratio <= free]) else None


@frozen
class ReplicaSpec:
    """One engine of a model, as configured.

    ``id``: the model's name where the model has only this one, else ``NAME@1`` or ``NAME@LABEL``.
    ``devices``: indices it may use, empty for any; it takes ``device_count`` of them (0: none, as remote ones do).
    ``sleep_levels``: subset of {1, 2} that the engine supports; without any it stops instead.
    ``concurrency``: requests at a time, ``None`` unlimited.
    ``drain_limit``: after so long a drain the running requests are cut; ``None``: never.
    ``preempt``: running requests may be frozen by a sleep (only after one proved to survive it).
    ``when_free``: it starts only on devices that others leave free; ``None``: wherever its booking fits.
    ``engine``: its kind; engines of a kind resemble each other in how long things take here.
    ``start_time``: seconds that a first start takes, by its kind and size; ``None``: as vLLM on an A100.
    """

    id: str
    footprint: Footprint
    weights: int = 0
    device_count: int = 1
    devices: tuple[int, ...] = ()
    sleep_levels: frozenset[int] = frozenset()
    idle: IdleRules = IdleRules()
    pinned: bool = False
    preload: bool = False
    concurrency: int | None = None
    drain_limit: float | None = None
    preempt: bool = False
    max_restarts: int = 3
    restart_backoff: float = 5.0  # doubles with each failure in a row
    settings: str = ""  # a digest of what its engine depends on: figures measured under another one are forgotten
    host_running: int = 0  # bytes of host memory that it takes as long as it runs; nothing waits for them
    keeps_host: bool = True  # once slept at level 1 its host memory stays taken until it stops (vLLM's does)
    when_free: WhenFree | None = None
    engine: str = ""
    start_time: float | None = None


@frozen
class ModelSpec:
    """What clients ask for: a name, one engine or several (``replicas``), and the rules of its queue.

    ``balancing``: how its replicas share the requests; ``None``: it has one engine, which is never probed or compared.
    ``queue_timeout``: longest wait, ``None`` without end.
    """

    name: str
    replicas: tuple[ReplicaSpec, ...]
    balancing: ReplicaRules | None = None
    priority: float = 1.0
    on_busy: str = "wait"  # wait | reject | evict
    queue_limit: int = 512
    queue_timeout: float | None = 600.0


def single(name: str, footprint: Footprint, weights: int = 0, **settings: Any) -> ModelSpec:
    """A model with one engine; ``settings`` are those of either."""
    own = {key: settings.pop(key) for key in ("priority", "on_busy", "queue_limit", "queue_timeout") if key in settings}
    return ModelSpec(name, (ReplicaSpec(name, footprint, weights, **settings),), **own)


def renamed(before: Sequence[str], after: Sequence[str]) -> tuple[str, str] | None:
    """The first replica of a model goes on where only its id is another one: the old id and the new one, else None.

    ``before``, ``after``: the ids of the model's replicas. So it is with a model that gets replicas, or loses them.
    """
    if not before or not after or before[0] in after or after[0] in before:
        return None
    return before[0], after[0]


@frozen
class Placement:
    """Where an engine runs: device indices, in tensor-parallel order."""

    devices: tuple[int, ...] = ()


@frozen
class Settings:
    """What the core is told about the machine's policy."""

    policy: str = "adaptive"  # adaptive | lru | a simulator's baseline
    host_memory: int = 0  # budget for level-1 sleepers, bytes; 0: level 1 is never chosen by the policy
    queue_limit: int = 4096  # waiting requests over all models


@frozen
class Decision:
    """One decision with its numbers: a journal record, a line of ``vllmctl why``."""

    at: float
    what: str  # start, wake, swap, sleep, stop, refuse, restart, ...
    model: str
    why: str  # one readable sentence
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    replica: str = ""  # the id of the replica that it is about; "" where that says no more than the model's name


@frozen
class View:
    """A snapshot for ``ps``, metrics and the admin API: the fields that a replica and a model both have."""

    name: str  # of a replica: its id
    state: State
    level: int  # 0 awake or not loaded, 1 or 2 asleep
    devices: tuple[int, ...]
    memory: int  # bytes per device as the ledger has it now
    in_flight: int
    queued: int  # requests for whose sake it is to come up, or that wait for a place in it
    oldest_wait: float | None  # seconds
    idle: float | None  # seconds since the last request ended; None while busy or not loaded
    since: float | None  # seconds in this state; None: it has been in no other one since the core knows it
    pinned: bool
    leases: tuple[str, ...]
    waiting_for: str  # why requests for it wait, readable; "" if none does
    failure: str  # the last failure's reason; "" if none
    health: str = ""  # of one of several whose engine is up: new, serving, resting, slow, ejected
    latency: float | None = None  # of one of several: seconds to the first byte, the last answers weighing most
    rests_in: float | None = field(default=None, kw_only=True)  # seconds until an idle rule would act if nobody came
    disabled: str = field(default="", kw_only=True)  # what an operator, who has disabled it, has its clients told
    expected: int = field(default=0, kw_only=True)  # bytes per device, as configured or estimated; 0: not told
    never: str = field(default="", kw_only=True)  # why it can never be loaded on these devices; "" if it can, or is


@frozen
class ReplicaView(View):
    """How one engine stands, as others are shown it."""

    bound: int | None = None  # the only device that it may use

    @property
    def id(self) -> str:
        """As events and commands call it."""
        return self.name


@frozen
class ModelView(View):
    """One model: in the state of the best of its replicas, with the requests and memory of all."""

    # As configured; one that a reload took away and that has not gone comes last.
    replicas: tuple[ReplicaView, ...] = field(kw_only=True)
    balanced: bool = field(kw_only=True)  # its replicas share its requests by rules; else it has one engine
    serving: int = field(kw_only=True)  # replicas that get requests, or would if they were needed
    degraded: bool = field(kw_only=True)  # one is down that ought to serve


@frozen
class DeviceView:
    """A snapshot of one device, bytes."""

    index: int
    memory: int
    reserve: int
    promised: int  # what the ledger has promised to models
    external: int  # memory held by others, as last sampled
    wedged: str  # why it is avoided; "" if it is not
    drained: bool = False  # by an operator


@frozen
class Snapshot:
    """What the core shows others; never a reference into its state."""

    at: float
    models: tuple[ModelView, ...]
    devices: tuple[DeviceView, ...]
    host_memory: int
    host_promised: int
    decisions: tuple[Decision, ...]
    host_standbys: int = 0  # bytes of it that standby engines hold
    drained: frozenset[int] = frozenset()  # indices of drained devices, also of those that are not there just now

    @property
    def replicas(self) -> list[ReplicaView]:
        """The views of all engines, in the order of their models."""
        return [view for model in self.models for view in model.replicas]

    def replicas_of(self, name: str) -> list[ReplicaView]:
        """How each engine of the model stands, or the one of that id; none if nothing is called so."""
        return [view for model in self.models for view in model.replicas if name in (model.name, view.id)]
