"""What happened. Past tense; the daemon posts these to the scheduler.

The daemon owes the core exactly one ``RequestFinished`` (if it was admitted) or
``RequestGone`` (if it left before) per ``RequestArrived`` that was not rejected,
and exactly one closing event per command to an engine; an event about an engine
always speaks of the replica's present engine. Engines go by their replica's id,
requests by their model's name; what operators ask is about either, ``model`` is
then a model's name or a replica's id.

An event with an ``ask`` is answered by one ``Answer`` of that name, at once or
(where it says so) later. That takes the place of looking at the state first: what
a caller saw may be over when its event is handled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from vllmd.core.types import Device, Footprint, ModelSpec, Placement, Settings, State
from vllmd.frozen import frozen


class Event:
    """Something that happened outside the core, and that it decides about."""

    __slots__ = ()


@frozen
class RequestArrived(Event):
    """A client asked for ``model``. ``request`` is unique; ``key`` names the API key, for fairness.

    ``avoid``: replicas that failed it before; another one gets it if one serves.
    ``only``: the replica that alone can serve it; "": any. ``rank``: the key's priority and share.
    """

    request: str
    model: str
    key: str = ""
    avoid: frozenset[str] = frozenset()
    only: str = ""
    rank: tuple[int, int] = (0, 1)


@frozen
class RequestAnswered(Event):
    """The first byte of an admitted request's answer came. Told of requests to replicas only.

    ``streamed``: more of it is to come as it is made; else the answer began when all of it was made.
    """

    request: str
    streamed: bool = False


@frozen
class RequestFinished(Event):
    """An admitted request ended, however it did. ``failed``: why its engine gave no answer, "" if it did."""

    request: str
    failed: str = ""


@frozen
class RequestGone(Event):
    """The client of a waiting request left."""

    request: str


@frozen
class EngineReady(Event):
    """Answers ``StartEngine``: the engine serves. ``footprint`` if it was measured."""

    replica: str
    footprint: Footprint | None = None


@frozen
class EngineStartFailed(Event):
    """Answers ``StartEngine``: the start failed, and no process of the engine is left.

    ``memory``: it failed for lack of device memory; ``needed``: bytes per device it said it wanted.
    ``permanent``: no retry will help (no such command, no such model).
    """

    replica: str
    reason: str
    memory: bool = False
    needed: int | None = None
    permanent: bool = False


@frozen
class EngineAsleep(Event):
    """Answers ``SleepEngine``. ``freed``: bytes that came back per device index, if measured."""

    replica: str
    level: int
    freed: Mapping[int, int] = field(default_factory=dict)


@frozen
class EngineSleepFailed(Event):
    """Answers ``SleepEngine``: the engine's state is unknown; the core stops it."""

    replica: str
    reason: str


@frozen
class EngineAwake(Event):
    """Answers ``WakeEngine``: the engine serves again."""

    replica: str


@frozen
class EngineWakeFailed(Event):
    """Answers ``WakeEngine``: the engine's state is unknown; the core stops it."""

    replica: str
    reason: str


@frozen
class EngineStopped(Event):
    """Answers ``StopEngine``: every process is gone. ``missing``: bytes per device that did not come back."""

    replica: str
    missing: Mapping[int, int] = field(default_factory=dict)


@frozen
class EngineExited(Event):
    """The engine died unasked, in whatever state; every process of it is gone. It answers a pending command too."""

    replica: str
    reason: str


@frozen
class ServerSilent(Event):
    """A server elsewhere missed a look; it may only be slow. EngineExited follows if it does not answer again."""

    replica: str
    reason: str


@frozen
class EngineAdopted(Event):
    """A running engine was found when the daemon started.

    ``state`` is READY, SLEEPING (with ``level``) or STARTING (EngineReady or EngineStartFailed follows).
    """

    replica: str
    placement: Placement
    state: State
    level: int = 0
    idle: float = 0.0  # seconds since its last request ended
    footprint: Footprint | None = None
    since: float = 0.0  # seconds that it has been in that state


@frozen
class FailureRemembered(Event):
    """An earlier daemon saw the replica's engine fail for ``reason``, ``since`` seconds ago; not cleared since."""

    replica: str
    reason: str
    since: float = 0.0


@frozen
class StartProgressed(Event):
    """A start's log says that ``share`` of the time that a start usually takes lies behind it.

    0: it waits for something that has nothing to do with that time, such as a download.
    """

    replica: str
    share: float


@frozen
class FreezeProved(Event):
    """Answers ``ProveFreeze``: a frozen request completed correctly after the wake, and the engine serves.

    Not ``survived``: its answer differed or never came; the core stops the engine and only ever drains it.
    """

    replica: str
    survived: bool


@frozen
class ReplicaProbed(Event):
    """Answers ``ProbeReplica``: it took so many ``seconds``, or (None) failed, and why.

    ``unsent``: it failed at our end, for want of a file descriptor, and tells nothing of the replica.
    """

    request: str
    seconds: float | None = None
    reason: str = ""
    unsent: bool = False


