"""How models and devices are shown to clients and operators: answers made of snapshots, nothing else."""

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
# What of it a model's files allow, by the kind that they are of (vllmd.hub); realtime takes the model's own word.
BY_KIND = {
    "generate": frozenset({"chat", "completion", "responses", "messages", "tokenize"}),
    "embed": frozenset({"embeddings", "score", "pooling", "tokenize"}),
    "rerank": frozenset({"rerank", "score", "classify", "pooling", "tokenize"}),
    "transcribe": frozenset({"transcription", "translation", "realtime"}),
    "pool": frozenset({"embeddings", "rerank", "score", "classify", "pooling", "tokenize"}),
}


def state_of(view: ModelView | ReplicaView) -> str:
    """``sleeping_l1`` says more than ``sleeping``."""
    return f"sleeping_l{view.level}" if view.state is State.SLEEPING else view.state.value


def card(
    model: ModelConfig, routes: Iterable[str], view: ModelView | None, kind: str, said: SelfDescription | None = None
) -> Card:
    """A model for ``/v1/models``.

    ``kind`` as its files in the cache tell, "" if they do not. ``said``: what its running engine says of itself, which
    is more than what is configured or found in files.
    """
    able = {ability for route in routes if (ability := ABILITIES.get(route))}
    served = {ability for route, ability in ABILITIES.items() if said and route in said.routes}
    if model.capabilities:
        able = set(model.capabilities)
    elif served:
        able &= served
    elif kind:
        able &= BY_KIND[kind]
    if not model.capabilities and said and said.takes_audio is False:
        able -= {"transcription", "translation"}
    if not model.capabilities and said and said.takes_images and "chat" in able:
        able.add("vision")
    if not model.capabilities and "chat" in able and calls_tools(model, said):
        able.add("tools")
    return Card(
        id=model.name,
        display_name=model.display_name or model.name,
        description=model.description,
        hidden=model.hidden,
        aliases=model.aliases,
        state=state_of(view) if view else State.STOPPED.value,
        disabled=view.disabled if view else "",
        engine=model.engine,
        max_model_len=(said.context if said else None) or model.max_model_len,
        capabilities=tuple(sorted(able)),
        limits=Limits(model.concurrency, model.queue_limit, model.queue_timeout),
        memory=view.memory if view else 0,
        discovered=model.where.startswith("found in "),
        parent=None,
        root=model.name,
    )


def calls_tools(model: ModelConfig, said: SelfDescription | None) -> bool:
    """Whether it can call tools by its own choice, as far as that is known; so it is of an engine that cannot be asked.

    vLLM and SGLang look for calls in an answer only if they are told how the model writes them.
    """
    if model.engine in TOOL_FLAGS:
        return bool(argument(model, TOOL_FLAGS[model.engine]))
    return said is None or said.tools is not False


def line(
    view: ModelView | ReplicaView,
    config: ModelSettings,
    process: EngineProcess | None = None,
    *,
    since: float | None = None,
    silent: float | None = None,
    last_start: Start | None = None,
    power: float | None = None,
    unused: float | None = None,
    replica_of: str = "",
    replicas: tuple[ModelLine, ...] = (),
) -> ModelLine:
    """A model, or a replica of one, for ``vllmctl``. ``power``: watts of its share of its devices;
    ``unused``: the joules of that since its last request.

    ``since``: seconds in its state, where the core does not know. ``silent``: seconds for which it has answered none of
    the requests that wait in it. ``process``: its engine, of a model with
    ``replicas`` that of the one which is as the model is.
    """
    running = process.running if process else None
    starting = process.phase if process and view.state is State.STARTING else None
    return ModelLine(
        name=view.name,
        state=state_of(view),
        level=view.level,
        devices=view.devices,
        memory=view.memory,
        in_flight=view.in_flight,
        queued=view.queued,
        oldest_wait=view.oldest_wait,
        idle=view.idle,
        since=view.since if view.since is not None else since,
        pinned=view.pinned,
        disabled=view.disabled,
        leases=view.leases,
        waiting_for=view.waiting_for,
        failure=view.failure,
        never=view.never,
        silent=silent,
        standing=view.standing,
        latency=view.latency,
        rests_in=view.rests_in,
        pid=running.pid if running else None,
        unit=running.unit if running else "",
        socket=(process.listen.uds or f"{process.listen.host}:{process.listen.port}") if process else "",
        instance=process.instance if process else "",
        phase=process.phase_text if process and starting else "",
        detail=starting.detail if starting else "",
        last_start_seconds=last_start.seconds if last_start else None,
        start_phases=_phases(process if starting else None, last_start),
        loader=_loader(process if starting else None, last_start),
        version=last_start.version if last_start else "",
        power=power,
        unused_energy=unused,
        started_at=time.time() - (time.monotonic() - process.started) if process else None,
        config=config,
        replica_of=replica_of,
        replicas=replicas,
        serving=view.serving if replicas and isinstance(view, ModelView) else int(view.state is State.READY),
        degraded=isinstance(view, ModelView) and view.balanced and view.degraded,
    )


def _phases(starting: EngineProcess | None, last_start: Start | None) -> Mapping[str, float]:
    """Where the time of the start under way goes, else where that of the last one went."""
    if starting:
        return starting.phases.spent(time.monotonic()) if starting.phases.whole else {}
    return last_start.phases if last_start else {}


def _loader(starting: EngineProcess | None, last_start: Start | None) -> str:
    """What reads its weights in the start under way, else what did so in the last one."""
    if starting:
        return starting.loader
    return last_start.loader if last_start else ""


def about(model: ModelConfig | None) -> ModelSettings:
    """What of a model's settings is shown beside its state."""
    return ModelSettings(model.engine, model.source, model.aliases) if model else NO_SETTINGS


def health(
    views: Iterable[ModelView], devices: Iterable[DeviceView], broken: str, trouble: str, *, ready: bool
) -> Health:
    """Whether we are well, with devices and models. ``trouble``: why devices do not answer."""
    views = list(views)
    return Health(
        status=_status(broken, trouble),
        ready=ready and not broken,
        gpu=tuple(_device(device) for device in devices),
        loaded_models=tuple(view.name for view in views if view.state not in UNLOADED),
        model_status={view.name: state_of(view) for view in views},
    )


def _status(broken: str, trouble: str) -> str:
    if broken:
        return f"the configuration is invalid: {broken}"
    return f"the devices do not answer, models without devices are served: {trouble}" if trouble else "ok"


def device(view: DeviceView) -> Device:
    """What a device has, and what of it is promised."""
    return Device(**asdict(view))


def _device(view: DeviceView) -> DeviceFree:
    free = max(0, view.memory - view.reserve - view.promised - view.external)
    return DeviceFree(**asdict(view), free=free)


def decision(made: core.Decision, now: float) -> Decision:
    """A decision with Unix time instead of the core's clock, which shows ``now``; about a replica where it is."""
    at = time.time() - now + made.at
    return Decision(at, made.what, made.replica or made.model, made.why, dict(made.numbers))
