"""The configuration as frozen dataclasses. Memory in bytes, time in seconds.

``settings.py`` is the table from which these are filled, checked and documented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from vllmd.config.engine_kinds import one_name
from vllmd.core.types import Balancing, IdleRules, WhenFree
from vllmd.frozen import frozen, sparse

OWN_USER = "own"


@frozen
class ScopeLimits:
    """systemd properties of a model's scope. ``None``: systemd's default."""

    memory_max: int | None = None
    memory_high: int | None = None
    memory_swap_max: int | None = None
    cpu_weight: int | None = None
    cpu_quota: float | None = None  # 1.0 is one core
    tasks_max: int | None = None
    oom_policy: str | None = None  # continue | stop | kill


@frozen
class RequestRules:
    """What becomes of the top-level members of a JSON request: first ``strip``, then ``set``, then ``default``."""

    strip: tuple[str, ...] = ()
    set: Mapping[str, object] = field(default_factory=dict)
    default: Mapping[str, object] = field(default_factory=dict)  # where the request has none of the name
    system: str = ""  # the system prompt, where the request has none

    def over(self, below: RequestRules) -> RequestRules:
        """Both: ``below`` first, and these where the two say different things."""
        return RequestRules(
            tuple(dict.fromkeys((*below.strip, *self.strip))),
            {**below.set, **self.set},
            {**below.default, **self.default},
            self.system or below.system,
        )


@frozen
class AdapterConfig:
    """A LoRA adapter of a model. ``path``: its folder or file, or a repository id."""

    path: str = ""
    display_name: str = ""
    description: str = ""
    hidden: bool = False


@frozen
class VariantConfig:
    """Another name of a model, with rules of its own for requests, over those of the model."""

    request: RequestRules = field(default_factory=RequestRules)
    display_name: str = ""
    description: str = ""
    hidden: bool = False


@frozen
class PoolConfig:
    """A name for whichever of several models is loaded, the first ones before the others."""

    models: tuple[str, ...] = ()
    display_name: str = ""
    description: str = ""
    hidden: bool = False


@frozen
class ReplicaConfig(Balancing):
    """Several engines of one model.

    ``min``: how many are brought up while it is used, None: all. ``max``: how many alike there may be here.
    ``given``: what each entry of the list says, as plain data; ``of``: each one's settings, complete. Their names
    are the model's and ``@`` and a number, or the ``name`` of the entry.
    ``probe``: what a replica is asked before it serves, at ``probe_route``; None: nothing.
    """

    min: int | None = None
    max: int | None = None
    given: tuple[Mapping[str, object], ...] = field(default=(), repr=False)
    of: tuple[ModelConfig, ...] = ()
    probe: str | None = "Say hi."
    probe_route: str = "/v1/chat/completions"


# Most of ten thousand models have nothing here of their own: all of them share one object.
_EMPTY: Mapping[str, Any] = {}
_NO_RULES, _USUAL_IDLE = RequestRules(), IdleRules()


@sparse
class ModelConfig:
    """One model as configured (defaults already applied), or one of its replicas (``replica_of``).

    Fields that may hold a secret are left out of the ``repr``: a traceback or a line of debugging may end up anywhere.
    """

    name: str
    replica_of: str = ""
    host: str = ""  # the only machine that the model is meant for
    engine: str = "vllm"
    engine_version: str = ""  # of the engine's environments; "" is the one in use
    user: str = ""  # that its engine runs as: "" is the user of all engines, OWN_USER one of this model alone
    model: str = ""  # path or repository id; "" means the name
    # The program instead of the engine's own, e.g. ("/opt/vllm/bin/vllm",).
    command: tuple[str, ...] = field(default=(), repr=False)
    aliases: tuple[str, ...] = ()
    display_name: str = ""
    description: str = ""
    hidden: bool = False
    capabilities: tuple[str, ...] = ()  # () are those that its engine and files tell
    devices: tuple[int, ...] = ()  # () is auto
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    local_devices: int | None = None  # on this machine, of tensor times pipeline; None: all of them
    gpu_memory: float | int | None = None  # a fraction (float), bytes (int), or None for auto
    memory_asleep: int | None = None
    host_memory: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    param_count: float | None = None  # in billions, for estimates
    precision: str | None = None
    extra_args: tuple[str, ...] = field(default=(), repr=False)  # already argv
    env: Mapping[str, str] = field(default_factory=lambda: _EMPTY, repr=False)
    hf_token: str | None = field(default=None, repr=False)
    sleep_mode: bool | None = None  # None: where the platform can
    idle: IdleRules = field(default_factory=lambda: _USUAL_IDLE)
    pin: bool = False
    preload: bool = False
    warm_up: bool = False
    priority: float = 1.0
    concurrency: int | None = None
    on_busy: str = "wait"
    queue_limit: int = 512
    queue_timeout: float | None = 600.0
    drain_limit: float | None = None
    preempt: bool = False
    when_free: WhenFree | None = None
    start_timeout: float = 600.0
    stop_timeout: float = 30.0
    max_restarts: int = 3
    restart_backoff: float = 5.0
    log_file: bool = False
    limits: ScopeLimits = ScopeLimits()
    numa: bool = True
    request: RequestRules = field(default_factory=lambda: _NO_RULES)
    variants: Mapping[str, VariantConfig] = field(default_factory=lambda: _EMPTY)
    adapters: Mapping[str, AdapterConfig] = field(default_factory=lambda: _EMPTY)
    runtime_adapters: bool = False
    options: Mapping[str, object] = field(default_factory=lambda: _EMPTY, repr=False)  # the engine kind's own
    replicas: ReplicaConfig | None = None
    where: str = ""  # file:line, for errors

    @property
    def source(self) -> str:
        """The path or repository id that the engine loads."""
        return self.model or self.replica_of or self.name

    @property
    def all_devices(self) -> int:
        """How many devices the model is split over, on all machines."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def devices_here(self) -> int:
        """How many of these devices are this machine's."""
        return self.all_devices if self.local_devices is None else self.local_devices


