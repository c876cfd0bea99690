"""What an engine kind is: a spec becomes argv, environment, probes, sleep calls.

An engine never does anything itself: it says what to run and which HTTP calls
mean what, the daemon carries it out. Third parties register theirs in the
entry-point group ``vllmd.engines``; of the contract they may leave out
``adapters``, ``alive``, ``busy``, ``device_count``, ``headers`` and ``own_api``, for which ``Plain`` has the defaults.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint


@dataclass(frozen=True, slots=True)
class Listen:
    """Where an engine listens: a Unix socket path, or a host and port (loopback, unless it is remote).

    ``tls``: "" for plain HTTP, else ``system`` or the path of a file with the certificates to trust.
    ``prefix``: what stands before every path, such as ``/openai``. ``key``: the bearer token that it was told to ask
    for (``Place.key``), "" if none. ``owner``: the user id that must be found listening there; the daemon fills it in.
    """

    uds: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    tls: str = ""
    prefix: str = ""
    key: str = field(default="", repr=False)
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call of a protocol; anything but ``expect`` (a status) is a failure. ``timeout`` in seconds."""

    method: str
    path: str
    json: object = None
    timeout: float = 60.0
    expect: int = 200
    optional: bool = False  # a failure is logged and passed over
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # a remote's key, for one


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter of an engine. ``path``: as configured. ``served_name``: what the engine knows it by.

    ``members``: what a JSON request for it has, whatever the client says. ``load``: the call that loads it; None: it is
    there from the engine's start on.
    """

    name: str
    path: str
    served_name: str
    members: Mapping[str, object] = field(default_factory=dict)
    load: Call | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start. ``env`` is added to the launcher's clean base environment.

    An empty ``argv`` starts nothing: the server is somebody else's, reached at ``listen``.
    ``stop``: a command that ends it (``podman stop``), instead of a signal.
    ``stop_signal``: on which it finishes what runs and exits.
    ``watch``: seconds between looks at a server that is somebody else's.
    ``self_managed``: it loads and frees memory as it pleases, so what it holds at one moment is not what it takes.
    """

    argv: tuple[str, ...]
    listen: Listen
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str = ""
    stop: tuple[str, ...] = ()
    stop_signal: int = signal.SIGTERM
    self_managed: bool = False
    watch: float = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A phase of a start, read from a log line: ``weights``, ``compile``, ``graphs``, ``download``, ...

    ``once``: what the phase makes is kept, so that later starts are spared it.
    """

    phase: str
    detail: str = ""
    once: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed start's log lines say. ``needed``: bytes per device it wanted, where it said so.

    ``hint``: what would help, such as the command that installs what is missing.
    """

    reason: str
    memory: bool = False
    permanent: bool = False
    needed: int | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is put: its private run directory, its devices (ids) and memory."""

    run_dir: Path
    device_ids: tuple[str, ...] = ()
    memory: int = 0  # bytes per device promised to it; 0: not limited
    device_memory: int = 0  # bytes the smallest of its devices has in all
    port: int = 0  # reserved for engines without Unix sockets
    device_files: tuple[str, ...] = ()  # of declared devices: where stand-ins keep who holds how much
    key: str = field(default="", repr=False)  # of this start alone: for an engine that can ask clients for one
    kv_cache: int = 0  # bytes per device for its key-value cache (Estimate.kv_cache); 0: it works that out itself
    visible: Mapping[str, str] = field(default_factory=dict)  # variables by which it sees these devices alone
    context: int = 0  # tokens, where the model's own longest context does not fit (Estimate.context); 0: its own
    hub: Path | None = None  # where the engine's cache of models is, see ``vllmd.hub``
    cpus: int = 0  # CPUs that it may use at a time, where the machine has more; 0: all
    quota: bool = False  # a quota leaves so few: it may run on more of them, and finds those


class Engine(Protocol):
    """One kind of engine. Stateless; every method is a pure function of its arguments."""

    kind: str

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """The sleep levels (of 1 and 2) that it supports on this platform with these settings."""

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv, environment and listen address. Raises ConfigError if the settings cannot work."""

    def ready(self, model: ModelConfig) -> Call:
        """The probe whose success means that requests are served."""

    def alive(self, model: ModelConfig) -> Call:
        """The probe that tells whether it lives and touches nothing: it may be sent to a sleeper."""

    def busy(self) -> Call | None:
        """The probe that tells of work which no open request shows: JSON with a list that is not empty."""

    def device_count(self, model: ModelConfig) -> int:
        """How many devices of this machine it takes; 0 for one that needs none."""

    def headers(self) -> Sequence[tuple[str, str]]:
        """Fields that every request to it needs: a remote's key."""

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """The ordered calls that put it to sleep; ``freeze`` keeps running requests."""

    def wake(self, level: int) -> Sequence[Call]:
        """The ordered calls that wake it from ``level``."""

    def asleep(self) -> Call | None:
        """The probe that tells (JSON ``is_sleeping``) whether it sleeps; None where it cannot be asked."""

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """The public paths it serves, such as ``/v1/chat/completions``."""

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        """What of its API is passed on under ``/upstream``: rules such as ``GET /metrics`` (``proxy.engine_api``).

        Nothing that changes what it holds, or breaks off or shows what others do.
        """

    def served_name(self, model: ModelConfig) -> str:
        """The name that the engine knows its model by."""

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The model's LoRA adapters by name; under "", if it is there, what requests for the model itself have."""

    def progress(self, line: str) -> Progress | None:
        """What a log line says of a start, if it does."""

    def failure(self, lines: Sequence[str]) -> Failure:
        """What the last log lines of a failed start say."""

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """A footprint that the log of a successful start tells, if it does."""


@runtime_checkable
class Bindable(Protocol):
    """A kind whose calls depend on the model's settings: it makes an engine for each model."""

    kind: str

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for settings that cannot work."""
