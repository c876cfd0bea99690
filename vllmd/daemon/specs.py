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


def replica_spec(model: ModelConfig, engine: Engine, told: Estimate, cpu: Device | None = None) -> ReplicaSpec:
    """The core's view of an engine. Its sizes are as configured or estimated; the core learns the real ones.

    ``cpu``: the device, where there is no other.
    """
    spec = _spec(model, engine, told)
    return on_cpu(spec, cpu) if cpu else spec


def on_cpu(spec: ReplicaSpec, cpu: Device) -> ReplicaSpec:
    """The same on the CPU, where an engine's memory is the host's, however many parts it has.

    One that is larger than all of it has it to itself: a file that is mapped may be, and is read again and again.
    """
    told = spec.footprint
    size = min(max(told.awake, spec.host_running), cpu.memory - cpu.reserve)
    if not spec.device_count and not size:
        return spec  # it runs elsewhere
    footprint = replace(told, starting=size, awake=size, asleep=min(told.asleep, size))
    return replace(spec, footprint=footprint, device_count=1, devices=(), host_running=0)


def _spec(model: ModelConfig, engine: Engine, told: Estimate) -> ReplicaSpec:
    return ReplicaSpec(
        id=model.name,
        footprint=told.footprint,
        weights=told.weights,
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
