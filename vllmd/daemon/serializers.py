"""How models and devices are shown to clients and operators: plain data made of snapshots, nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from vllmd.config.types import ModelConfig
from vllmd.core.types import DeviceView, ModelView, ReplicaView, State
from vllmd.engines.facts import argument

if TYPE_CHECKING:
    from vllmd.daemon.engine_process import EngineProcess
    from vllmd.daemon.self_description import SelfDescription

NOT_SHOWN = frozenset({"replicas", "balanced", "bound"})  # of a view
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
}


def state_of(view: ModelView | ReplicaView) -> str:
    """``sleeping_l1`` says more than ``sleeping``."""
    return f"sleeping_l{view.level}" if view.state is State.SLEEPING else view.state.value


def card(
    model: ModelConfig, routes: Iterable[str], view: ModelView | None, kind: str, said: SelfDescription | None = None
) -> dict[str, Any]:
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
    if not model.capabilities and "chat" in able and calls_tools(model, said):
        able.add("tools")
    return {
        "id": model.name,
        "display_name": model.display_name or model.name,
        "description": model.description,
        "hidden": model.hidden,
        "aliases": list(model.aliases),
        "state": state_of(view) if view else State.STOPPED.value,
        "engine": model.engine,
        "max_model_len": (said.context if said else None) or model.max_model_len,
        "capabilities": sorted(able),
        "limits": {
            "concurrency": model.concurrency,
            "queue": model.queue_limit,
            "queue_seconds": model.queue_timeout,
        },
        "memory": view.memory if view else 0,
        "discovered": model.where.startswith("found in "),
    }


def calls_tools(model: ModelConfig, said: SelfDescription | None) -> bool:
    """Whether it can call tools by its own choice, as far as that is known; so it is of an engine that cannot be asked.

    vLLM and SGLang look for calls in an answer only if they are told how the model writes them.
    """
    if model.engine in TOOL_FLAGS:
        return bool(argument(model, TOOL_FLAGS[model.engine]))
    return said is None or said.tools is not False


def line(
    view: ModelView | ReplicaView,
    model: ModelConfig | None,
    process: EngineProcess | None,
    last_start: float | None,
    power: float | None,
) -> dict[str, Any]:
    """A model, or a replica of one, for ``vllmctl``. ``power``: watts of its share of its devices."""
    shown = {each.name: getattr(view, each.name) for each in fields(view) if each.name not in NOT_SHOWN}
    shown.update(state=state_of(view), pid=None, unit="", socket="", replica_of="", replicas=[], degraded=False)
    shown.update(serving=int(view.state is State.READY))
    shown.update(instance="", detail="", phase="", last_start_seconds=last_start, started_at=None, power=power)
    shown["config"] = about(model) if model else {}
    if process:
        shown["instance"] = process.instance
        shown["started_at"] = time.time() - (time.monotonic() - process.started)
        shown["socket"] = process.listen.uds or f"{process.listen.host}:{process.listen.port}"
        if view.state is State.STARTING:
            shown.update(phase=process.phase.phase, detail=process.phase.detail)
    if process and process.running:
        shown.update(pid=process.running.pid, unit=process.running.unit)
    return shown


def about(model: ModelConfig) -> dict[str, Any]:
    """What of a model's settings is shown beside its state."""
    return {"engine": model.engine, "model": model.source, "aliases": model.aliases}


def health(
    views: Iterable[ModelView], devices: Iterable[DeviceView], broken: str, trouble: str, *, ready: bool
) -> dict[str, Any]:
    """Whether we are well, with devices and models as P's document has them. ``trouble``: why devices do not answer."""
    views = list(views)
    return {
        "status": _status(broken, trouble),
        "ready": ready and not broken,
        "gpu": [_device(device) for device in devices],
        "loaded_models": [view.name for view in views if view.state not in UNLOADED],
        "model_status": {view.name: state_of(view) for view in views},
    }


def _status(broken: str, trouble: str) -> str:
    if broken:
        return f"the configuration is invalid: {broken}"
    return f"the devices do not answer, models without devices are served: {trouble}" if trouble else "ok"


def _device(view: DeviceView) -> dict[str, Any]:
    return {**asdict(view), "free": max(0, view.memory - view.reserve - view.promised - view.external)}