@frozen
class ProbeAsked(Event):
    """An operator has an engine probed; ReplicaProbed follows, and changes nothing of its health.

    Refused if the engine does not serve (any more): then nothing follows.
    """

    request: str
    replica: str
    ask: str = ""


@frozen
class PoolAsked(Event):
    """A request is to come for whichever of these models answers soonest; that one is chosen."""

    models: tuple[str, ...]
    ask: str = ""


@frozen
class MemorySampled(Event):
    """NVML's reading, bytes: of other programs by device index, of the engines' processes by (replica, index)."""

    external: Mapping[int, int]
    replicas: Mapping[tuple[str, int], int]
    failed: Mapping[int, str] = field(default_factory=dict)  # devices that could not be read, and why
    drawn: Mapping[str, float] = field(default_factory=dict)  # joules of each replica's engine since its last request


@frozen
class StandbysHeld(Event):
    """Standby engines hold so many bytes of host memory, which are given up for any model: none waits for them."""

    size: int


@frozen
class DevicesChanged(Event):
    """These are the devices from now on.

    ``unknown``: why it is not known which there are, or what they hold; "" if it is. ``asking``: that may yet be known
    in a moment, so that requests that wait for a device go on waiting.
    """

    devices: tuple[Device, ...]
    unknown: str = ""
    asking: bool = False


@frozen
class DevicesTroubled(Event):
    """All devices that must not be used any more, and why: ``ill`` ones still work, on ``lost`` ones engines failed."""

    ill: Mapping[int, str] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)


@frozen
class DeviceDrained(Event):
    """An operator took the device out of use, or gave it back. ``why``: another reason than maintenance."""

    device: int
    drained: bool = True
    why: str = ""


@frozen
class MachineSlept(Event):
    """The machine was suspended for so many seconds, in which the core's clock stood still.

    Models were unused for so much longer, and what was promised until a time of day ends so much sooner. What is
    measured, or waited for, is not touched: nothing happened meanwhile that anybody could have been late with.
    """

    seconds: float


@frozen
class LoadAsked(Event):
    """An operator wants the model loaded, or woken: one replica whatever it takes, the others where they fit.

    ``device``: one of its replicas is to be there. The one that is there or on its way there does; else one that is
    not loaded is bound to that device until it stops; else AddReplica asks for one more, and the answer comes with it.
    Chosen is the replica. Refused: it could not fit even alone, or cannot be on that device.
    """

    model: str
    device: int | None = None
    ask: str = ""


@frozen
class ReplicaRefused(Event):
    """Answers AddReplica: the model cannot have one more, for that ``reason``."""

    model: str
    device: int
    reason: str


@frozen
class SleepAsked(Event):
    """An operator wants the model asleep at level 1 or 2; 3 stops it. Drained first. Refused if it is not loaded."""

    model: str
    level: int
    ask: str = ""


@frozen
class StopAsked(Event):
    """An operator wants the model stopped and its failure forgotten. Drained first unless ``force``.

    ``device``: only those of its engines that are there, or that have none; if all are, the model with them.
    """

    model: str
    force: bool = False
    device: int | None = None


@frozen
class PinSet(Event):
    """An operator pinned or unpinned the model."""

    model: str
    pinned: bool


@frozen
class ModelDisabled(Event):
    """An operator took the model, or one of its replicas, out of use. ``message``: what its clients are told."""

    model: str
    message: str


@frozen
class ModelEnabled(Event):
    """An operator gave the model back, with all of its replicas, or one replica."""

    model: str


@frozen
class LeaseTaken(Event):
    """The model is kept until ``deadline`` (in the core's clock; None: until released). Replaces its own."""

    lease: str
    model: str
    deadline: float | None = None


@frozen
class LeaseReleased(Event):
    """The lease ended. ``stop``: the last one to go stops the model at once instead of by its idle rules."""

    lease: str
    stop: bool = False


@frozen
class KeptAlive(Event):
    """A client wants the model to be there for its next requests: no idle rule applies for so many ``seconds``.

    Not a lease: the model makes room for others all the same. ``client`` names whose wish it is, and replaces its own.
    0.0: it needs the model no more, which goes at once if nobody else's wish keeps it and it is not used.
    """

    model: str
    client: str
    seconds: float


@frozen
class ModelsChanged(Event):
    """The configuration was reloaded. Replicas whose id is in ``restart`` or that are gone are drained and stopped.

    ``devices``, ``settings``: those that go with it, if they are others; they come first, because nothing may be put
    on a device that is about to be another one. ``unless_used``: refused, nothing changed, if one of these (models, or
    replicas by their id) is in use.
    """

    models: tuple[ModelSpec, ...]
    restart: frozenset[str] = frozenset()
    devices: DevicesChanged | None = None
    settings: Settings | None = None
    unless_used: frozenset[str] = frozenset()
    ask: str = ""


Asking = ProbeAsked | PoolAsked | LoadAsked | SleepAsked | ModelsChanged  # what is answered, if it has a name


@frozen
class TimePassed(Event):
    """A moment that ``Scheduler.next_timer`` asked for has come."""
