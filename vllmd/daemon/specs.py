"""Configured models as the core sees them: sizes, rules and what their engines can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core.types import Balancing, ModelSpec, ReplicaRules, ReplicaSpec
from vllmd.daemon.engine_process import fingerprint
from vllmd.engines.base import Engine
from vllmd.engines.estimate import Estimate
from vllmd.engines.start_times import start_time


def model_spec(model: ModelConfig, replicas: Sequence[ReplicaSpec]) -> ModelSpec:
    """The core's view of ``model``, which has these engines."""
    return ModelSpec(
        name=model.name,
        replicas=tuple(replicas),
        balancing=_rules(model.replicas) if model.replicas else None,
        priority=model.priority,
        on_busy=model.on_busy,
        queue_limit=model.queue_limit,
        queue_timeout=model.queue_timeout,
    )


def replica_spec(model: ModelConfig, engine: Engine, told: Estimate) -> ReplicaSpec:
    """The core's view of an engine. Its sizes are as configured or estimated; the core learns the real ones."""
    return ReplicaSpec(
        id=model.name,
        footprint=told.footprint,
        weights=told.weights,
        settings=fingerprint(model),
        device_count=engine.device_count(model),
        devices=model.devices,
        sleep_levels=engine.sleep_levels(model),
        idle=model.idle,
        pinned=model.pin,
        preload=model.preload,
        concurrency=model.concurrency,
        drain_limit=model.drain_limit,
        preempt=model.preempt,
        host_running=told.host_running,
        when_free=model.when_free,
        max_restarts=model.max_restarts,
        restart_backoff=model.restart_backoff,
        engine=engine.kind,
        start_time=start_time(model, engine.kind, told.weights),
    )


def _rules(told: ReplicaConfig) -> ReplicaRules:
    balancing = {each.name: getattr(told, each.name) for each in fields(Balancing)}
    return ReplicaRules(**balancing, least=told.min or len(told.of), probe=told.probe is not None)
