"""The daemon as the endpoints see it: what they may read, have done, and follow.

``Control`` holds one object for each of these protocols; ``daemon.startup`` makes them. Those that read change nothing,
those that command tell nothing but that. A verb of ``vllmd.api.verbs`` names one of the methods by its path, such as
``commands.load``, and its parameters are the method's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from vllmd.admin.counters import Counters
from vllmd.api import answers
from vllmd.core.types import Snapshot
from vllmd.frozen import frozen
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.records.ring import Filter

if TYPE_CHECKING:
    from vllmd.admin.adapters import RuntimeAdapters
    from vllmd.admin.runtime_models import RuntimeModels


@frozen
class Gauges:
    """The values at the moment of a scrape. ``used`` bytes, ``power`` watts, ``load`` 0 to 1, by device index."""

    snapshot: Snapshot | None
    connections: int = 0
    requests: int = 0
    valid: bool = True  # the configuration
    last_starts: Mapping[str, float] = field(default_factory=dict)  # model -> seconds
    last_phases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # model -> phase -> seconds
    last_loaders: Mapping[str, str] = field(default_factory=dict)  # model -> load format, where vllmd chose one
    used: Mapping[int, int] = field(default_factory=dict)
    power: Mapping[int, float] = field(default_factory=dict)
    load: Mapping[int, float] = field(default_factory=dict)
    energy: Mapping[int, float] = field(default_factory=dict)  # joules since the daemon's start
    temperature: Mapping[int, float] = field(default_factory=dict)  # degrees Celsius
    throttled: Mapping[int, bool] = field(default_factory=dict)
    model_power: Mapping[str, float] = field(default_factory=dict)  # watts
    model_energy: Mapping[str, float] = field(default_factory=dict)  # joules
    unused_energy: Mapping[str, float] = field(default_factory=dict)  # joules of these while no request ran
    unreadable: Sequence[int] = ()
    use_written: bool = True  # the record of use can be written
    traced: Mapping[str, int] = field(default_factory=dict)  # number of requests by outcome of their spans


class Status(Protocol):
    """Reads the state of the daemon, its models and devices, and changes nothing.

    A method that needs the devices or the engines waits, or raises Unavailable, while the daemon still looks for them.
    """

    async def opened(self) -> None:
        """Wait until devices and engines have been found."""

    async def models(self) -> list[answers.Card]:
        """Every model, adapter, variant and pool."""

    async def model(self, name: str) -> answers.Card | None:
        """One of them by its name; None if none is called so."""

    async def health(self) -> answers.Health:
        """The health of vllmd, with its devices and the state of every model."""

    async def status(self, caller: Caller = ANYBODY) -> answers.Status:
        """Everything that ``vllmctl ps``, ``info`` and ``gpus`` show, of the models that the caller may use."""

    def line(self, model: str) -> answers.ModelLine:
        """One model's line of ``status``."""

    def resolve(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of the model, or the id of the replica, that ``name`` means to the caller.

        Raises UnknownModel, Forbidden.
        """

    def called(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, an adapter, a variant or a pool. Raises UnknownModel, Forbidden."""

    def types(self) -> list[str]:
        """The names of all engine kinds."""

    def settings(self, model: str) -> Iterator[str]:
        """The configuration in force, or one model's part, as lines of YAML with each setting's origin; no secrets."""

    def decisions(self, model: str) -> answers.Decisions:
        """The last decisions, oldest first; all of them, or one model's."""

    async def gauges(self) -> Gauges:
        """The values for a scrape; reads the devices."""

    async def gpus(self) -> list[answers.GPUInfo]:
        """The devices with the processes on them. Raises Unsupported where none can be read."""

    async def scrape(self, model: str) -> bytes:
        """The engine's own metrics. Raises Conflict if it has none now."""


class Commands(Protocol):
    """Operators' commands. Each waits until devices and engines have been found."""

    async def post(self, event: str, fields: Mapping[str, object]) -> None:
        """Have the core decide on an event of ``vllmd.core.events``, by its name and its fields."""

    async def load(self, model: str) -> None:
        """Begin to start or wake a model; return at once."""

    async def unload(self, model: str, *, force: bool, device: int | None = None) -> None:
        """Stop a model, or only its engines on ``device``, after their requests unless ``force``; clear a failure."""

    async def sleep(self, model: str, level: int) -> None:
        """Put a model to sleep at level 1 or 2, or stop it at 3, after its requests. Raises Conflict if not loaded."""

    async def disable(self, model: str, message: str | None) -> None:
        """Take a model out of use until it is enabled, over restarts as well; its clients get ``message``.

        Running requests are finished, then its engine is stopped. Raises Unavailable where that cannot be written down.
        """

    async def enable(self, model: str) -> None:
        """Serve a disabled model again, with all its replicas. Raises Unavailable."""

    async def lease(self, model: str, lease: str, seconds: float | None) -> None:
        """Keep a model loaded for ``seconds`` (None: until released)."""

    async def release(self, model: str, lease: str, *, stop: bool) -> None:
        """Give a lease back; ``stop``: the last one to go stops the model."""

    async def probe(self, model: str, all: bool, *, limit: float | None) -> answers.Probed:
        """Probe the engines of a model that serve, all at the same time.

        Without ``all`` none is waited for once another has answered; with it each has ``limit`` seconds (None: as
        configured). Raises Conflict where none of them serves.
        """

    @property
    def load_on(self) -> Callable[[str, int], Awaitable[str]]:
        """Load one of a model's engines on a device. Returns its id. Raises BadRequest, Conflict."""

    @property
    def drop_instance(self) -> Callable[[str], Awaitable[None]]:
        """Forget an instance that the instances API added; ids of configured engines are ignored."""

    async def kill(self, pid: int, *, force: bool) -> answers.Killed:
        """Kill the engine that a process belongs to, or with ``force`` another process that holds a GPU.

        Raises NotFound, Forbidden.
        """

    async def drain(self, device: int, drained: bool) -> answers.Device:
        """Take a device out of use, or give it back. Raises NotFound."""

    async def suspend(self, suspended: bool) -> answers.Suspended:
        """Take the engines off the devices before the machine sleeps, or let them back."""

    @property
    def reload(self) -> Callable[[], Awaitable[answers.Reloaded]]:
        """Read the configuration again. Raises ConfigError."""


class Previews(Protocol):
    """Says what operators' verbs would do, and does nothing."""

    async def of_model(self, model: str, action: str, *, caller: Caller = ANYBODY) -> answers.Preview:
        """What the verb would do with a model or a replica now. Raises UnknownModel."""

    async def of_device(self, device: int, action: str) -> answers.Preview:
        """What draining a device, or giving it back, would do. Raises NotFound."""


class Plans(Protocol):
    """Simulates the recorded traffic under another configuration."""

    async def run(
        self,
        since: float | None,
        devices: str | None,
        policy: str | None,
        host_memory: str | None,
        models: Mapping[str, object],
    ) -> answers.Plan:
        """Simulate it as it is, and with what is not None. Raises BadRequest, NotFound, Conflict, TookTooLong."""


class Following(Protocol):
    """Streams of what happens, as it happens."""

    def progress(self, model: str) -> AsyncIterator[answers.Progress]:
        """A model's state and phase, now and at each change until no change is under way; the last one is ``done``."""

    @property
    def watch(self) -> Callable[[], AsyncIterator[answers.Decision]]:
        """Decisions and the changes of state that follow, until the caller stops."""

    def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and with ``follow`` new ones as they come."""


class Records(Protocol):
    """The records of requests and of use. Requests that a caller may not see are not found."""

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
    ) -> answers.Requests:
        """The last requests that ended and those under way that match (see ``Filter.of``), at most ``limit``."""

    def request(self, request_id: str, caller: Caller) -> answers.RequestInFull:
        """One request with its head, and with bodies if the caller may change things. Raises NotFound."""

    def cancel(self, request_id: str, caller: Caller) -> answers.Cancelled:
        """Cancel the requests under way that have this id, whether they wait or run. Raises NotFound."""

    def watch(self, filter: Filter, caller: Caller) -> AsyncIterator[answers.RequestEntry]:
        """Requests that match, as they end, until the caller stops."""

    def record(self, model: str | None, key: str | None, seconds: float, most_bytes: int) -> answers.Recordings:
        """Keep bodies for ``seconds``, ``most_bytes`` of each. Raises BadRequest."""

    def stop_recording(self, number: int | None) -> answers.Recordings:
        """End a recording; None: all. Raises NotFound."""

    def recorded(self) -> answers.Recordings:
        """The recordings under way, and the size of what they have kept."""

    async def usage(
        self, by: str, since: float | None, until: float | None, key: str | None, model: str
    ) -> answers.Usage:
        """Sums by these dimensions, which have commas between. Raises BadRequest, Unavailable, NotFound."""

    def trace(self, since: float | None, *, anonymised: bool) -> AsyncIterator[answers.Arrival]:
        """Arrivals from then on (None: of seven days), for ``vllmctl simulate``. Raises Unavailable, NotFound."""


class Store(Protocol):
    """Models as files: downloads, added models, the caches."""

    def pull(self, name: str, *, add: bool, detached: bool) -> AsyncGenerator[answers.Pulled, None]:
        """Download a model, and with ``add`` serve it. Yields the progress; the last line is ``done``.

        ``detached``: the download goes on when the caller has left.
        """

    def stop(self, model: str) -> answers.Download:
        """End a download. Raises NotFound."""

    async def contents(self) -> answers.Cached:
        """The models in the engines' caches, and which served models use each."""

    async def add(self, name: str, settings: Mapping[str, object]) -> answers.Added:
        """Serve a model from now on. Raises BadRequest, Conflict, Forbidden."""

    async def copy(self, model: str, name: str) -> answers.Added:
        """Serve the files of a model under another name as well. Raises UnknownModel, Conflict."""

    async def remove(self, model: str, *, files: bool, dry: bool) -> answers.Removed:
        """Remove an added model, and with ``files`` its files; ``dry``: only say what would be removed.

        Raises UnknownModel, Conflict.
        """


class KeyStore(Protocol):
    """API keys made while the daemon runs; each change counts at once."""

    @property
    def list(self) -> Callable[[], answers.Keys]:
        """All keys, those of the configuration among them; never their text."""

    def create(self, name: str, settings: Mapping[str, object]) -> answers.NewKey:
        """Make a key; only this answer has its text. Raises BadRequest, Conflict, Unavailable."""

    def revoke(self, name: str) -> answers.Keys:
        """Revoke a key. Returns the keys that are left. Raises NotFound, Unavailable."""

    def limit(self, name: str, settings: Mapping[str, object]) -> answers.KeyLine:
        """Change the named settings of a key; null takes a limit away. Raises NotFound, BadRequest, Unavailable."""


@frozen
class Control:
    """The daemon as the endpoints see it, see the file's docstring."""

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
