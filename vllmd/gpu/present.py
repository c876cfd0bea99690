"""The devices of this machine, and whether a model's settings fit them, for commands without a daemon."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.config.checks import memory_of
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device
from vllmd.gpu.cpu import gpus
from vllmd.gpu.sources import open_devices
from vllmd.gpu.thread import answer_within
from vllmd.sizes import in_words

PATIENCE_SECONDS = 5.0  # for a driver's answer


def present(config: Config) -> tuple[Device, ...]:
    """The GPUs, or the devices that are declared; none where the driver does not answer (the daemon will say so).

    All of them: a CUDA_VISIBLE_DEVICES of the caller's shell is not the daemon's.
    """
    return answer_within(PATIENCE_SECONDS, lambda: gpus(open_devices(config, {}).inventory())) or ()


def unfit(model: ModelConfig, devices: Sequence[Device]) -> str:
    """Why these devices can never meet the settings of devices and memory; "" if they can, or there is no device."""
    if not devices:
        return ""
    absent = [index for index in model.devices if index not in {device.index for device in devices}]
    if absent:
        there = ", ".join(str(device.index) for device in devices)
        return f"there is no device {absent[0]}; this machine has {there}"
    own = [device for device in devices if not model.devices or device.index in model.devices]
    needed = model.devices_here
    if len(own) < needed:
        return f"it takes {needed} devices, but may use {len(own)} only"
    small = [device for device in own if memory_of(model, device.memory) > device.memory - device.reserve]
    if len(own) - len(small) >= needed:
        return ""
    largest = max(small, key=lambda device: device.memory - device.reserve)
    taken = memory_of(model, largest.memory)
    sizes = taken, largest.memory, largest.reserve, largest.memory - largest.reserve
    need, has, reserve, room = (in_words(size, gap="", digits=".4g") for size in sizes)
    each = f" on each of {needed} devices" if needed > 1 else ""
    return f"it would take {need}{each}, and device {largest.index} has {has} less a reserve of {reserve}: {room}"
