"""NVIDIA's management library, through nvidia-ml-py (``pynvml``).

The one place where its errors are met. Whatever one field or one device
refuses, the rest is still read. Written for ``pynvml`` 11.525 (Debian 12) and
newer; the module is passed in, so that tests bring their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vllmd.core.types import Device
from vllmd.gpu.inventory import Inventory
from vllmd.gpu.sample import DeviceSample, Sample, absurdity
from vllmd.gpu.visible import visible

T = TypeVar("T")

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h


class NoNvml(Exception):
    """NVML cannot be used here; the message says why, readable."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A device as NVML enumerates it. One that cannot be used has neither, and keeps the others' numbers in place."""

    uuid: str = ""
    handle: Any = None


class NvmlDevices(Inventory):
    """The NVIDIA devices of this machine that CUDA_VISIBLE_DEVICES leaves to us.

    Raises NoNvml if there is no library, no driver or no right to use it.
    """

    source = "nvml"
    readable = True

    def __init__(self, reserve: int, env: Mapping[str, str], pynvml: Any = None, proc: Path = Path("/proc")) -> None:
        self._nvml = load() if pynvml is None else pynvml
        self._hidden = _other_pid_namespace(proc)
        super().__init__()
        self._handles: dict[int, Any] = {}
        self._init()
        self._enumerate(reserve, env)

    def sample(self) -> Sample:
        """Read every device. What cannot be read is in ``failed``; never raises. May block in the driver."""
        devices: dict[int, DeviceSample] = {}
        failed: dict[int, str] = {}
        for device in self._inventory:
            try:
                devices[device.index] = self._read(device)
            except _Unreadable as error:
                failed[device.index] = str(error)
                self._handles.pop(device.index, None)
        if failed and not devices:
            self._begin_anew()
        return Sample(devices, failed)

    def close(self) -> None:
        """Let the library go."""
        with suppress(Exception):
            self._nvml.nvmlShutdown()

    # -- opening -----------------------------------------------------------------------

    def _init(self) -> None:
        try:
            self._nvml.nvmlInit()
        except Exception as error:
            raise NoNvml(_why(error)) from error

    def _begin_anew(self) -> None:
        """Every device failed: the driver may have been reloaded under us, so the next sample starts afresh."""
        self.close()
        self._handles.clear()
        with suppress(NoNvml):
            self._init()

    def _enumerate(self, reserve: int, env: Mapping[str, str]) -> None:
        found, problems = self._find_all()
        left = visible(env, [each.uuid for each in found])
        whole = [self._device(index, found[index], reserve, problems) for index in left.indices]
        self._inventory = tuple(device for device in whole if device is not None)
        for device in self._inventory:
            self._handles[device.index] = found[device.index].handle
        self.notes = tuple(note for note in (self._driver(), self._found_nothing(found), left.note, *problems) if note)

    def _find_all(self) -> tuple[list[_Found], list[str]]:
        found: list[_Found] = []
        problems: list[str] = []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except Exception as error:
            raise NoNvml(_why(error)) from error
        for index in range(count):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                whole = _Found(_text(self._nvml.nvmlDeviceGetUUID(handle)), handle)
            except Exception as error:
                problems.append(f"GPU {index} is left out: {_why(error)}")
                whole = _Found()
            slices = self._slices(whole)
            if slices:
                problems.append(f"GPU {index} is in MIG mode: its {len(slices)} slices are devices {len(found)} and on")
            found.extend(slices or [whole])
        return found, problems

    def _slices(self, whole: _Found) -> list[_Found]:
        """The MIG slices of a GPU in MIG mode: each is a device of its own, and the whole cannot be used."""
        slices: list[_Found] = []
        if whole.handle is None or self._field(lambda: self._nvml.nvmlDeviceGetMigMode(whole.handle)[0], 0) != 1:
            return slices
        for number in range(self._field(lambda: self._nvml.nvmlDeviceGetMaxMigDeviceCount(whole.handle), 0)):
            with suppress(Exception):  # a place in the table without a slice in it
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole.handle, number)
                slices.append(_Found(_text(self._nvml.nvmlDeviceGetUUID(handle)), handle))
        return slices

    def _device(self, index: int, found: _Found, reserve: int, problems: list[str]) -> Device | None:
        if found.handle is None:
            return None
        try:
            memory = self._memory(found.handle)[0]
        except _Unreadable as error:
            problems.append(f"GPU {index} ({found.uuid}) is left out: {error}")
            return None
        if memory <= 0:
            problems.append(f"GPU {index} ({found.uuid}) is left out: it reports {memory} bytes of memory")
            return None
        return Device(index, found.uuid, memory, reserve, self._name(found.handle))

    def _driver(self) -> str:
        version = self._field(lambda: _text(self._nvml.nvmlSystemGetDriverVersion()), "")
        return f"NVIDIA driver {version}" if version else ""

    def _found_nothing(self, found: list[_Found]) -> str:
        return "" if found else "NVML: no GPU is attached"

    # -- reading -----------------------------------------------------------------------

    def _read(self, device: Device) -> DeviceSample:
        handle = self._handle(device)
        total, used, free = self._memory(handle)
        wrong = absurdity(total, used, free, device.memory)
        if wrong:
            raise _Unreadable(wrong)
        processes, unsized, listed = self._processes(handle, total)
        power = self._field(lambda: self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000, None)
        busy = self._field(lambda: float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu), None)
        blind = not listed or (self._hidden and not processes and not unsized and used > 0)
        return DeviceSample(total, used, free, processes, unsized, blind, device.name, power, busy)

    def _handle(self, device: Device) -> Any:
        """Its handle, looked up by UUID after a failure: its number may have changed with a driver's reload."""
        if device.index not in self._handles:
            self._handles[device.index] = self._must(lambda: self._nvml.nvmlDeviceGetHandleByUUID(device.id))
        return self._handles[device.index]

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        """Total, used, free. The first version of the call, whose ``used`` includes what the driver keeps."""
        info = self._must(lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle))
        return int(info.total), int(info.used), int(info.free)

    def _processes(self, handle: Any, total: int) -> tuple[dict[int, int], frozenset[int], bool]:
        """Sizes by pid, the pids without one, and whether the list of computing processes could be had at all."""
        sizes: dict[int, int] = {}
        unsized: set[int] = set()
        computing = self._field(lambda: list(self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)), None)
        drawing = self._field(lambda: list(self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)), None)
        for process in [*(computing or ()), *(drawing or ())]:
            pid, size = int(process.pid), process.usedGpuMemory
            if size is None or not 0 <= size <= total:  # NVML_VALUE_NOT_AVAILABLE is 2**64 - 1 where not translated
                unsized.add(pid)
            else:
                sizes[pid] = max(sizes.get(pid, 0), int(size))  # one that computes and draws is in both lists
        return sizes, frozenset(unsized - sizes.keys()), computing is not None

    def _name(self, handle: Any) -> str:
        return self._field(lambda: _text(self._nvml.nvmlDeviceGetName(handle)), "")

    def _field(self, read: Callable[[], T], otherwise: T) -> T:
        """One field, or what to take where the device does not tell it."""
        try:
            return read()
        except Exception:
            return otherwise

    def _must(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:
            raise _Unreadable(_why(error)) from error


class _Unreadable(Exception):
    """A device does not tell what cannot be done without."""


def load() -> Any:
    """The module ``pynvml``. Raises NoNvml if it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        where = "Debian: python3-pynvml, PyPI: nvidia-ml-py"
        raise NoNvml(f"the Python module pynvml is not installed ({where})") from error


def _why(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "Shared Library Not Found" in text:
        return "libnvidia-ml.so.1 was not found (no NVIDIA driver on this machine)"
    return f"NVML: {text}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _other_pid_namespace(proc: Path) -> bool:
    """Whether we are in a container with pids of its own: the driver may then show no processes, or others' numbers."""
    try:
        return (proc / "self/ns/pid").stat().st_ino != _FIRST_PID_NAMESPACE
    except OSError:
        return False


def names_of(pids: Iterable[int], proc: Path = Path("/proc")) -> dict[int, str]:
    """The processes' names (``comm``, at most 15 characters); those that are gone or hidden are left out."""
    names: dict[int, str] = {}
    for pid in pids:
        with suppress(OSError):
            names[pid] = (proc / str(pid) / "comm").read_text(errors="replace").strip()
    return names
