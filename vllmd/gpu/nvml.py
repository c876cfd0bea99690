"""NVIDIA's management library, through nvidia-ml-py (``pynvml``).

All of its errors are handled here. If one field or one device cannot be read, the rest is still read. Written for
``pynvml`` 11.525 (Debian 12) and newer; the module is passed in, so that tests bring their own.

Where GPU and CPU share their memory (GB10, Thor, Jetson) NVML has no figures for it; then the kernel's are used:
MemTotal, and MemAvailable as free.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from vllmd.core.types import Device
from vllmd.frozen import frozen
from vllmd.gpu.inventory import Inventory
from vllmd.gpu.sample import DeviceSample, Sample, absurdity
from vllmd.gpu.topology import cpus_of, node_of, switch_of
from vllmd.gpu.trouble import Presence, Trouble, code_of, is_lost, judge, no_module, remedy_of, words_of
from vllmd.gpu.visible import visible

T = TypeVar("T")
HERE = Presence()
NOTHING: Mapping[str, int] = {}
NOTHING_LEFT = "nvidia-smi -L lists the GPUs of the driver; dmesg | grep NVRM shows what happened to the others"

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h
_UNSUPPORTED = 3  # nvmlReturn_t
_UNCORRECTED, _VOLATILE = 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t
_NVLINK, _P2P_OK = 2, 0  # nvmlGpuP2PCapsIndex_t, nvmlGpuP2PStatus_t
_SLOWDOWNS = {  # of nvmlClocksEventReasons, without those of normal operation
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class NoNvml(Exception):
    """NVML cannot be used here; the message says why. ``trouble`` None: there is no NVIDIA device."""

    def __init__(self, why: str, trouble: Trouble | None = None) -> None:
        super().__init__(why)
        self.trouble = trouble


@frozen
class _Found:
    """A device as NVML enumerates it. One that cannot be used has no uuid and handle, but keeps its number."""

    uuid: str = ""
    handle: Any = None
    whole: Any = None  # of a MIG slice: the handle of its GPU

    @property
    def mig(self) -> bool:
        return self.whole is not None


class NvmlDevices(Inventory):
    """The NVIDIA devices of this machine that CUDA_VISIBLE_DEVICES leaves.

    ``known``: id -> index of devices that were found before; they keep it. Raises NoNvml if there is no library, no
    driver or no permission.
    """

    source = "nvml"
    readable = True

    def __init__(
        self, reserve: int, env: Mapping[str, str], pynvml: Any = None, proc: Path = Path("/proc"),
        here: Presence = HERE, known: Mapping[str, int] = NOTHING,
    ) -> None:  # fmt: skip
        self._here, self._proc = here, proc
        self._nvml = load(here) if pynvml is None else pynvml
        self._hidden = _other_pid_namespace(proc)
        super().__init__()
        self._handles: dict[int, Any] = {}
        self._unified: set[int] = set()  # indices of devices that share the host's memory
        self._ill: dict[int, str] = {}
        self._lost: dict[int, str] = {}
        self._init()
        self._enumerate(reserve, env, known)

    def sample(self) -> Sample:
        """Read every device; those that cannot be read are in ``failed``. Never raises. May block in the driver."""
        devices: dict[int, DeviceSample] = {}
        failed: dict[int, str] = {}
        self._ill, self._lost = {}, {}
        for device in self._inventory:
            try:
                devices[device.index] = self._read(device)
            except _Unreadable as error:
                failed[device.index] = str(error)
                self._handles.pop(device.index, None)
                if is_lost(error.__cause__):
                    self._lost[device.index] = str(error)
        if failed and not devices:
            self.close()  # the driver may have been reloaded: the next sample begins with a new library
            self._handles.clear()
            with suppress(NoNvml):
                self._init()
        return Sample(devices, failed, dict(self._ill), dict(self._lost))

    def close(self) -> None:
        """Shut the NVML library down; harmless if that fails."""
        with suppress(Exception):
            self._nvml.nvmlShutdown()

    # -- opening -----------------------------------------------------------------------

    def _init(self) -> None:
        try:
            self._nvml.nvmlInit()
        except Exception as error:
            raise NoNvml(words_of(error), judge(error, self._here)) from error

    def _enumerate(self, reserve: int, env: Mapping[str, str], known: Mapping[str, int]) -> None:
        found, problems = self._find_all()
        left = visible(env, [each.uuid for each in found])
        places = _places(found, known)
        counted = self._counts_as_cuda(found)
        whole = [self._device(places[i], found[i], i if counted else None, reserve, problems) for i in left.indices]
        devices = [device for device in whole if device is not None]
        self._handles = {places[i]: found[i].handle for i in left.indices}
        self._inventory = tuple(self._linked(sorted(devices, key=lambda device: device.index)))
        version = self._field(lambda: _text(self._nvml.nvmlSystemGetDriverVersion()), "")
        driver, nothing = f"NVIDIA driver {version}" if version else "", "" if found else "NVML: no GPU is attached"
        self.notes = tuple(note for note in (driver, nothing, left.note, *problems) if note)
        if not self._inventory and not left.empty and (found or self._here.nvidia_nodes):
            why = "; ".join(problems) or "NVML lists no GPU, although its driver is loaded"
            raise NoNvml(why, Trouble(why, NOTHING_LEFT))

    def _counts_as_cuda(self, found: list[_Found]) -> bool:
        """Whether CUDA has certainly the same numbers as NVML, if it counts in the order of the PCI bus.

        CUDA leaves out cards too old for it, lost cards, and cards in MIG mode.
        """
        if any(each.handle is None or each.mig for each in found):
            return False
        capabilities = {self._field(partial(self._capability, each.handle), None) for each in found}
        return len(found) == 1 or (len(capabilities) == 1 and None not in capabilities)

    def _capability(self, handle: Any) -> tuple[int, ...]:
        return tuple(self._nvml.nvmlDeviceGetCudaComputeCapability(handle))

    def _find_all(self) -> tuple[list[_Found], list[str]]:
        found: list[_Found] = []
        problems: list[str] = []
        try:
            number_of = self._nvml.nvmlDeviceGetCount()
        except Exception as error:
            raise NoNvml(words_of(error), judge(error, self._here)) from error
        for index in range(number_of):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                whole = _Found(_text(self._nvml.nvmlDeviceGetUUID(handle)), handle)
            except Exception as error:
                problems.append(f"GPU {index} is left out: {Trouble(words_of(error), remedy_of(error))}")
                whole = _Found()
            slices = self._slices(whole)
            if slices:
                problems.append(f"GPU {index} is in MIG mode: its {len(slices)} slices are devices {len(found)} and on")
            found.extend(slices or [whole])
        return found, problems

    def _slices(self, whole: _Found) -> list[_Found]:
        """The MIG slices of a GPU in MIG mode, each a device of its own; the GPU itself cannot be used then."""
        slices: list[_Found] = []
        if whole.handle is None or self._field(lambda: self._nvml.nvmlDeviceGetMigMode(whole.handle)[0], 0) != 1:
            return slices
        for number in range(self._field(lambda: self._nvml.nvmlDeviceGetMaxMigDeviceCount(whole.handle), 0)):
            with suppress(Exception):  # no slice at this number
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole.handle, number)
                slices.append(_Found(_text(self._nvml.nvmlDeviceGetUUID(handle)), handle, whole.handle))
        return slices

    def _device(
        self, index: int, found: _Found, number: int | None, reserve: int, problems: list[str]
    ) -> Device | None:
        if found.handle is None:
            return None
        try:
            memory = self._memory(index, found.handle)[0]
        except _Unreadable as error:
            problems.append(f"GPU {index} ({found.uuid}) is left out: {error}")
            return None
        if memory <= 0:
            problems.append(f"GPU {index} ({found.uuid}) is left out: it reports {memory} bytes of memory")
            return None
        if index in self._unified:
            problems.append(f"GPU {index} shares the host's memory: its figures are MemTotal and MemAvailable")
        address = self._address(found.whole or found.handle)
        root, name = self._here.root, self._name(found.handle)
        node = node_of(root, address)
        return Device(index, found.uuid, memory, reserve, name, "cuda", number,
                      node=node, switch=switch_of(root, address), cpus=cpus_of(root, node),
                      shared=index in self._unified, read=True)  # fmt: skip

    def _address(self, handle: Any) -> str:
        """The PCI address as the kernel writes it; NVML's has a domain of eight digits."""
        bus = self._field(lambda: _text(self._nvml.nvmlDeviceGetPciInfo(handle).busId), "").lower()
        domain, _, rest = bus.partition(":")
        return f"{domain[-4:]}:{rest}"

    def _linked(self, devices: list[Device]) -> Iterator[Device]:
        """Each device with the others that it reaches by NVLink, directly or through a switch."""
        for device in devices:
            others = (other for other in devices if other is not device)
            yield replace(device, links=frozenset(each.index for each in others if self._link(device, each)))

    def _link(self, one: Device, other: Device) -> bool:
        ask, handles = self._nvml, self._handles
        status = self._field(
            lambda: ask.nvmlDeviceGetP2PStatus(handles[one.index], handles[other.index], _NVLINK), None
        )
        return bool(status == _P2P_OK)

    # -- reading -----------------------------------------------------------------------

    def _read(self, device: Device) -> DeviceSample:
        handle, ask = self._handle(device), self._nvml
        total, used, free = self._memory(device.index, handle)
        wrong = absurdity(total, used, free, device.memory)
        if wrong:
            raise _Unreadable(wrong)
        processes, unsized, listed = self._processes(handle, total)
        power = self._field(lambda: ask.nvmlDeviceGetPowerUsage(handle) / 1000, None)
        busy = self._field(lambda: float(ask.nvmlDeviceGetUtilizationRates(handle).gpu), None)
        heat = self._field(lambda: float(ask.nvmlDeviceGetTemperature(handle, 0)), None)
        blind = not listed or (self._hidden and not processes and not unsized and used > 0)
        if ill := self._fault(handle):
            self._ill[device.index] = ill
        return DeviceSample(
            total, used, free, processes, unsized, blind, device.name, power, busy, heat, self._slowdown(handle)
        )

    def _fault(self, handle: Any) -> str:
        """Why a device should not be used although it answers; "" if it may."""
        ask = self._nvml
        errors = self._field(lambda: int(ask.nvmlDeviceGetTotalEccErrors(handle, _UNCORRECTED, _VOLATILE)), 0)
        rows = self._field(lambda: tuple(ask.nvmlDeviceGetRemappedRows(handle)), (0, 0, 0, 0))
        if rows[3]:
            return "a row of its memory could not be remapped: it has to be replaced"
        if rows[2]:
            return "rows of its memory are to be remapped: reset it (nvidia-smi --gpu-reset -i N) or reboot"
        return f"{errors} uncorrectable ECC errors since its driver was loaded: reset it or reboot" if errors else ""

    def _slowdown(self, handle: Any) -> str:
        ask = self._nvml
        bits = self._field(lambda: int(ask.nvmlDeviceGetCurrentClocksEventReasons(handle)), None)
        if bits is None:  # the function's name up to 12.535
            bits = self._field(lambda: int(ask.nvmlDeviceGetCurrentClocksThrottleReasons(handle)), 0)
        return ", ".join(words for bit, words in _SLOWDOWNS.items() if bits & bit)

    def _handle(self, device: Device) -> Any:
        """A device's handle; after a failure by UUID, since a reload of the driver may renumber devices."""
        if device.index not in self._handles:
            self._handles[device.index] = self._must(lambda: self._nvml.nvmlDeviceGetHandleByUUID(device.id))
        return self._handles[device.index]

    def _memory(self, index: int, handle: Any) -> tuple[int, int, int]:
        """Total, used, free. By version 1 of the call, whose ``used`` includes the driver's own memory."""
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        except Exception as error:
            if code_of(error) == _UNSUPPORTED or "not supported" in str(error).lower():
                self._unified.add(index)
                return _host_memory(self._proc)
            raise _Unreadable(_why(error)) from error
        return int(info.total), int(info.used), int(info.free)

    def _processes(self, handle: Any, total: int) -> tuple[dict[int, int], frozenset[int], bool]:
        """pid -> bytes, the pids without a size, and whether the list of compute processes could be read."""
        sizes: dict[int, int] = {}
        unsized: set[int] = set()
        computing = self._field(lambda: list(self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)), None)
        drawing = self._field(lambda: list(self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)), None)
        shared = self._field(lambda: list(self._nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)), None)
        for process in [*(computing or ()), *(drawing or ()), *(shared or ())]:
            pid, size = int(process.pid), process.usedGpuMemory
            if size is None or not 0 <= size <= total:  # NVML_VALUE_NOT_AVAILABLE is 2**64 - 1 where not translated
                unsized.add(pid)
            else:
                sizes[pid] = max(sizes.get(pid, 0), int(size))  # a process may be in several lists
        return sizes, frozenset(unsized - sizes.keys()), computing is not None

    def _name(self, handle: Any) -> str:
        return self._field(lambda: _text(self._nvml.nvmlDeviceGetName(handle)), "")

    def _field(self, read: Callable[[], T], default: T) -> T:
        """One field, or ``default`` if the device does not have it."""
        try:
            return read()
        except Exception:
            return default

    def _must(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:
            raise _Unreadable(_why(error)) from error


class _Unreadable(Exception):
    """A required figure of a device cannot be read."""


def load(here: Presence = HERE) -> Any:
    """The module ``pynvml``. Raises NoNvml if it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        where = "Debian: python3-pynvml, PyPI: nvidia-ml-py"
        raise NoNvml(f"the Python module pynvml is not installed ({where})", no_module(error, here)) from error


def _places(found: list[_Found], known: Mapping[str, int]) -> list[int]:
    """The index of each device: the one that it had before, else its own place, else the first free one."""
    taken = set(known.values())
    places: list[int] = []
    for place, each in enumerate(found):
        index = known.get(each.uuid, place) if each.uuid else place
        if each.uuid not in known and index in taken:
            index = next(free for free in count(len(found)) if free not in taken)
        taken.add(index)
        places.append(index)
    return places


def _host_memory(proc: Path) -> tuple[int, int, int]:
    """Total, used and free memory of the host; free: MemAvailable, the kernel's estimate without swapping."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    figures = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) > 1}
    total, free = figures["MemTotal"], figures["MemAvailable"]
    return total, total - free, free


def _why(error: Exception) -> str:
    return str(Trouble(words_of(error), remedy_of(error)))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _other_pid_namespace(proc: Path) -> bool:
    """Whether this is a pid namespace of a container's: the driver's list may be empty, or have other pids."""
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
