"""Devices that the configuration declares: for machines without NVML, and for rehearsals.

A declared device may name a stand-in's device file (``vllmd.simengine.device``);
then it is read like a real one. Without a file only the ledger knows what is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllmd.config.types import DeviceConfig
from vllmd.core.types import Device
from vllmd.gpu.inventory import Inventory
from vllmd.gpu.sample import DeviceSample, Sample, absurdity
from vllmd.simengine.device import DeviceUsage, device_usage


class DeclaredDevices(Inventory):
    """The devices of the configuration, numbered from 0 in its order. ``reserve`` in bytes for each."""

    source = "declared"

    def __init__(self, devices: Sequence[DeviceConfig], reserve: int) -> None:
        self._files: dict[int, Path] = {index: each.file for index, each in enumerate(devices) if each.file}
        found = (
            Device(index, str(index), each.memory, reserve, each.name, read=index in self._files)
            for index, each in enumerate(devices)
        )
        super().__init__(tuple(found), ("as the configuration says",))
        self.readable = bool(self._files)

    def sample(self) -> Sample:
        """Read those that have a file; the others are in neither ``devices`` nor ``failed``."""
        devices: dict[int, DeviceSample] = {}
        failed: dict[int, str] = {}
        for index, path in self._files.items():
            try:
                devices[index] = _read(path, self._inventory[index])
            except (OSError, ValueError, KeyError, TypeError) as error:
                failed[index] = f"{path}: {error}"
        return Sample(devices, failed)


def _read(path: Path, device: Device) -> DeviceSample:
    usage = device_usage(path) if path.exists() else DeviceUsage(device.memory, {})  # made by the first that holds some
    wrong = absurdity(usage.memory, usage.used, usage.memory - usage.used, device.memory)
    if wrong:
        raise ValueError(wrong)
    return DeviceSample(usage.memory, usage.used, usage.free, usage.processes, name=device.name)
