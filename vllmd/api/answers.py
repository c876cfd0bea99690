"""The JSON objects of the API as dataclasses. Memory is in bytes, time in seconds, a moment in Unix time.

The daemon makes these (``vllmd.daemon.serializers``), the clients and vllmctl read them, and their JSON Schema is drawn
from them (``codec.schema``): a field's ``Annotated`` text is its description there. The daemon sends every field, but
those in ``sparse`` only where they are not None. A default is what a client sees of an older daemon that does not send
the field; a field of a newer daemon that is not here is kept, and has no type.

No class here has slots: ``vars()`` of an answer is its JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, FrozenInstanceError, field
from typing import Annotated, ClassVar, Literal, TypeVar, dataclass_transform

from vllmd.errors import VllmdError
from vllmd.frozen import declare

Object = Mapping[str, object]  # JSON that is not ours to describe: settings of a model, the numbers of a decision

Phases = Mapping[str, float]  # of the start under way, else of the last one: phase -> seconds

STATES = (
    *("stopped", "starting", "running", "draining", "falling_asleep"),
    *("sleeping_l1", "sleeping_l2", "waking", "stopping", "error"),
)
NO_ENGINE = frozenset({"stopped", "error"})  # of STATES: nothing runs
State = Annotated[str, {"enum": list(STATES)}]
HealthStatus = Annotated[str, {"enum": ["", "new", "serving", "resting", "slow", "ejected"]}]
Watts = Annotated[float, "watts"]
Moment = Annotated[str, {"format": "date-time"}]


T = TypeVar("T", bound="Answer")
_MISSING = object()


class Answer:
    """Base class of the JSON objects: a frozen dataclass whose methods are not compiled for each class."""

    sparse: ClassVar[frozenset[str]] = frozenset()  # fields that are left out where they are None
    _blank: ClassVar[dict[str, object]] = {}  # every field with its default, or _MISSING
    _made: ClassVar[tuple[tuple[str, Callable[[], object]], ...]] = ()  # fields whose default is made each time
    _needed: ClassVar[tuple[str, ...]] = ()  # fields without a default

    def __init__(self, *given: object, **named: object) -> None:
        """As of a dataclass, in a tenth of the time: the generated one of a frozen class sets fields one by one."""
        kind = type(self)
        values = {**kind._blank, **named}
        if given:
            values.update(zip(kind._blank, given, strict=False))
        for name, make in kind._made:
            if values[name] is _MISSING:
                values[name] = make()
        lacks = any(values[name] is _MISSING for name in kind._needed)
        if lacks or len(values) != len(kind._blank) or len(given) > len(values):
            raise TypeError(f"{kind.__name__} has other fields, or needs {', '.join(kind._needed)}")
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        same = type(other) is type(self)
        return all(getattr(self, each) == getattr(other, each) for each in self._blank) if same else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple([getattr(self, each) for each in self._blank]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{each}={getattr(self, each)!r}' for each in self._blank)})"

    def __getitem__(self, name: str) -> object:
        """A field by its name, as in the JSON object that it stands in."""
        return getattr(self, name)


@dataclass_transform(frozen_default=True)
def answer(kind: type[T]) -> type[T]:
    """Make a frozen dataclass that keeps Answer's methods: making each class's own would delay every start."""
    defaults, made = dict(kind._blank), dict(kind._made)
    for name, given in declare(kind).items():
        made.pop(name, None)
        if isinstance(given, Field):
            delattr(kind, name)
            if given.default_factory is not MISSING:
                made[name] = given.default_factory
            given = given.default
        defaults[name] = _MISSING if given is MISSING else given
    kind._blank, kind._made = defaults, tuple(made.items())
    kind._needed = tuple(name for name, default in defaults.items() if default is _MISSING and name not in made)
    return kind


# -- models and devices, as operators see them


@answer
class ErrorDetails(Answer):
    """What went wrong, with OpenAI's names."""

    message: str
    type: str = ""
    param: str | None = None
    code: str | None = None


@answer
class ModelSettings(Answer):
    """The settings of a model that are shown beside its state; empty once the model is not configured any more."""

    sparse = frozenset({"engine", "model", "aliases"})

    engine: str | None = None
    model: str | None = None
    aliases: tuple[str, ...] | None = None


