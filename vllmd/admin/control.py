"""What the endpoints may ask of the daemon."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllmd.admin.adapters import RuntimeAdapters
from vllmd.admin.counters import Counters
from vllmd.admin.runtime_models import RuntimeModels
from vllmd.api import answers
from vllmd.api.answers import (
    Added,
    Arrival,
    Cached,
    Cancelled,
    Card,
    Decision,
    Decisions,
    Device,
    Download,
    GPUInfo,
    Health,
    KeyLine,
    Keys,
    Killed,
    ModelLine,
    NewKey,
    Plan,
    Preview,
    Probed,
    Progress,
    Pulled,
    Recordings,
    Reloaded,
    Removed,
    RequestEntry,
    RequestInFull,
    Requests,
    Suspended,
)
from vllmd.core.types import Snapshot
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.records.ring import Filter


@dataclass(frozen=True, slots=True)
class Gauges:
    """How things stand at the moment of a scrape. ``used`` bytes, ``power`` watts, ``load`` 0 to 1, by device index."""

    snapshot: Snapshot | None
    connections: int = 0
    requests: int = 0
    valid: bool = True  # the configuration
    last_starts: Mapping[str, float] = field(default_factory=dict)  # model -> seconds
    last_phases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # model -> phase -> seconds
    last_loaders: Mapping[str, str] = field(default_factory=dict)  # model -> load format, where one was chosen for it
    used: Mapping[int, int] = field(default_factory=dict)
    power: Mapping[int, float] = field(default_factory=dict)
    load: Mapping[int, float] = field(default_factory=dict)
    energy: Mapping[int, float] = field(default_factory=dict)  # joules since the daemon's start
    temperature: Mapping[int, float] = field(default_factory=dict)  # degrees Celsius
    throttled: Mapping[int, bool] = field(default_factory=dict)
    model_power: Mapping[str, float] = field(default_factory=dict)  # watts
    model_energy: Mapping[str, float] = field(default_factory=dict)  # joules
    unused_energy: Mapping[str, float] = field(default_factory=dict)  # of these the ones that were drawn unused
    unreadable: Sequence[int] = ()
    use_written: bool = True  # the record of use can be written
    traced: Mapping[str, int] = field(default_factory=dict)  # requests by what became of their spans


class Status(Protocol):
    """Tells how things stand, and changes nothing.

    Whatever needs the devices or the engines waits, or raises Unavailable, while the daemon still looks for them.
    """

    async def opened(self) -> None:
        """Wait until devices and engines have been found."""

    async def models(self) -> list[Card]:
        """Every model, adapter, variant and pool."""

    async def model(self, name: str) -> Card | None:
        """One of them by its name; None if none is called so."""

    def health(self) -> Health:
        """Whether vllmd is well, with devices, and the state of every model."""

    async def status(self, caller: Caller = ANYBODY) -> answers.Status:
        """Everything that ``vllmctl ps``, ``info`` and ``gpus`` show, of the models that the caller may use."""

    def line(self, model: str) -> ModelLine:
        """One model's line of ``status``."""

    def resolve(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of what the caller calls a model, or a replica of it. Raises UnknownModel, Forbidden."""

    def called(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, an adapter, a variant or a pool. Raises UnknownModel, Forbidden."""

    def types(self) -> list[str]:
        """The kinds of engines that there are."""

    def settings(self, model: str) -> Iterator[str]:
        """The configuration in force, or one model's part, as lines of YAML with each setting's origin; no secrets."""

    def decisions(self, model: str) -> Decisions:
        """The last decisions, oldest first; all of them, or one model's."""

    async def gauges(self) -> Gauges:
        """How things stand; the devices are read for it."""

    async def gpus(self) -> list[GPUInfo]:
        """The devices with the processes on them. Raises Unsupported where none can be read."""

    async def scrape(self, model: str) -> bytes:
        """The engine's own metrics. Raises Conflict if it has none now."""


class Commands(Protocol):
    """Has things done; tells nothing but that. Each waits until devices and engines have been found."""

    async def post(self, event: str, fields: Mapping[str, object]) -> None:
        """Have the core decide on an event of ``vllmd.core.events``, by its name and its fields."""

    async def load(self, model: str) -> None:
        """Have it started or woken; returns at once."""

    async def unload(self, model: str, *, force: bool, device: int | None = None) -> None:
        """Have it stopped, or only its engines on that device, after their requests unless ``force``; clears a
        failure.
        """

    async def sleep(self, model: str, level: int) -> None:
        """Have it put to sleep at level 1 or 2, or stopped at 3, after its requests. Raises Conflict if not loaded."""

    async def disable(self, model: str, message: str | None) -> None:
        """Serve nobody by it until it is enabled, whoever restarts meanwhile; clients are told ``message``.

        What runs comes to its end, and its engine is stopped. Raises Unavailable where that cannot be kept.
        """

    async def enable(self, model: str) -> None:
        """Serve it again, with all its replicas. Raises Unavailable."""

    async def lease(self, model: str, lease: str, seconds: float | None) -> None:
        """Keep it for ``seconds`` (None: until released)."""

    async def release(self, model: str, lease: str, *, stop: bool) -> None:
        """Give a lease back; ``stop``: the last one to go stops the model."""

    async def probe(self, model: str, all: bool, *, limit: float | None) -> Probed:
        """Ask each engine of it that serves its probe, all at the same time.

        Unless ``all`` are to have ``limit`` seconds (None: as configured), none is waited for once another has
        answered. Raises Conflict where none of them serves.
        """

    @property
    def load_on(self) -> Callable[[str, int], Awaitable[str]]:
        """Have one of its engines on that device, and say which. Raises BadRequest, Conflict."""

    @property
    def drop_instance(self) -> Callable[[str], Awaitable[None]]:
        """Forget an engine that was added; any other stays."""

    async def kill(self, pid: int, *, force: bool) -> Killed:
        """End the engine that has the process, or with ``force`` another process that is on a GPU.

        Raises NotFound, Forbidden.
        """

    async def drain(self, device: int, drained: bool) -> Device:
        """Take a device out of use, or give it back; how it is then. Raises NotFound."""

    async def suspend(self, suspended: bool) -> Suspended:
        """Have engines leave the devices before the machine sleeps, or come back."""

    @property
    def reload(self) -> Callable[[], Awaitable[Reloaded]]:
        """Take the configuration anew. Raises ConfigError."""


class Previews(Protocol):
    """Tells what operators' verbs would do, and does nothing."""

    async def of_model(self, model: str, action: str, *, caller: Caller = ANYBODY) -> Preview:
        """What the verb would do with a model or a replica, as things stand. Raises UnknownModel."""

    async def of_device(self, device: int, action: str) -> Preview:
        """What draining a device, or giving it back, would do. Raises NotFound."""


class Plans(Protocol):
    """Computes what would be, beside what is."""

    async def run(
        self,
        since: float | None,
        devices: str | None,
        policy: str | None,
        host_memory: str | None,
        models: Mapping[str, object],
    ) -> Plan:
        """The recorded traffic with something else. Raises BadRequest, NotFound, Conflict, TookTooLong."""


class Following(Protocol):
    """Tells what happens, as it happens."""

    def progress(self, model: str) -> AsyncIterator[Progress]:
        """A model's state and phase, now and at each change until no change is under way; the last one is ``done``."""

    @property
    def watch(self) -> Callable[[], AsyncIterator[Decision]]:
        """Decisions and what became of them, as it happens, until the caller stops."""

    def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and with ``follow`` what comes."""


class Records(Protocol):
    """What is kept of requests and of use. Requests that a caller may not see are not there for it."""

    @property
    def trouble(self) -> str:
        """Why use cannot be written down now, "" if it can."""

    def traced(self) -> dict[str, int]:
        """How many requests' spans were ``sent`` to a collector, and how many ``dropped``; {} where none are sent."""

    def requests(
        self,
        model: str,
        key: str | None,
        status: str,
        since: float | None,
        failed: bool,
        slower: float | None,
        limit: int,
        caller: Caller,
    ) -> Requests:
        """The last ones that have ended and those under way, as ``Filter.of`` has it; no more than ``limit``."""

    def request(self, request_id: str, caller: Caller) -> RequestInFull:
        """One request with its head, and with bodies if the caller may change things. Raises NotFound."""

    def cancel(self, request_id: str, caller: Caller) -> Cancelled:
        """End those under way that have this id: what waits leaves its queue, what runs its engine. Raises NotFound."""

    def watch(self, filter: Filter, caller: Caller) -> AsyncIterator[RequestEntry]:
        """Requests as they end, those that the filter lets through, until the caller stops."""

    def record(self, model: str | None, key: str | None, seconds: float, most_bytes: int) -> Recordings:
        """Have bodies kept for so long, ``most_bytes`` of each. Raises BadRequest."""

    def stop_recording(self, number: int | None) -> Recordings:
        """End a recording; None: all. Raises NotFound."""

    def recorded(self) -> Recordings:
        """The recordings that go on, and how much is kept."""

    async def usage(
        self, by: str, since: float | None, until: float | None, key: str | None, model: str
    ) -> answers.Usage:
        """Sums by these dimensions, which have commas between. Raises BadRequest, Unavailable, NotFound."""

    def trace(self, since: float | None, *, anonymised: bool) -> AsyncIterator[Arrival]:
        """Arrivals from then on (None: of seven days), for ``vllmctl simulate``. Raises Unavailable, NotFound."""


class Store(Protocol):
    """The daemon, as far as these endpoints need it. Each raises a VllmdError for what cannot be."""

    def pull(self, name: str, *, add: bool, detached: bool) -> AsyncGenerator[Pulled, None]:
        """Have a model's files here, and with ``add`` the model served; how far it is, line by line.

        The last line is ``done``. ``detached``: it goes on when the caller has left.
        """

    def stop(self, model: str) -> Download:
        """End a download. Raises NotFound."""

    async def contents(self) -> Cached:
        """What the engines' caches hold, and which models are loaded from it."""

    async def add(self, name: str, settings: Mapping[str, object]) -> Added:
        """Serve a model from now on. Raises BadRequest, Conflict, Forbidden."""

    async def copy(self, model: str, name: str) -> Added:
        """Serve what a model is loaded from under another name as well. Raises UnknownModel, Conflict."""

    async def remove(self, model: str, *, files: bool, dry: bool) -> Removed:
        """Serve it no more; ``files``: and remove them. ``dry``: only say what would be removed.

        Raises UnknownModel, Conflict.
        """


class KeyStore(Protocol):
    """Keys that are made while it runs; each change counts at once."""

    @property
    def list(self) -> Callable[[], Keys]:
        """All keys, those of the configuration among them; never their text."""

    def create(self, name: str, settings: Mapping[str, object]) -> NewKey:
        """Make one; its text is told this once. Raises BadRequest, Conflict, Unavailable."""

    def revoke(self, name: str) -> Keys:
        """Revoke a key: it opens nothing from now on. Returns the keys that are left. Raises NotFound, Unavailable."""

    def limit(self, name: str, settings: Mapping[str, object]) -> KeyLine:
        """Change what is named of it; null takes a limit away. Raises NotFound, BadRequest, Unavailable."""


@dataclass(frozen=True, slots=True)
class Control:
    """The daemon, as the endpoints see it."""

    counters: Counters
    status: Status
    commands: Commands
    previews: Previews
    plans: Plans
    following: Following
    runtime_models: RuntimeModels
    store: Store
    records: Records
    keys: KeyStore
    adapters: RuntimeAdapters
