"""What an engine kind is: a spec becomes argv, environment, probes, sleep calls.

An engine kind does nothing itself: it says what to run and which HTTP calls
mean what, the daemon carries it out. Third parties register theirs in the
entry-point group ``vllmd.engines``; of the contract they may leave out
``adapters``, ``alive``, ``busy``, ``device_count``, ``headers`` and ``own_api``, for which ``Plain`` has the defaults.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol, runtime_checkable

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.frozen import frozen


@frozen
class Listen:
    """An engine's address: a Unix socket path, or a host and port (loopback, unless it is remote).

    ``tls``: "" for plain HTTP, else ``system`` or the path of a file with the certificates to trust.
    ``prefix``: what stands before every path, such as ``/openai``. ``key``: the bearer token that the engine asks for
    (``Place.key``), "" if none. ``owner``: the user id that must own the listening socket; the daemon fills it in.
    """

    uds: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    tls: str = ""
    prefix: str = ""
    key: str = field(default="", repr=False)
    owner: int | None = None


@frozen
class Call:
    """One HTTP call of a protocol; anything but ``expect`` (a status) is a failure. ``timeout`` in seconds."""

    method: str
    path: str
    json: object = None
    timeout: float = 60.0
    expect: int = 200
    optional: bool = False  # a failure is logged and passed over
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # a remote's key, for one


@frozen
class Adapter:
    """One LoRA adapter of an engine. ``path``: as configured. ``served_name``: the engine's name for it.

    ``members``: what every JSON request for it gets, over the client's. ``load``: the call that loads it; None: it is
    there from the engine's start on.
    """

    name: str
    path: str
    served_name: str
    members: Mapping[str, object] = field(default_factory=dict)
    load: Call | None = None


@frozen
class Launch:
    """What to start. ``env`` is added to the launcher's clean base environment.

    An empty ``argv`` starts nothing: the server runs elsewhere, and is reached at ``listen``.
    ``stop``: a command that ends the engine (``podman stop``), instead of a signal.
    ``stop_signal``: the signal on which the engine finishes its requests and exits.
    ``watch``: seconds between liveness checks of a server that runs elsewhere.
    ``self_managed``: it loads and frees memory as it pleases, so what it holds at one moment is not its footprint.
    """

    argv: tuple[str, ...]
    listen: Listen
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str = ""
    stop: tuple[str, ...] = ()
    stop_signal: int = signal.SIGTERM
    self_managed: bool = False
    watch: float = 2.0


@frozen
class Progress:
    """A phase of a start, read from a log line: ``weights``, ``compile``, ``graphs``, ``download``, ...

    ``once``: its result is kept, so that later starts do not have the phase.
    """

    phase: str
    detail: str = ""
    once: bool = False


@frozen
class Failure:
    """What a failed start's log lines say. ``needed``: the bytes per device that it asked for, where it said so.

    ``hint``: what would help, such as the command that installs what is missing. ``port``: another process had taken
    the engine's TCP port.
    """

    reason: str
    memory: bool = False
    permanent: bool = False
    needed: int | None = None
    hint: str = ""
    port: bool = False


@frozen
class Place:
    """An engine's place: its private run directory, its devices (ids) and its memory."""

    run_dir: Path
    device_ids: tuple[str, ...] = ()
    memory: int = 0  # bytes per device promised to it; 0: not limited
    device_memory: int = 0  # bytes the smallest of its devices has in all
    port: int = 0  # reserved for engines without Unix sockets
    device_files: tuple[str, ...] = ()  # of declared devices: where stand-ins write how much they hold
    key: str = field(default="", repr=False)  # of this start alone: for an engine that can ask clients for one
    kv_cache: int = 0  # bytes per device for its key-value cache (Estimate.kv_cache); 0: its own choice
    visible: Mapping[str, str] = field(default_factory=dict)  # the variables by which it sees these devices alone
    context: int = 0  # tokens, where the model's own longest context does not fit (Estimate.context); 0: its own
    hub: Path | None = None  # where the engine's cache of models is, see ``vllmd.hub``
    cpus: int = 0  # CPUs that it may use at a time, where the machine has more; 0: all
    quota: bool = False  # ``cpus`` comes from a quota, so the engine would find more of them


class Engine(Protocol):
    """One kind of engine. Stateless; every method is a pure function of its arguments."""

    kind: str

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """The sleep levels (of 1 and 2) that the engine supports on this platform with these settings."""

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv, environment and listen address. Raises ConfigError if the settings cannot work."""

    def ready(self, model: ModelConfig) -> Call:
        """The probe that succeeds when requests are served."""

    def alive(self, model: ModelConfig) -> Call:
        """The probe that succeeds while the engine lives. It must not wake a sleeper."""

    def busy(self) -> Call | None:
        """The probe that tells of work which no open request shows: JSON with a list that is not empty."""

    def device_count(self, model: ModelConfig) -> int:
        """The number of this machine's devices that an engine takes; 0 for one that needs none."""

    def headers(self) -> Sequence[tuple[str, str]]:
        """Fields that every request to the engine needs: a remote's key."""

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """The ordered calls that put the engine to sleep; ``freeze`` keeps running requests."""

    def wake(self, level: int) -> Sequence[Call]:
        """The ordered calls that wake the engine from ``level``."""

    def asleep(self) -> Call | None:
        """The probe whose JSON ``is_sleeping`` tells whether the engine sleeps; None where it cannot be asked."""

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """The public paths that the engine serves, such as ``/v1/chat/completions``."""

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        """What is passed on to it under ``/upstream``: rules such as ``GET /metrics`` (``proxy.engine_api``).

        No call that changes what the engine holds, or that breaks off or shows other clients' requests.
        """

    def served_name(self, model: ModelConfig) -> str:
        """The engine's name for its model."""

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The model's LoRA adapters by name; under "", if there, what requests for the model itself get."""

    def progress(self, line: str) -> Progress | None:
        """The phase of a start that a log line shows, if any."""

    def failure(self, lines: Sequence[str]) -> Failure:
        """What the last log lines of a failed start say."""

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """The footprint that the log of a successful start tells, if it does."""


@runtime_checkable
class Bindable(Protocol):
    """A kind whose calls depend on the model's settings, so that it makes an engine for each model."""

    kind: str

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for settings that cannot work."""