@answer
class ModelLine(Answer):
    """A model, or one of its replicas, as ``vllmctl ps`` shows it."""

    name: str
    state: State
    level: int = 0
    devices: tuple[int, ...] = ()
    memory: int = 0
    in_flight: int = 0
    queued: int = 0
    oldest_wait: float | None = None
    idle: float | None = None
    since: Annotated[float | None, "seconds in that state, where that is known"] = None
    changed_at: Annotated[float | None, "when that state began, in Unix time, where that is known"] = None
    pinned: bool = False
    disabled: Annotated[str, "the message that clients get instead of an answer, if an operator has disabled it"] = ""
    leases: tuple[str, ...] = ()
    waiting_for: str = ""
    failure: str = ""
    expected: Annotated[int, "bytes of memory as configured or estimated; measured, it may be more; 0: not told"] = 0
    never: Annotated[str, "why it can never be loaded on these devices; empty if it can, or is"] = ""
    silent: Annotated[float | None, "seconds for which it has answered nothing, while requests wait in it"] = None
    health: HealthStatus = ""
    latency: Annotated[float | None, "of a replica: seconds to the first byte of its answers"] = None
    rests_in: Annotated[float | None, "seconds until its idle rules make it sleep, sleep deeper or stop"] = None
    pid: int | None = None
    unit: str = ""
    socket: str = ""
    instance: str = ""
    phase: str = ""
    detail: str = ""
    last_start_seconds: float | None = None
    start_phases: Phases = field(default_factory=dict)
    loader: Annotated[str, "the loader of its weights; empty: the engine's own"] = ""
    version: Annotated[str, "version of its engine at its last start, where that has an environment"] = ""
    power: Annotated[float | None, "watts, its share of its devices' draw"] = None
    unused_energy: Annotated[float | None, "joules that it has drawn since its last request"] = None
    started_at: Annotated[float | None, "when its engine was started, in Unix time"] = None
    config: ModelSettings = ModelSettings()
    replica_of: Annotated[str, "of a replica: the name of its model"] = ""
    replicas: tuple[ModelLine, ...] = ()
    serving: Annotated[int, "how many of its engines serve"] = 0
    degraded: Annotated[bool, "a replica is down that should serve"] = False


@answer
class Device(Answer):
    """A device's memory: all of it, promised to models, held by others."""

    index: int
    memory: int = 0
    reserve: int = 0
    promised: int = 0
    external: int = 0
    wedged: Annotated[str, "why nothing is put there"] = ""
    drained: Annotated[bool, "by an operator"] = False


@answer
class DeviceNow(Device):
    """A device with its name and its place in the machine, and with the last reading of its sensors."""

    name: str = ""
    id: str = ""
    links: Annotated[tuple[int, ...], "devices that NVLink or XGMI joins it with"] = ()
    node: Annotated[int | None, "its NUMA node"] = None
    cpus: Annotated[tuple[int, ...], "those of its NUMA node, where the machine has more than one"] = ()
    switch: Annotated[str, "the PCIe root port above it: those with the same one share a switch"] = ""
    power: Watts | None = None
    temperature: Annotated[float | None, "degrees Celsius"] = None
    utilisation: Annotated[float | None, "per cent of the time that it computed, as the driver says"] = None
    throttled: Annotated[str, "why its clock is reduced (heat, power)"] = ""


@answer
class Preview(Answer):
    """What a verb would do now, in sentences. ``possible``: it would change something."""

    action: str
    text: str = ""
    possible: bool = True


@answer
class PlanRun(Answer):
    """One run of a plan: how the recorded requests would have fared. Times in seconds, memory in bytes."""

    name: Annotated[str, "as it is, or with the change"]
    policy: str = ""
    devices: Annotated[tuple[int, ...], "memory of each"] = ()
    length: float = 0.0
    requests: int = 0
    served: int = 0
    failed: int = 0
    swaps: Annotated[int, "starts and wakes"] = 0
    wait: Annotated[Object, "mean, p50, p95, p99 and longest, from arrival until an engine works on it"] = field(
        default_factory=dict
    )
    latency: Annotated[Object, "the same until its last token"] = field(default_factory=dict)
    models: Annotated[Object, "the same figures by model"] = field(default_factory=dict)
    busy: Annotated[Object, "share of the time that a device worked, by index"] = field(default_factory=dict)
    memory: Annotated[Object, "mean share of a device's memory that was promised"] = field(default_factory=dict)
    errors: Annotated[Object, "how many requests failed, by reason"] = field(default_factory=dict)
    samples: Annotated[tuple[Object, ...], "at: seconds; queued; promised: bytes of each device"] = ()


