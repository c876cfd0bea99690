"""A sample as the HTTP API shows it: one ``GpuInfo`` per device."""

from __future__ import annotations

from pathlib import Path

from vllmd.frozen import frozen
from vllmd.gpu.nvml import names_of
from vllmd.gpu.sample import DeviceSample, Sample


@frozen
class GpuProcess:
    """A process on a device; its memory in MiB, None where the driver does not tell."""

    pid: int
    name: str
    gpu_memory_usage: int | None


@frozen
class GpuInfo:
    """A device: memory in use in per cent, power in watts (None where not told), its processes by pid."""

    id: int
    memory_usage: float
    power_draw: float | None
    processes: tuple[GpuProcess, ...]


def gpu_infos(sample: Sample, proc: Path = Path("/proc")) -> list[GpuInfo]:
    """The devices that could be read, by number. Names come from ``proc``; "" for a process that is gone or hidden."""
    return [_info(index, sample.devices[index], proc) for index in sorted(sample.devices)]


def _info(index: int, device: DeviceSample, proc: Path) -> GpuInfo:
    pids = sorted({*device.processes, *device.unsized})
    names = names_of(pids, proc)
    processes = tuple(GpuProcess(pid, names.get(pid, ""), _mib(device.processes.get(pid))) for pid in pids)
    power = None if device.power is None else round(device.power, 1)
    return GpuInfo(index, round(100 * device.used / device.total, 1), power, processes)


def _mib(size: int | None) -> int | None:
    return None if size is None else size >> 20
