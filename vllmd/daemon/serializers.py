"""Snapshots of models and devices as the answers that clients and operators get; pure functions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllmd.api.answers import Card, Decision, Device, DeviceFree, Health, Limits, ModelLine, ModelSettings
from vllmd.config.types import ModelConfig
from vllmd.core import types as core
from vllmd.core.types import DeviceView, ModelView, ReplicaView, State
from vllmd.engines.facts import argument

if TYPE_CHECKING:
    from vllmd.daemon.engine_process import EngineProcess
    from vllmd.daemon.last_starts import Start
    from vllmd.daemon.self_description import SelfDescription

NO_SETTINGS = ModelSettings()
UNLOADED = frozenset({State.STOPPED, State.FAILED})
ABILITIES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
    "/classify": "classify",
    "/pooling": "pooling",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation",
    "/v1/audio/speech": "speech",
    "/v1/images/generations": "images",
    "/v1/realtime": "realtime",
    "/tokenize": "tokenize",
}
TOOL_FLAGS = {"vllm": "enable-auto-tool-choice", "sglang": "tool-call-parser"}
# The abilities that a model's files allow, by the kind of model that they are (vllmd.hub).
BY_KIND = {
    "generate": frozenset({"chat", "completion", "responses", "messages", "tokenize"}),
    "embed": frozenset({"embeddings", "score", "pooling", "tokenize"}),
    "rerank": frozenset({"rerank", "score", "classify", "pooling", "tokenize"}),
    "transcribe": frozenset({"transcription", "translation", "realtime"}),
    "pool": frozenset({"embeddings", "rerank", "score", "classify", "pooling", "tokenize"}),
}


def state_of(view: ModelView | ReplicaView) -> str:
    """The state as it is called everywhere; a sleeping engine's with its level, ``sleeping_l1``."""
    return f"sleeping_l{view.level}" if view.state is State.SLEEPING else view.state.value


def card(
    model: ModelConfig,
    routes: Iterable[str],
    view: ModelView | None,
    kind: str,
    description: SelfDescription | None = None,
) -> Card:
    """A model for ``/v1/models``.

    ``kind``: the kind of model that its files in the cache are of, "" if unknown. ``description``: its running engine's
    description of itself, which is surer than configuration and files.
    """
    return Card(
        id=model.name,
        display_name=model.display_name or model.name,
        description=model.description,
        hidden=model.hidden,
        aliases=model.aliases,
        state=state_of(view) if view else State.STOPPED.value,
        disabled=view.disabled if view else "",
        engine=model.engine,
        max_model_len=(description.context if description else None) or model.max_model_len,
        capabilities=tuple(sorted(model.capabilities or _abilities(model, routes, kind, description))),
        limits=Limits(model.concurrency, model.queue_limit, model.queue_timeout),
        memory=view.memory if view else 0,
        discovered=model.where.startswith("found in "),
        parent=None,
        root=model.name,
    )


def _abilities(model: ModelConfig, routes: Iterable[str], kind: str, description: SelfDescription | None) -> set[str]:
    """The abilities of a model whose configuration does not name them: by its engine kind's routes, and what is known
    of the model.
    """
    abilities = {ability for route in routes if (ability := ABILITIES.get(route))}
    served = {ability for route, ability in ABILITIES.items() if description and route in description.routes}
    if served:
        abilities &= served
    elif kind:
        abilities &= BY_KIND[kind]
    if description and description.takes_audio is False:
        abilities -= {"transcription", "translation"}
    if description and description.takes_images and "chat" in abilities:
        abilities.add("vision")
    if "chat" in abilities and calls_tools(model, description):
        abilities.add("tools")
    return abilities


def calls_tools(model: ModelConfig, description: SelfDescription | None) -> bool:
    """Whether the model can choose to call tools. True where the engine does not tell.

    vLLM and SGLang look for calls in an answer only if a flag names the form in which the model writes them.
    """
    if model.engine in TOOL_FLAGS:
        return bool(argument(model, TOOL_FLAGS[model.engine]))
    return description is None or description.tools is not False