@answer
class Plan(Answer):
    """Recorded traffic, simulated. ``recorded``: how many requests there were; only the last ones are replayed."""

    requests: int
    since: Annotated[float, "when the first that is replayed came, in Unix time"] = 0.0
    recorded: int = 0
    left_out: Annotated[Mapping[str, str], "models, and why they are in no run"] = field(default_factory=dict)
    runs: tuple[PlanRun, ...] = ()


@answer
class Configuration(Answer):
    """Which files were read, and why they are not in force, if they are not.

    ``error``: none is, so that no model is served. ``refused``: why the last reload was: an earlier one is in force.
    """

    files: tuple[str, ...] = ()
    error: str = ""
    refused: str = ""


@answer
class HostMemory(Answer):
    """The host memory for models that sleep at level 1."""

    sparse = frozenset({"standbys"})

    budget: int = 0
    promised: int = 0
    standbys: Annotated[int | None, "held by standbys, which end when a model needs it"] = None


@answer
class Host(Answer):
    """The machine around the devices; a value that it does not report is null."""

    system: Annotated[str, "its kernel and architecture"] = ""
    cpus: int = 0
    load: Annotated[float | None, "load average of the last minute"] = None
    memory: int = 0
    available: Annotated[int | None, "bytes of memory that are available without swapping"] = None


@answer
class StandbyLine(Answer):
    """An engine that has its imports done ahead of time, for the next model that is started."""

    instance: str
    program: str = ""
    state: Annotated[str, "importing or waiting"] = ""
    memory: Annotated[int, "bytes of the host's"] = 0


@answer
class Download(Answer):
    """A download of a model: how far it is, or how it ended."""

    model: str
    phase: Annotated[str, "waiting, looking, downloading, unpacking, done or failed"] = ""
    source: str = ""
    completed: Annotated[int, "bytes"] = 0
    total: Annotated[int, "bytes, 0 where that is not known yet"] = 0
    rate: Annotated[float, "bytes per second"] = 0.0
    elapsed: float = 0.0
    error: Annotated[str, "why it failed"] = ""
    behind: Annotated[tuple[str, ...], "while it waits: the downloads that run before it"] = ()


@answer
class Pulled(Answer):
    """The progress of a download, a line of a stream; the last line is ``done``, or has the ``error``."""

    sparse = frozenset({"done", "added", "settings", "seconds", "error"})

    model: str = ""
    phase: Annotated[str, "as in Download"] = ""
    source: str = ""
    completed: Annotated[int, "bytes"] = 0
    total: Annotated[int, "bytes, 0 where that is not known yet"] = 0
    rate: Annotated[float, "bytes per second"] = 0.0
    elapsed: float = 0.0
    behind: tuple[str, ...] = ()
    done: bool | None = None
    added: Annotated[bool | None, "whether the model is served from now on"] = None
    settings: Annotated[Object | None, "the settings with which the model is, or would be, served"] = None
    seconds: float | None = None
    error: ErrorDetails | None = None


@answer
class CachedModel(Answer):
    """A model in the engines' caches; ``models``: those that are loaded from it."""

    name: str
    path: str = ""
    size: Annotated[int, "bytes of its weight files"] = 0
    kind: Annotated[str, "generate, embed, rerank or transcribe"] = ""
    engine: Annotated[str, "the only kind of engine that its files are for, or nothing"] = ""
    files: Annotated[tuple[str, ...], "its GGUF files"] = ()
    models: tuple[str, ...] = ()


@answer
class Cached(Answer):
    """What the engines' caches hold. ``hub``: the address of the hub that is configured, if one is."""

    cached: tuple[CachedModel, ...] = ()
    hub: str = ""


@answer
class Added(Answer):
    """A model that is served from now on, and the file that says so."""

    model: str
    file: str = ""
    settings: Object = field(default_factory=dict)


@answer
class Removed(Answer):
    """A model that is not served any more.

    ``kept``: why files stay. ``bytes``: size of the files to be removed, ``freed``: of those that were.
    """

    model: str
    file: str = ""
    removed: tuple[str, ...] = ()
    kept: str = ""
    bytes: int = 0
    freed: int = 0


