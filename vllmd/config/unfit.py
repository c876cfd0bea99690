"""What keeps a model from ever being loaded, by its settings and the devices.

It is asked of the devices that the configuration declares (``checks``) and of those that were found (``gpu.present``).
Whether they are enough is decided, and worded, in ``core.lack``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllmd.config.types import Config, ModelConfig
from vllmd.core.lack import lack
from vllmd.core.types import Device


class Unfit(NamedTuple):
    """``setting``: the model's setting that cannot be met. ``why``: the reason in words."""

    setting: str
    why: str


def unfit(model: ModelConfig, devices: Sequence[Device] | None) -> Iterator[Unfit]:
    """What these devices can never meet. None: they are not known; none at all: engines run on the CPU."""
    needed, there = model.devices_here, {device.index: device for device in devices or ()}
    for index in model.devices if devices is not None else ():
        if index not in there:
            numbers = ", ".join(map(str, there))
            others = f"are {numbers}" if len(there) > 1 else f"is only {numbers}" if numbers else "is none"
            yield Unfit("devices", f"there is no device {index}; there {others}")
    # An index that is not there was told. Of devices that are not known only the number can be.
    own = [there.get(index, Device(index, "", 0)) for index in model.devices] or list(there.values())
    lacks = lack(own, needed, lambda device: memory_of(model, device.memory)) if own else None
    if lacks is None:
        return
    if lacks.size is None:
        by_ranks = model.local_devices is None
        product = " (tensor_parallel_size times pipeline_parallel_size)" * by_ranks
        yield Unfit("tensor_parallel_size" if by_ranks else "local_devices", f"{lacks.of('it')}{product}")
    elif all(device.memory for device in own):
        yield Unfit("gpu_memory", lacks.of("it"))


def declared(config: Config) -> tuple[Device, ...] | None:
    """The devices that the configuration declares; None where the machine is asked for them."""
    if config.devices is None:
        return None
    return tuple(
        [Device(index, str(index), each.memory, config.reserve, each.name) for index, each in enumerate(config.devices)]
    )


def memory_of(model: ModelConfig, device: int) -> int:
    """Bytes that a model takes of a device of ``device`` bytes, as configured; 0 for auto: nothing is known of it."""
    memory = model.gpu_memory
    return int(memory * device) if isinstance(memory, float) else memory or 0