@frozen
class DeviceConfig:
    """A declared device, for machines without NVML and for rehearsal.

    ``file``: a stand-in's device file (``vllmd.simengine.device``), read for who holds how much.
    """

    memory: int
    name: str = "declared"
    file: Path | None = None


@frozen
class TlsConfig:
    """The server's certificate and its key: files in PEM, the certificate with those of its issuers behind it."""

    cert: Path | None = None  # both are needed; ``checks`` says so
    key: Path | None = None


@frozen
class ServerConfig:
    """The HTTP side. Sizes in bytes, times in seconds."""

    listen: tuple[str, ...] = ("127.0.0.1:33258", "[::1]:33258")  # used only without socket activation
    user: str = ""  # that vllmd becomes when root starts it by hand
    event_loop: str = "auto"  # or asyncio, uvloop
    idle_exit: float | None = 60.0  # the daemon exits after so long with nothing loaded and nobody connected
    max_body: int = 64 << 20
    max_head: int = 64 << 10
    max_buffered: int = 1 << 30  # of request bodies, over all requests
    pipeline: int = 64 << 10  # read ahead of a running request
    head_timeout: float = 30.0
    body_timeout: float = 30.0  # over each, a body must keep up min_body_rate
    min_body_rate: int = 1024  # bytes per second
    send_timeout: float = 300.0  # without a client taking anything
    request_timeout: float | None = None  # for a model request, from its last byte to its answer's
    connect_timeout: float = 5.0  # to an engine
    upstream_idle: float = 4.0  # of a kept connection to an engine; vLLM drops its own at 5 s
    keepalive_timeout: float = 75.0
    max_connections: int = 10_000
    max_connections_per_address: int | None = None
    drain_timeout: float = 60.0  # at shutdown, for requests in flight
    queue_limit: int = 4096
    loading_comment_interval: float = 10.0
    loading_as_reasoning: bool = False
    keep_alive_limit: float | None = 86400.0  # the longest keep_alive of a request; 0.0: none counts
    tls: TlsConfig | None = None  # at addresses that others can reach; loopback stays plain
    ui: bool | None = None  # the page at /ui; None: at loopback addresses only
    hosts: tuple[str, ...] = ()  # names beside this machine's own under which it answers without keys; "*": any
    cors_origins: tuple[str, ...] = ()  # pages of which origins may read our answers; "*": of any