@answer
class Status(Answer):
    """How everything stands: the daemon, its devices, its models."""

    sparse = frozenset({"standbys"})

    version: str
    pid: int = 0
    uptime: float = 0.0
    policy: str = ""
    event_loop: Annotated[str, "asyncio, or uvloop with its version"] = ""
    opened: Annotated[bool, "devices and engines have been found"] = True
    configuration: Configuration = Configuration()
    requests: int = 0
    connections: int = 0
    backend: str = ""
    source: str = ""
    trouble: Annotated[str, "why the devices do not answer"] = ""
    launcher_trouble: Annotated[str, "why the launcher starts and ends no engine now, and what helps"] = ""
    unwritten: Annotated[str, "which of the daemon's own files cannot be written now, and why"] = ""
    devices: tuple[DeviceNow, ...] = ()
    models: tuple[ModelLine, ...] = ()
    host_memory: HostMemory = HostMemory()
    host: Host = Host()
    downloads: tuple[Download, ...] = ()
    standbys: tuple[StandbyLine, ...] | None = None


@answer
class Decision(Answer):
    """A decision of the scheduler about a model, and why; in a stream of events also each change of ``state``."""

    sparse = frozenset({"state"})

    at: float
    what: str
    model: str = ""
    why: str = ""
    numbers: Object = field(default_factory=dict)
    state: str | None = None


@answer
class Decisions(Answer):
    """The last decisions, oldest first."""

    decisions: tuple[Decision, ...] = ()


@answer
class ErrorText(Answer):
    """The error with which a stream of progress ends."""

    message: str = ""


@answer
class Progress(Answer):
    """The progress of a start, wake, sleep or stop, a line of a stream; the last line is ``done``."""

    sparse = frozenset({"phase", "detail", "elapsed", "seconds", "done", "error"})

    state: str = ""
    phase: str | None = None
    detail: str | None = None
    elapsed: float | None = None
    seconds: float | None = None
    done: bool | None = None
    error: ErrorText | None = None


# -- results of operators' verbs


@answer
class ProbedReplica(Answer):
    """One engine's answer to a probe."""

    name: str
    seconds: Annotated[float | None, "until its answer; null without one"] = None
    message: Annotated[str, "why there are no seconds"] = ""


@answer
class Probed(Answer):
    """The answers of a model's engines to a probe, the fastest first; ``fastest`` is null without any."""

    model: str = ""
    fastest: str | None = None
    replicas: tuple[ProbedReplica, ...] = ()


@answer
class Reloaded(Answer):
    """What a reload changed; ``later``: each setting that is not in force, with what becomes of it."""

    models: int = 0
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    later: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@answer
class Suspended(Answer):
    """The devices that engines have left before the machine's sleep, or may use again."""

    devices: tuple[int, ...] = ()
    stopped: Annotated[tuple[str, ...], "the engines that were on them"] = ()
    left: Annotated[tuple[str, ...], "the engines that did not end in time"] = ()


@answer
class Killed(Answer):
    """A process that was killed."""

    pid: int = 0
    status: Literal["killed"] = "killed"
    message: str = ""


@answer
class KeyLine(Answer):
    """An API key, without its text. ``settings``: its limits and the like that are not at their defaults."""

    name: str
    scopes: tuple[str, ...] = ()
    models: Annotated[tuple[str, ...], "the only ones that it may use; empty: all"] = ()
    configured: Annotated[bool, "it is in the configuration, and can be changed only there"] = False
    at: Annotated[float | None, "when it was made, in Unix time; null for a configured one"] = None
    settings: Object = field(default_factory=dict)


@answer
class Keys(Answer):
    """All API keys, without their text."""

    keys: tuple[KeyLine, ...] = ()


@answer
class NewKey(Answer):
    """A key that was made, with its text, which no other answer has."""

    name: str
    key: str = ""


@answer
class Known(Answer):
    """A run-time model; ``differs``: settings that are not as requested."""

    model: str
    configured: bool = False
    differs: tuple[str, ...] = ()
    listen: tuple[str, ...] = ()


@answer
class Dropped(Answer):
    """A run-time model that was removed."""

    model: str
    dropped: bool = True


# -- for every client


@answer
class Limits(Answer):
    """Requests at a time, requests that may wait, and for how long."""

    concurrency: int | None = None
    queue: int = 0
    queue_seconds: float | None = None


