"""A stand-in for the module ``pynvml``: devices as data, failures on demand.

Written after nvidia-ml-py 11.525 and 13.615.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

GiB = 1 << 30
NOT_AVAILABLE = 2**64 - 1


class NVMLError(Exception):
    """NVML's one exception; ``value`` is its nvmlReturn_t, 0 where a test does not mind."""

    def __init__(self, words: str, value: int = 0) -> None:
        super().__init__(words)
        self.value = value


MISMATCH = NVMLError("Driver/library version mismatch", 18)
NOT_LOADED = NVMLError("Driver Not Loaded", 9)
NO_LIBRARY = NVMLError("NVML Shared Library Not Found", 12)
NO_PERMISSION = NVMLError("Insufficient Permissions", 4)
UNSUPPORTED = NVMLError("Not Supported", 3)
LOST = NVMLError("GPU is lost", 15)


@dataclass
class Gpu:
    """A GPU as the fake has it; change its fields between samples. ``refuses`` names calls that fail, with why."""

    uuid: str
    total: int = 80 * GiB
    used: int = 0
    name: str = "Fake H100"
    computing: dict[int, int | None] = field(default_factory=dict)
    drawing: dict[int, int | None] = field(default_factory=dict)
    watts: float = 70.0
    busy: int = 0
    slices: list[Gpu] | None = None  # in MIG mode if not None
    refuses: dict[str, str | NVMLError] = field(default_factory=dict)
    sharing: dict[int, int | None] = field(default_factory=dict)  # clients of MPS
    capability: tuple[int, int] = (9, 0)
    address: str = "00000000:01:00.0"
    linked: frozenset[str] = frozenset()  # UUIDs that it reaches by NVLink
    errors: int = 0  # uncorrectable, of ECC
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)  # remapped: correctable, uncorrectable, pending, failed
    reasons: int = 0  # why its clocks are what they are
    heat: int = 40


class FakeNvml:
    """What ``import pynvml`` would give on a machine with these GPUs."""

    NVMLError = NVMLError

    def __init__(self, *gpus: Gpu, broken: str | Exception = "") -> None:
        self.gpus = list(gpus)
        self.broken = broken  # why nvmlInit fails
        self.inits = 0

    def nvmlInit(self) -> None:
        self.inits += 1
        if self.broken:
            raise self.broken if isinstance(self.broken, Exception) else NVMLError(self.broken)

    def nvmlShutdown(self) -> None:
        if not self.inits:
            raise NVMLError("Uninitialized")
        self.inits -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"550.1"  # bytes, as old releases had it

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self._ask(self.gpus[index], "handle")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return self._ask(gpu, "handle")
        raise NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return self._ask(gpu, "uuid").uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return self._ask(gpu, "name").name

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:
        self._ask(gpu, "memory")
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._ask(gpu, "computing").computing)

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._ask(gpu, "drawing").drawing)

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        return int(self._ask(gpu, "power").watts * 1000)

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._ask(gpu, "busy").busy, memory=0)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._ask(gpu, "sharing").sharing)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return self._ask(gpu, "capability").capability

    def nvmlDeviceGetPciInfo(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(busId=self._ask(gpu, "pci").address)

    def nvmlDeviceGetP2PStatus(self, gpu: Gpu, other: Gpu, what: int) -> int:
        return 0 if what == 2 and other.uuid in self._ask(gpu, "links").linked else 6

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, since: int) -> int:
        return self._ask(gpu, "ecc").errors if (kind, since) == (1, 0) else 0

    def nvmlDeviceGetRemappedRows(self, gpu: Gpu) -> tuple[int, int, int, int]:
        return self._ask(gpu, "rows").rows

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: Gpu) -> int:
        return self._ask(gpu, "reasons").reasons

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        return self._ask(gpu, "heat").heat

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        return [int(gpu.slices is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        if gpu.slices is None or index >= len(gpu.slices):
            raise NVMLError("Not Found")
        return gpu.slices[index]

    def _ask(self, gpu: Gpu, what: str) -> Gpu:
        if not self.inits:
            raise NVMLError("Uninitialized")
        if what in gpu.refuses:
            why = gpu.refuses[what]
            raise why if isinstance(why, Exception) else NVMLError(why)
        return gpu


def _processes(sizes: dict[int, int | None]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in sizes.items()]