@frozen
class EngineDefaults:
    """Settings of all engines. Their slice and their user are the launcher's business."""

    run_dir: Path | None = None  # None: by the mode (system, user, by hand)
    home: Path | None = None
    port_start: int = 33300
    port_end: int = 34300
    read_ahead: bool = True  # read the weight files of the next model in line into the page cache
    fast_loaders: bool = True  # try other loaders than the engine's own, and use the fastest
    standby: int | None = None  # number of processes kept ready; None: by the machine's memory


@frozen
class PullConfig:
    """Where models are fetched from, and whether a request may have one fetched. Sizes in bytes.

    ``owners``: of the repositories that a request may have fetched; without any, none may be. ``largest``: such a
    download, None: without limit. ``keep_free``: of the disk, after any download. ``endpoint``, ``index``: addresses of
    the hub and the Python index; None are huggingface_hub's and pip's own.
    """

    on_request: bool = False
    owners: tuple[str, ...] = ()
    largest: int | None = 20 << 30
    keep_free: int = 2 << 30
    endpoint: str | None = None
    index: str | None = None
    token_file: str | None = None


@frozen
class RecordsConfig:
    """The records of requests and of use. Sizes in bytes."""

    requests: int = 2000  # the last ones, in memory
    bodies: int = 4 << 20  # for all bodies together while some are recorded
    access_log: str | None = None  # "journal" or the path of a file; None: none
    usage: bool = True
    usage_days: int = 400
    trace_days: int = 14
    spans: str | None = None  # an OpenTelemetry collector's address; None: none are sent
    spans_share: float = 1.0


@frozen
class KeyConfig:
    """One API key. Its text is not kept: ``digest`` is the SHA-256 of it in hex.

    ``models`` it may use (empty: all); limits of ``None`` are none.
    """

    name: str
    digest: str = field(repr=False)
    scopes: tuple[str, ...] = ("models",)  # of models, read, admin
    models: tuple[str, ...] = ()
    concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    keep_alive_limit: float | None = None  # seconds; 0.0: it cannot say
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    device_seconds_per_day: int | None = None
    device_seconds_per_month: int | None = None
    priority: int = 0  # of its requests in a model's queue: the higher ones first
    share: int = 1  # of the turns among keys of the same priority


@frozen
class AuthConfig:
    """The clients that may send requests. Without keys, every client that reaches the address may."""

    keys: tuple[KeyConfig, ...] = ()
    public: tuple[str, ...] = ("health", "metrics")  # open without a key, of health, metrics, names
    allow_anonymous: bool = False  # listen beyond loopback without keys all the same


@frozen
class Config:
    """The whole configuration. ``warnings``: what was accepted, but should be looked at, each with its file:line.

    ``unfit``: the models, by name, of which a problem or a warning says that they can never be loaded.
    """

    server: ServerConfig = ServerConfig()
    auth: AuthConfig = AuthConfig()
    devices: tuple[DeviceConfig, ...] | None = None  # None: ask NVML
    reserve: int = 512 << 20  # bytes per device never promised
    host_memory: int | None = None  # budget for level-1 sleepers; None: half of the host's
    idle: IdleRules = field(default_factory=IdleRules)  # of models without their own
    records: RecordsConfig = RecordsConfig()
    policy: str = "adaptive"
    log_level: str = "info"
    engines: EngineDefaults = EngineDefaults()
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    pools: Mapping[str, PoolConfig] = field(default_factory=dict)
    discover: bool = False  # offer the models in the Hugging Face cache, too
    pull: PullConfig = PullConfig()
    template: ModelConfig = field(default=ModelConfig(""), compare=False)  # a model of nothing but the defaults
    templates: Mapping[str, ModelConfig] = field(default_factory=dict, compare=False)  # the same by kind of engine
    files: tuple[Path, ...] = ()
    added: Path | None = None  # the folder of the models that vllmctl adds
    warnings: tuple[str, ...] = ()
    unfit: frozenset[str] = frozenset()
    origins: Mapping[str, object] = field(default_factory=dict, compare=False)  # of settings by path: file:line

    def template_of(self, kind: str) -> ModelConfig:
        """A model of this kind of engine that has nothing but the defaults."""
        if one_name(kind) in self.templates:
            return self.templates[one_name(kind)]
        if one_name(kind) == one_name(self.template.engine):
            return self.template
        return replace(self.template, engine=kind, command=(), extra_args=(), options={})
