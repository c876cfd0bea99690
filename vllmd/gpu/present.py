"""The devices of this machine, for whoever has no daemon to ask: the driver is asked, for a while."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from vllmd.config.checks import memory_of
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device
from vllmd.gpu.cpu import gpus
from vllmd.gpu.sources import open_devices
from vllmd.sizes import in_words

PATIENCE = 5.0  # seconds for a driver's answer


def present(config: Config) -> tuple[Device, ...]:
    """The GPUs, or the devices that are declared; none where the driver does not answer (the daemon will say so)."""
    found: list[tuple[Device, ...]] = []
    # Without our variables: CUDA_VISIBLE_DEVICES of the caller's shell hides nothing from the daemon.
    asking = threading.Thread(target=lambda: found.append(gpus(open_devices(config, {}).inventory())), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return found[0] if found else ()


def unfit(model: ModelConfig, devices: Sequence[Device]) -> str:
    """Why the settings of devices and memory can never be met by these devices; "" if they can, or nobody knows."""
    if not devices:
        return ""
    absent = [index for index in model.devices if index not in {device.index for device in devices}]
    if absent:
        there = ", ".join(str(device.index) for device in devices)
        return f"there is no device {absent[0]}; this machine has {there}"
    own = [device for device in devices if not model.devices or device.index in model.devices]
    if len(own) < model.devices_here:
        return f"it takes {model.devices_here} devices, and may use {len(own)} only"
    fitting = [device for device in own if memory_of(model, device.memory) <= device.memory - device.reserve]
    if len(fitting) >= model.devices_here:
        return ""
    largest = max(own, key=lambda device: device.memory - device.reserve)
    asked = memory_of(model, largest.memory)
    sizes = asked, largest.memory, largest.reserve, largest.memory - largest.reserve
    need, has, reserve, room = (in_words(size, gap="", digits=".4g") for size in sizes)
    return f"it would take {need}, and device {largest.index} has {has} less a reserve of {reserve}: {room}"