@answer
class Card(Answer):
    """A model, an adapter, a variant or a pool, as clients see it."""

    sparse = frozenset({"members"})

    id: str
    display_name: str = ""
    description: str = ""
    hidden: Annotated[bool, "not in lists"] = False
    aliases: tuple[str, ...] = ()
    state: State = "stopped"
    disabled: Annotated[str, "the message instead of an answer, if an operator has disabled it"] = ""
    engine: str = ""
    max_model_len: Annotated[int | None, "the running engine's, else the configured one"] = None
    capabilities: tuple[str, ...] = ()
    limits: Limits = Limits()
    memory: Annotated[int, "bytes on each of its devices"] = 0
    discovered: Annotated[bool, "found in the cache, not configured"] = False
    parent: Annotated[str | None, "the model that an adapter or a variant belongs to"] = None
    root: str = ""
    members: Annotated[tuple[str, ...] | None, "of a pool"] = None


@answer
class Model(Card):
    """A model under one of its names, with the fields of OpenAI's and Anthropic's APIs."""

    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    created: int = 0
    created_at: Moment = ""
    owned_by: str = "vllmd"


@answer
class ModelList(Answer):
    """All models on one page, with the fields of OpenAI's and Anthropic's APIs."""

    sparse = frozenset({"models"})

    object: Literal["list"] = "list"
    data: tuple[Model, ...] = ()
    has_more: Annotated[bool, {"const": False}] = False
    first_id: str | None = None
    last_id: str | None = None
    models: Annotated[tuple[str, ...] | None, "for Codex, which asks with client_version"] = None


@answer
class DeviceFree(Device):
    """A device with the memory that may still be promised."""

    free: int = 0


@answer
class Health(Answer):
    """The health of vllmd, and whether it can serve at once (``ready``)."""

    status: Annotated[str, "ok, or what is wrong"] = "ok"
    ready: bool = True
    gpu: tuple[DeviceFree, ...] = ()
    loaded_models: tuple[str, ...] = ()
    model_status: Mapping[str, State] = field(default_factory=dict)


@answer
class Alive(Answer):
    """The answer to a liveness probe, whatever else is wrong."""

    status: Literal["ok"] = "ok"


@answer
class Version(Answer):
    """The version of the program."""

    version: str


@answer
class Error(Answer):
    """The body of an answer that is an error."""

    error: ErrorDetails


def failure(error: VllmdError) -> ErrorDetails:
    """The JSON object of an error."""
    return ErrorDetails(error.message, error.type, error.param, error.code)


# -- signing in to the page


@answer
class PageSession(Answer):
    """A session of the page: its user, when it ends, and the ``token`` that the page sends with each request."""

    token: str
    name: str = ""
    scopes: tuple[str, ...] = ()
    expires: Annotated[float, "Unix time"] = 0.0


@answer
class PageLink(Answer):
    """A path of the page that signs in once, and the addresses that have it."""

    path: str
    expires_in: Annotated[float, "seconds"] = 0.0
    listen: tuple[str, ...] = ()


# -- requests and use


