"""The CPU, where there is no GPU: a device whose memory is the host's, as far as control groups leave it to engines.

So engines without GPUs take turns as those with some do, and the machine does not run out of memory when a third model
is asked for. What others hold is what is in use beside what the ledger has for our own: whose memory it is nobody can
tell by its process, for weights are shared mappings of files as often as not. A reading never fails, and says nothing
where the kernel says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllmd.core.types import CPU, Device
from vllmd.gpu.inventory import Inventory
from vllmd.gpu.sample import DeviceSample, Sample
from vllmd.place import available_memory, host_memory
from vllmd.sizes import GiB

LEAST_RESERVE = GiB // 2


class CpuDevice(Inventory):
    """The only device of its machine, number 0. ``reserve`` in bytes; a twentieth of the memory, if that is more."""

    source = "cpu"
    readable = True

    def __init__(self, why: str, reserve: int, root: Path = Path("/")) -> None:
        self._root = root
        memory = host_memory(root)
        kept = min(max(reserve, memory // 20, LEAST_RESERVE), memory // 2)
        is_read = available_memory(root) is not None  # else who waits for others to leave would wait for ever
        super().__init__((Device(0, CPU, memory, kept, "CPU", CPU, read=is_read),), (why,))

    def sample(self) -> Sample:
        """What is in use, by anybody."""
        (device,) = self._inventory
        free = available_memory(self._root)
        if free is None:
            return Sample()
        free = min(free, device.memory)
        return Sample({0: DeviceSample(device.memory, device.memory - free, free, hides_processes=True, name="CPU")})


def gpus(devices: Sequence[Device]) -> tuple[Device, ...]:
    """The devices that are not the CPU."""
    return tuple(device for device in devices if device.runtime != CPU)


def the_cpu(devices: Sequence[Device]) -> Device | None:
    """The CPU, where that is what engines run on."""
    return next((device for device in devices if device.runtime == CPU), None)
