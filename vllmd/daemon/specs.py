"""A configured model as the core sees it: sizes, rules and what its engine can do."""

from __future__ import annotations

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core.types import ModelSpec, ReplicaRules
from vllmd.daemon.engine_process import fingerprint
from vllmd.engines.base import Engine
from vllmd.engines.estimate import Estimate


def spec_of(model: ModelConfig, engine: Engine, told: Estimate) -> ModelSpec:
    """The core's view of ``model``. Its sizes are as configured or estimated; the core learns the real ones."""
    return ModelSpec(
        name=model.name,
        footprint=told.footprint,
        weights=told.weights,
        settings=fingerprint(model),
        device_count=engine.device_count(model),
        devices=model.devices,
        sleep_levels=engine.sleep_levels(model),
        idle=model.idle,
        pinned=model.pin,
        preload=model.preload,
        priority=model.priority,
        concurrency=model.concurrency,
        on_busy=model.on_busy,
        queue_limit=model.queue_limit,
        queue_timeout=model.queue_timeout,
        drain_limit=model.drain_limit,
        preempt=model.preempt,
        when_free=model.when_free,
        max_restarts=model.max_restarts,
        restart_backoff=model.restart_backoff,
        replica_of=model.replica_of,
        replicas=_rules(model.replicas) if model.replicas else ReplicaRules(),
    )


def _rules(told: ReplicaConfig) -> ReplicaRules:
    return ReplicaRules(
        least=told.min or 1,
        busy=told.busy,
        busy_for=told.busy_for,
        calm_for=told.calm_for,
        probe=told.probe is not None,
        probe_limit=told.probe_limit,
        growth=told.growth,
        retries=told.retries,
    )
