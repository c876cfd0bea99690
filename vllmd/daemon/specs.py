"""Configured models as the core sees them: sizes, rules and what their engines can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core.types import Balancing, Device, ModelSpec, ReplicaRules, ReplicaSpec
from vllmd.daemon.engine_process import fingerprint
from vllmd.engines.base import Engine
from vllmd.engines.estimate import Estimate
from vllmd.engines.start_times import start_time


@cache
def _one_of(levels: frozenset[int]) -> frozenset[int]:
    """The first set that was equal: there are a handful, of 216 bytes, for any number of engines."""
    return levels


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


def replica_spec(model: ModelConfig, engine: Engine, estimate: Estimate, cpu: Device | None = None) -> ReplicaSpec:
    """The core's view of an engine. Its sizes are as configured or estimated; the core learns the real ones.

    ``cpu``: the device, where there is no other.
    """
    spec = _spec(model, engine, estimate)
    return on_cpu(spec, cpu) if cpu else spec


def on_cpu(spec: ReplicaSpec, cpu: Device) -> ReplicaSpec:
    """The spec of an engine on the CPU, where its memory is the host's, however many parts it has.

    A model larger than all of that gets all: a mapped file may be larger than memory, and is read again and again.
    """
    size = min(max(spec.footprint.awake, spec.host_running), cpu.memory - cpu.reserve)
    if not spec.device_count and not size:
        return spec  # a remote engine
    footprint = replace(spec.footprint, starting=size, awake=size, asleep=min(spec.footprint.asleep, size))
    return replace(spec, footprint=footprint, device_count=1, devices=(), host_running=0)


def _spec(model: ModelConfig, engine: Engine, estimate: Estimate) -> ReplicaSpec:
    return ReplicaSpec(
        id=model.name,
        footprint=estimate.footprint,
        weights=estimate.weights,
        settings=fingerprint(model),
        device_count=engine.device_count(model),
        devices=model.devices,
        sleep_levels=_one_of(engine.sleep_levels(model)),
        idle=model.idle,
        pinned=model.pin,
        preload=model.preload,
        concurrency=model.concurrency,
        drain_limit=model.drain_limit,
        preempt=model.preempt,
        host_running=estimate.host_running,
        when_free=model.when_free,
        max_restarts=model.max_restarts,
        restart_backoff=model.restart_backoff,
        engine=engine.kind,
        start_time=start_time(model, engine.kind, estimate.weights),
    )


def _rules(config: ReplicaConfig) -> ReplicaRules:
    balancing = {each.name: getattr(config, each.name) for each in fields(Balancing)}
    return ReplicaRules(**balancing, least=config.min or len(config.of), probe=config.probe is not None)
