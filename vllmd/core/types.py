"""The nouns of the core, all frozen. Memory is in bytes, time in seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

GiB = 1 << 30


class State(enum.Enum):
    """The life of a model's engine; ``lifecycle.py`` holds the transition table."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "running"
    DRAINING = "draining"
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"  # with a level, 1 or 2
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "error"


class Source(enum.IntEnum):
    """How a figure was come by; a higher one wins."""

    ESTIMATED = 0
    CONFIGURED = 1
    MEASURED = 2


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes, in bytes: on each of its devices, and of the host when asleep at level 1."""

    starting: int
    awake: int
    asleep: int = 0
    host: int = 0
    source: Source = Source.ESTIMATED


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU. ``index`` is the number users write; ``id`` is NVML's UUID, or ``str(index)`` where declared.

    ``runtime``: whose variable makes it visible to an engine: ``cuda``, ``hip``, ``xpu``; "" for one that is declared.
    ``number``: what that runtime calls it, counting in the order of the PCI bus; None where that is not certain.
    ``links``: indices of the devices that it is joined with directly; ``node``: its NUMA node, None where not told.
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


@dataclass(frozen=True, slots=True)
class IdleRules:
    """When an unused model sleeps and stops. ``None``: never. Ages count from the last request's end."""

    sleep_after: float | None = 300.0
    level: int = 1
    deepen_after: float | None = 900.0  # level 1 -> 2
    stop_after: float | None = 1800.0


@dataclass(frozen=True, slots=True)
class ReplicaRules:
    """How several engines of one model, its replicas, share its requests. Times in seconds.

    ``least``: so many are brought up, where they fit, while the model is used. One more is wanted when for
    ``busy_for`` there were more than ``busy`` requests per replica, waiting ones included; one fewer when for
    ``calm_for`` half as many would have been enough for one fewer.
    ``probe``: a replica serves once it has answered a short request of the daemon's own. It may take ``growth``
    times as long as the fastest replica's did, or ``probe_limit`` while nobody's is known; each attempt in a row
    may take ``growth`` times longer than the one before.
    A replica whose answers begin ``growth`` times later than the fastest one's is set aside for a while.
    ``retries``: so many other attempts a request gets that failed before a byte of its answer; a replica that
    failed so often in a row counts as down.
    """

    least: int = 1
    busy: int = 8
    busy_for: float = 10.0
    calm_for: float = 60.0
    probe: bool = True
    probe_limit: float = 5.0
    growth: float = 4.0
    retries: int = 3


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the core knows of a configured model.

    ``replica_of``: the model that clients ask for, where this is one of several engines of it ("": it is the only
    one); the first of them bears its name. They share its requests by ``replicas``, which all of them have alike.
    ``devices``: indices it may use, empty for any; it takes ``device_count`` of them (0: none, as remote ones do).
    ``sleep_levels``: subset of {1, 2} that the engine supports; without any it stops instead.
    ``concurrency``: requests at a time, ``None`` unlimited. ``queue_timeout``: longest wait.
    ``drain_limit``: after so long a drain the running requests are cut; ``None``: never.
    ``preempt``: running requests may be frozen by a sleep (only after one proved to survive it).
    ``when_free``: it starts only on devices that others leave free; ``None``: wherever its booking fits.
    """

    name: str
    footprint: Footprint
    weights: int = 0
    device_count: int = 1
    devices: tuple[int, ...] = ()
    sleep_levels: frozenset[int] = frozenset()
    idle: IdleRules = IdleRules()
    pinned: bool = False
    preload: bool = False
    priority: float = 1.0
    concurrency: int | None = None
    on_busy: str = "wait"  # wait | reject | evict
    queue_limit: int = 512
    queue_timeout: float | None = 600.0
    drain_limit: float | None = None
    preempt: bool = False
    max_restarts: int = 3
    restart_backoff: float = 5.0  # doubles with each failure in a row
    settings: str = ""  # a digest of what its engine depends on: figures measured under another one are forgotten
    replica_of: str = ""
    replicas: ReplicaRules = ReplicaRules()
    keeps_host: bool = True  # once slept at level 1 its host memory stays taken until it stops (vLLM's does)
    when_free: WhenFree | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an engine runs: device indices, in tensor-parallel order."""

    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the core is told about the machine's policy."""

    policy: str = "adaptive"  # adaptive | lru | a simulator's baseline
    host_memory: int = 0  # budget for level-1 sleepers, bytes; 0: level 1 is never chosen by the policy
    queue_limit: int = 4096  # waiting requests over all models


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision with its numbers: a journal record, a line of ``vllmctl why``."""

    at: float
    what: str  # start, wake, sleep, stop, evict, refuse, restart, ...
    model: str
    why: str  # one readable sentence
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelView:
    """A snapshot of one model for ``ps``, metrics and the admin API."""

    name: str
    state: State
    level: int  # 0 awake or not loaded, 1 or 2 asleep
    devices: tuple[int, ...]
    memory: int  # bytes per device as the ledger has it now
    in_flight: int
    queued: int
    oldest_wait: float | None
    idle: float | None  # seconds since the last request ended; None while busy or not loaded
    since: float  # seconds in this state
    pinned: bool
    leases: tuple[str, ...]
    waiting_for: str  # why queued requests wait, readable; "" if none do
    failure: str  # the last failure's reason; "" if none
    replica_of: str = ""  # the model of which it is one of several engines
    standing: str = ""  # of a replica whose engine is up: new, serving, resting, slow, ejected
    latency: float | None = None  # of a replica: seconds to the first byte of an answer, the last ones weighing most


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A snapshot of one device, bytes."""

    index: int
    memory: int
    reserve: int
    promised: int  # what the ledger has promised to models
    external: int  # memory held by others, as last sampled
    wedged: str  # why it is avoided; "" if it is not
    drained: bool = False  # by an operator


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the core shows others; never a reference into its state."""

    at: float
    models: tuple[ModelView, ...]
    devices: tuple[DeviceView, ...]
    host_memory: int
    host_promised: int
    decisions: tuple[Decision, ...]