@answer
class RequestTokens(Answer):
    """Tokens of a request. ``cached``: those of the prompt that the engine had in its cache."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    estimated: Annotated[bool, "estimated from sizes, since the answer had no usage"] = False


@answer
class RequestEntry(Answer):
    """A request that ended, or one under way; a value that is not known yet is null."""

    id: Annotated[str, "the x-request-id"]
    number: Annotated[int, "counts up; 0 while it is under way"] = 0
    at: Annotated[float, "when it came, in Unix time"] = 0.0
    method: str = ""
    path: str = ""
    model: str = ""
    replica: str = ""
    key: str = ""
    client: Annotated[str, "its address, or the process on a Unix socket"] = ""
    agent: Annotated[str, "the client's User-Agent"] = ""
    status: Annotated[int, "499 where the client left before an answer, 0 while there is none"] = 0
    error: Annotated[str, "the kind of error, if vllmd ended the request with one"] = ""
    message: str = ""
    stream: bool = False
    received: Annotated[int, "bytes"] = 0
    sent: Annotated[int, "bytes"] = 0
    queue_seconds: Annotated[float | None, "waiting for other requests and for room"] = None
    load_seconds: Annotated[float | None, "waiting for the model to start or wake"] = None
    first_byte_seconds: Annotated[float | None, "from its arrival to the first byte of the answer"] = None
    seconds: Annotated[float, "from its arrival to its end, or until now"] = 0.0
    retries: int = 0
    tokens: RequestTokens | None = None
    bodies: Annotated[bool, "its bodies were recorded"] = False


@answer
class Requests(Answer):
    """The last requests, the newest first, and those under way, the oldest first."""

    requests: tuple[RequestEntry, ...] = ()
    under_way: tuple[RequestEntry, ...] = ()


@answer
class Cancelled(Answer):
    """Requests that were under way and are cancelled, as they were then."""

    cancelled: tuple[RequestEntry, ...] = ()


@answer
class RecordedBodies(Answer):
    """The bodies of a request and of its answer, without files and secrets. ``..._cut``: only the beginning is kept."""

    request: str = ""
    answer: str = ""
    request_cut: bool = False
    answer_cut: bool = False


@answer
class RequestInFull(RequestEntry):
    """A request with its head, and with its bodies if they were recorded and the caller may change things."""

    headers: Annotated[tuple[tuple[str, ...], ...], "name and value of each field"] = ()
    recorded: RecordedBodies | None = None


@answer
class Recording(Answer):
    """Bodies of a model's requests, a key's, or of both together are recorded."""

    number: int
    model: str = ""
    key: str = ""
    most_bytes: Annotated[int, "kept of each body"] = 0
    seconds_left: float = 0.0


@answer
class Recordings(Answer):
    """The recordings under way, and the memory of the bodies that they have kept."""

    recordings: tuple[Recording, ...] = ()
    requests: Annotated[int, "requests whose bodies are kept"] = 0
    bytes: Annotated[int, "size of these bodies"] = 0


@answer
class UsageRow(Answer):
    """Sums of use for one key, model or time, or a combination of these."""

    sparse = frozenset({"key", "model", "day", "hour", "month"})

    key: str | None = None
    model: str | None = None
    day: str | None = None
    hour: str | None = None
    month: str | None = None
    requests: float = 0
    errors: float = 0
    prompt: Annotated[float, "tokens"] = 0
    cached: Annotated[float, "tokens"] = 0
    answer: Annotated[float, "tokens"] = 0
    estimated: Annotated[float, "tokens that were estimated from sizes"] = 0
    engine_seconds: float = 0
    device_seconds: Annotated[float, "the share of devices' memory that was held, times seconds"] = 0
    memory_mib_seconds: float = 0


@answer
class Usage(Answer):
    """Use between two moments in Unix time, summed ``by`` key, model or time."""

    by: tuple[str, ...] = ()
    since: float = 0.0
    until: float = 0.0
    trouble: Annotated[str, "why use cannot be recorded now"] = ""
    rows: tuple[UsageRow, ...] = ()


@answer
class Arrival(Answer):
    """A request as ``vllmctl simulate`` reads it: time of arrival, model, and tokens in and out."""

    sparse = frozenset({"key"})

    time: float
    model: str = ""
    prompt: int = 0
    output: int = 0
    key: str | None = None


# -- the instances API, /api/v1


@answer
class GPUProcess(Answer):
    """A process on a GPU."""

    pid: int
    name: str = ""
    gpu_memory_usage: Annotated[int | None, "MiB"] = None


@answer
class GPUInfo(Answer):
    """A GPU and the processes on it."""

    id: int
    memory_usage: Annotated[float, "per cent"] = 0.0
    power_draw: Watts | None = None
    processes: tuple[GPUProcess, ...] = ()


@answer
class KillProcessResponse(Killed):
    """A process that was killed, as ``/api/v1`` names it."""


@answer
class Instance(Answer):
    """An instance of a model on a GPU; its state is in capitals."""

    model_name: str
    model_type: str = ""
    status: Annotated[str, {"enum": [state.upper() for state in STATES]}] = "STOPPED"
    pid: int | None = None
    port: int | None = None
    created_at: str | None = None
    updated_at: str = ""
    message: str = ""


@answer
class ModelInstanceInfo(Instance):
    """A model with the number of its instances and their GPUs, and the state of one."""

    active_gpu_ids: tuple[int, ...] = ()
    total_instances: int = 0


@answer
class ModelStatusItem(Instance):
    """One instance, and its first GPU."""

    gpu_id: int | None = None