def line(
    view: ModelView | ReplicaView,
    config: ModelSettings,
    process: EngineProcess | None = None,
    *,
    since: float | None = None,
    changed_at: float | None = None,
    silent: float | None = None,
    last_start: Start | None = None,
    power: float | None = None,
    unused: float | None = None,
    replica_of: str = "",
    replicas: tuple[ModelLine, ...] = (),
) -> ModelLine:
    """The status line of a model, or of a replica.

    ``power``: watts of its share of its devices; ``unused``: joules of that since its last request. ``since``: seconds
    in its state; ``changed_at``: when that began, in Unix time. ``silent``: seconds for which it has answered none of
    the requests that wait in it. ``process``: its engine; of a model with ``replicas`` the engine that stands for it.
    """
    running = process.running if process else None
    starting = process if process and view.state is State.STARTING else None
    phases: Mapping[str, float] = last_start.phases if last_start else {}
    loader = last_start.loader if last_start else ""
    if starting:  # where its time has gone so far; unknown if an earlier daemon has seen its beginning
        phases = starting.phases.spent(time.monotonic()) if starting.phases.whole else {}
        loader = starting.loader
    socket = (process.listen.uds or f"{process.listen.host}:{process.listen.port}") if process else ""
    return ModelLine(
        # 1. What the core knows.
        name=view.name, state=state_of(view), level=view.level, devices=view.devices, memory=view.memory,
        in_flight=view.in_flight, queued=view.queued, oldest_wait=view.oldest_wait, idle=view.idle,
        since=since, changed_at=changed_at, pinned=view.pinned, disabled=view.disabled,
        leases=view.leases, waiting_for=view.waiting_for, failure=view.failure, never=view.never, health=view.health,
        expected=view.expected, latency=view.latency, rests_in=view.rests_in,
        # 2. The engine: its process, and how it starts or has started.
        pid=running.pid if running else None, unit=running.unit if running else "", socket=socket,
        instance=process.instance if process else "", phase=starting.phase_text if starting else "",
        detail=starting.phase.detail if starting else "", start_phases=phases, loader=loader,
        last_start_seconds=last_start.seconds if last_start else None, version=last_start.version if last_start else "",
        started_at=process.started_at if process else None,
        silent=silent, power=power, unused_energy=unused,
        # 3. The configuration, and the replicas.
        config=config, replica_of=replica_of, replicas=replicas,
        serving=view.serving if replicas and isinstance(view, ModelView) else int(view.state is State.READY),
        degraded=isinstance(view, ModelView) and view.balanced and view.degraded,
    )  # fmt: skip


def about(model: ModelConfig | None) -> ModelSettings:
    """The settings of a model that are shown beside its state."""
    return ModelSettings(model.engine, model.source, model.aliases) if model else NO_SETTINGS


def health(
    views: Iterable[ModelView], devices: Iterable[DeviceView], broken: str, trouble: str, *, ready: bool
) -> Health:
    """The daemon's health, with devices and models. ``broken``: why the configuration cannot be used; ``trouble``: why
    devices do not answer.
    """
    views, status = list(views), "ok"
    if broken:
        status = f"the configuration is invalid: {broken}"
    elif trouble:
        status = f"the devices do not answer, models without devices are served: {trouble}"
    return Health(
        status=status,
        ready=ready and not broken,
        gpu=tuple(
            DeviceFree(**asdict(view), free=max(0, view.memory - view.reserve - view.promised - view.external))
            for view in devices
        ),
        loaded_models=tuple(view.name for view in views if view.state not in UNLOADED),
        model_status={view.name: state_of(view) for view in views},
    )


def device(view: DeviceView) -> Device:
    """A device's memory, and how much of it is promised."""
    return Device(**asdict(view))


def decision(made: core.Decision, at: float) -> Decision:
    """A decision with its date, ``at``, in Unix time. Its subject is the replica, if any."""
    return Decision(at, made.what, made.replica or made.model, made.why, dict(made.numbers))
