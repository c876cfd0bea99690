"""The difference between "there is no GPU" and "it does not answer", and the remedy for the latter.

There is no NVIDIA device if neither its library nor a device node nor its driver is found. If one of them is, and the
library still does not list the devices, an operator has to act: the driver was upgraded without a reboot, the module is
not loaded (yet), access is forbidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllmd.frozen import frozen

NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
# nvmlReturn_t
_PERMISSION, _NOT_LOADED, _TIMEOUT, _LIBRARY, _LOST, _RESET, _MISMATCH = 4, 9, 10, 12, 15, 16, 18
_BY_WORDS = {  # of releases that tell no number
    "Insufficient Permissions": _PERMISSION,
    "Driver Not Loaded": _NOT_LOADED,
    "Timeout": _TIMEOUT,
    "Shared Library Not Found": _LIBRARY,
    "GPU is lost": _LOST,
    "GPU requires reset": _RESET,
    "library version mismatch": _MISMATCH,
}
_CURES = {
    _PERMISSION: "give the daemon's user access to /dev/nvidiactl and /dev/nvidia* (mode 0666, or its group), "
    "and its unit a DeviceAllow= for them",
    _NOT_LOADED: "load the module: modprobe nvidia; if that fails, dmesg says why (no module for this kernel, "
    "Secure Boot, nouveau in its place)",
    _TIMEOUT: "look into dmesg for NVRM: Xid; a GPU that hangs comes back with a reset or a reboot",
    _LIBRARY: "install the driver's library: apt install libnvidia-ml1, or the package nvidia-utils of the driver's "
    "version",
    _LOST: "it fell off the bus: look into dmesg for NVRM: Xid 79 (power, riser, heat); it comes back with a reboot",
    _RESET: "stop what uses it, then nvidia-smi --gpu-reset -i N; or reboot",
    _MISMATCH: "the driver was upgraded while the old module is still loaded: reboot, or stop what uses the GPUs and "
    "reload the module (rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia; modprobe nvidia)",
}
_WSL = "under WSL the GPU is /dev/dxg: update WSL (wsl --update) and Windows' NVIDIA driver, install none in Linux"
_ANYTHING = "dmesg | grep NVRM says what the driver met; nvidia-smi meets the same"
LOST = frozenset({_LOST, _RESET})


@frozen
class Trouble:
    """Why the devices are not known, and the remedy; both are sentences for operators."""

    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}" if self.remedy else self.why


@frozen
class Presence:
    """The traces of GPUs on this machine without their libraries. ``root``: the directory of /dev, /sys and /proc."""

    root: Path = Path("/")

    @property
    def nvidia_nodes(self) -> tuple[str, ...]:
        """Device nodes of NVIDIA's driver, Tegra's and WSL's among them."""
        found = [*(self.root / "dev").glob("nvidia*"), *(self.root / "dev").glob("nvhost-*"), self.root / "dev/dxg"]
        return tuple(sorted(f"/dev/{path.name}" for path in found if path.exists() and not path.is_dir()))

    @property
    def wsl(self) -> bool:
        return (self.root / "dev/dxg").exists()

    def displays(self, vendor: str) -> tuple[str, ...]:
        """PCI addresses of the display controllers of one vendor."""
        return tuple(sorted(path.name for path in self._functions(vendor)))

    def unbound(self, vendor: str) -> tuple[str, ...]:
        """The displays that no driver, or a driver other than the vendor's, is bound to."""
        drivers = {NVIDIA: ("nvidia",), AMD: ("amdgpu",), INTEL: ("i915", "xe")}[vendor]
        return tuple(sorted(path.name for path in self._functions(vendor) if _driver(path) not in drivers))

    def _functions(self, vendor: str) -> Iterator[Path]:
        with suppress(OSError):
            for path in (self.root / "sys/bus/pci/devices").iterdir():
                if _line(path / "vendor") == vendor and _line(path / "class").startswith("0x03"):
                    yield path


def _driver(function: Path) -> str:
    try:
        return Path(os.readlink(function / "driver")).name
    except OSError:
        return ""


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def code_of(error: BaseException) -> int:
    """NVML's number of an error; 0 where it tells none."""
    number = getattr(error, "value", 0)
    if isinstance(number, int) and number:
        return number
    return next((code for words, code in _BY_WORDS.items() if words.lower() in str(error).lower()), 0)


def words_of(error: BaseException) -> str:
    """The text of NVML's error, for operators."""
    text = str(error) or type(error).__name__
    if code_of(error) == _LIBRARY:
        return "libnvidia-ml.so.1 was not found"
    return f"NVML: {text}"


def judge(error: BaseException, here: Presence) -> Trouble | None:
    """Why NVML could not be initialised; None: there is no NVIDIA device on this machine."""
    code, nodes = code_of(error), here.nvidia_nodes
    displays = here.displays(NVIDIA)
    if code in (0, _LIBRARY) and isinstance(error, ImportError | OSError) and not nodes:
        return None  # nothing of the driver's userland, nor a node
    if code in (_LIBRARY, _NOT_LOADED) and not nodes and (code == _LIBRARY or not displays):
        return None  # not even a card, or one that nobody has installed anything for
    if here.wsl:
        return Trouble(words_of(error), _WSL)
    seen = f"{', '.join(nodes[:3])} exists" if nodes else ""
    seen = seen or (f"there is an NVIDIA card at {displays[0]}" if displays else "its library is installed")
    return Trouble(f"{words_of(error)}, although {seen}", _CURES.get(code, _ANYTHING))


def no_module(error: ImportError, here: Presence) -> Trouble | None:
    """The Python module is not installed; that only matters where there is a driver."""
    if not here.nvidia_nodes:
        return None
    return Trouble(f"there is an NVIDIA driver ({here.nvidia_nodes[0]}), but not the Python module pynvml: {error}",
                   "install it: apt install python3-pynvml, or pip install nvidia-ml-py")  # fmt: skip


def remedy_of(error: BaseException) -> str:
    """The remedy for one device's error; "" for none in particular."""
    return _CURES.get(code_of(error), "")


def is_lost(error: Any) -> bool:
    """Whether the device is off the bus or needs a reset, so that the engines on it have failed."""
    return isinstance(error, BaseException) and code_of(error) in LOST
