"""Models and machines that the scripts of these tests speak of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllmd.core.policy import Resident, Tenants
from vllmd.core.types import Device, Footprint, IdleRules, ModelSpec, ReplicaRules, single
from vllmd.sizes import GiB

NEVER = IdleRules(None, 1, None, None)
GPU = Device(0, "gpu0", 80 * GiB)
PAIR = (GPU, Device(1, "gpu1", 80 * GiB))


def replicas(number: int, gib: int = 50, *, rules: ReplicaRules | None = None, **fields: Any) -> list[ModelSpec]:
    """``m`` with so many replicas: ``m@1``, ``m@2``, ``m@3``..."""
    engines = [model(f"m@{index + 1}", gib, **fields).replicas[0] for index in range(number)]
    return [ModelSpec("m", tuple(engines), rules or ReplicaRules(least=number))]


def by_device(residents: Iterable[Resident]) -> dict[int, Tenants]:
    """The residents as a policy's view has them."""
    here: dict[int, list[Resident]] = {}
    for r in residents:
        for device in r.devices:
            here.setdefault(device, []).append(r)
    return {index: Tenants.of(there) for index, there in here.items()}


def model(name: str, gib: int = 50, **fields: Any) -> ModelSpec:
    """A model with one engine that takes ``gib`` on each of its devices, sleeps at both levels, has no idle rules."""
    footprint = fields.pop("footprint", Footprint(gib * GiB, gib * GiB, GiB, 10 * GiB))
    fields = {"sleep_levels": frozenset({1, 2}), "idle": NEVER, "weights": gib * GiB, **fields}
    return single(name, footprint, **fields)
