"""Models and machines that the scripts of these tests speak of."""

from __future__ import annotations

from typing import Any

from vllmd.core.types import Device, Footprint, GiB, IdleRules, ModelSpec

NEVER = IdleRules(None, 1, None, None)
GPU = Device(0, "gpu0", 80 * GiB)
PAIR = (GPU, Device(1, "gpu1", 80 * GiB))


def model(name: str, gib: int = 50, **fields: Any) -> ModelSpec:
    """A model that takes ``gib`` on each of its devices, sleeps at both levels and has no idle rules."""
    footprint = fields.pop("footprint", Footprint(gib * GiB, gib * GiB, GiB, 10 * GiB))
    fields = {"sleep_levels": frozenset({1, 2}), "idle": NEVER, "weights": gib * GiB, **fields}
    return ModelSpec(name, footprint, **fields)
