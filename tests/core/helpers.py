"""Models and machines that the scripts of these tests speak of."""

from __future__ import annotations

from typing import Any

from vllmd.core.types import Device, Footprint, GiB, IdleRules, ModelSpec, ReplicaRules

NEVER = IdleRules(None, 1, None, None)
GPU = Device(0, "gpu0", 80 * GiB)
PAIR = (GPU, Device(1, "gpu1", 80 * GiB))


def replicas(number: int, gib: int = 50, *, rules: ReplicaRules | None = None, **fields: Any) -> list[ModelSpec]:
    """``m`` with so many replicas: ``m``, ``m@2``, ``m@3``..."""
    fields = {"replica_of": "m", "replicas": rules or ReplicaRules(least=number), **fields}
    return [model("m" if index == 0 else f"m@{index + 1}", gib, **fields) for index in range(number)]


def model(name: str, gib: int = 50, **fields: Any) -> ModelSpec:
    """A model that takes ``gib`` on each of its devices, sleeps at both levels and has no idle rules."""
    footprint = fields.pop("footprint", Footprint(gib * GiB, gib * GiB, GiB, 10 * GiB))
    fields = {"sleep_levels": frozenset({1, 2}), "idle": NEVER, "weights": gib * GiB, **fields}
    return ModelSpec(name, footprint, **fields)
