"""What is to be done. Imperative; the daemon executes these, each slow one as a task that posts its event.

An engine goes by the id of its replica.
"""

from __future__ import annotations

import enum

from vllmd.core.types import Decision, Placement
from vllmd.frozen import frozen


class Command:
    """What is to be done."""

    __slots__ = ()


@frozen
class StartEngine(Command):
    """Start the replica's engine on ``placement`` with ``memory`` bytes per device.

    Answered by EngineReady or EngineStartFailed.
    """

    replica: str
    placement: Placement
    memory: int


@frozen
class ReadAhead(Command):
    """The replica is next in line, its victims still drain or fall asleep, and its files will be read soon: a hint.

    ``host_memory``: bytes of the host's that the victims take meanwhile by falling asleep. Nothing answers it.
    """

    replica: str
    host_memory: int


@frozen
class StopReadAhead(Command):
    """The replica is not next in line any more, and was not started."""

    replica: str


@frozen
class WakeEngine(Command):
    """Wake the engine from ``level``. Answered by EngineAwake or EngineWakeFailed."""

    replica: str
    level: int


@frozen
class SleepEngine(Command):
    """Put the engine to sleep; ``freeze``: with its running requests inside, else it has none.

    Answered by EngineAsleep or EngineSleepFailed.
    """

    replica: str
    level: int
    freeze: bool = False


@frozen
class StopEngine(Command):
    """Stop the engine: SIGTERM to its main process, then its cgroup is killed; ``kill`` does the latter at once.

    Answered by EngineStopped. It may be given while another command to the same engine
    is outstanding: it supersedes that one, and only EngineStopped answers both.
    """

    replica: str
    reason: str
    kill: bool = False


@frozen
class ProveFreeze(Command):
    """Show, with a request of the daemon's own, that a frozen request completes correctly after the wake.

    The engine is idle and its gate is closed. Answered by FreezeProved. The daemon asks it a deterministic
    question twice: once undisturbed, once frozen and woken in mid-stream; equal answers prove it.
    """

    replica: str


@frozen
class ProbeReplica(Command):
    """Ask the replica a short question and take the time. Answered by ReplicaProbed.

    ``limit``: seconds after which the question is given up. It counts among the engine's requests while it runs.
    """

    request: str
    replica: str
    limit: float


@frozen
class RenameReplica(Command):
    """The replica has another id from now on: its model has got replicas, or lost them. Its engine goes on."""

    replica: str
    now: str


@frozen
class AddReplica(Command):
    """An operator wants the model on that device, and none of its replicas can be there: it is to have one more.

    Answered by ModelsChanged, with a replica whose only device it is, which is then loaded; or by ReplicaRefused.
    """

    model: str
    device: int


@frozen
class Admit(Command):
    """Relay the request to the replica's engine now."""

    request: str
    replica: str


class RejectReason(enum.StrEnum):
    """Why a request, or what somebody asked, is refused: by the class of ``vllmd.errors`` that the client is told."""

    ENGINE_FAILED = "EngineFailed"
    UNAVAILABLE = "Unavailable"
    UNKNOWN_MODEL = "UnknownModel"
    TOO_MANY_REQUESTS = "TooManyRequests"
    MODEL_TOO_LARGE = "ModelTooLarge"
    BAD_REQUEST = "BadRequest"
    CONFLICT = "Conflict"
    DISABLED = "ModelDisabled"
    DEFECT = "InternalError"  # the core itself failed at it


@frozen
class Reject(Command):
    """Answer the request with an error; nothing more is owed for it.

    ``retry_after`` is in seconds.
    """

    request: str
    error: RejectReason
    message: str
    retry_after: float | None = None


@frozen
class Answer(Command):
    """What becomes of the event whose ``ask`` this is. It comes before the commands that follow from the event.

    ``chosen``: the model or replica that it will be. ``refused``: why nothing is done, "" if it is; then ``error``.
    """

    ask: str
    chosen: str = ""
    refused: str = ""
    error: RejectReason = RejectReason.CONFLICT


@frozen
class CutRequest(Command):
    """Break off an admitted request; RequestFinished is still owed for it.

    Its drain limit has passed, it was forced, or its replica was found not to answer: then the daemon may send it
    anew, as another request, if no byte of its answer has come.
    """

    request: str
    reason: str


@frozen
class Record(Command):
    """Write the decision to the journal."""

    decision: Decision
