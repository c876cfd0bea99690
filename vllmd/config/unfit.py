"""What keeps a model from ever being loaded, by its settings and the devices: decided here, and worded here.

It is asked of the devices that the configuration declares (``checks``) and of those that were found (``gpu.present``).
What a model takes that says nothing of its memory is estimated later; of that the scheduler says whether it fits
(``core.fit``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device
from vllmd.sizes import in_words


class Unfit(NamedTuple):
    """``setting``: the one that cannot be met. ``device``: that is not there, or the largest that is too small."""

    setting: str
    model: ModelConfig
    there: tuple[Device, ...]  # that the model may use; for an absent device all that there are
    device: int = -1
    taken: int = 0  # bytes of that device

    @property
    def why(self) -> str:
        """The reason in words about the model, as "it"; with the device that there is not, or its figures."""
        needed = self.model.devices_here
        if self.setting == "devices":
            numbers = ", ".join(str(device.index) for device in self.there)
            there = f"are {numbers}" if len(self.there) > 1 else f"is only {numbers}" if numbers else "is none"
            return f"there is no device {self.device}; there {there}"
        if self.setting != "gpu_memory":
            product = " (tensor_parallel_size times pipeline_parallel_size)" * (self.model.local_devices is None)
            have = len(self.model.devices) or len(self.there)
            return f"it takes {needed} devices{product}, but may use {have} only"
        (largest,) = (device for device in self.there if device.index == self.device)
        sizes = self.taken, largest.memory, largest.reserve, max(0, largest.memory - largest.reserve)
        need, has, reserve, room = (in_words(size, gap="", digits=".4g") for size in sizes)
        each = f" on each of {needed} devices" if needed > 1 else ""
        return f"it would take {need}{each}, and device {self.device} has {has} less a reserve of {reserve}: {room}"


def unfit(model: ModelConfig, devices: Sequence[Device] | None) -> Iterator[Unfit]:
    """What these devices can never meet. None: they are not known; none at all: engines run on the CPU."""
    there, needed = tuple(devices or ()), model.devices_here
    if devices is not None:
        for index in model.devices:
            if index not in {device.index for device in there}:
                yield Unfit("devices", model, there, index)
    own = tuple([device for device in there if not model.devices or device.index in model.devices])
    have = len(model.devices) or len(own)
    if have and needed > have:
        yield Unfit("tensor_parallel_size" if model.local_devices is None else "local_devices", model, own)
        return
    small = [device for device in own if memory_of(model, device.memory) > device.memory - device.reserve]
    if small and len(own) - len(small) < needed:
        largest = max(small, key=lambda device: device.memory - device.reserve)
        yield Unfit("gpu_memory", model, own, largest.index, memory_of(model, largest.memory))


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
