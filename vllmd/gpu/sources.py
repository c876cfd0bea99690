"""Which devices there are on this machine, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from vllmd.config.types import Config
from vllmd.core.types import Device
from vllmd.gpu.declared import DeclaredDevices, NoDevices
from vllmd.gpu.nvml import NoNvml, NvmlDevices
from vllmd.gpu.sample import Sample


class Devices(Protocol):
    """The devices, wherever they come from. ``notes`` say why it is this source, and what is odd, readable."""

    @property
    def source(self) -> Literal["nvml", "declared", "none"] | str:
        """``nvml``, ``declared`` or ``none``."""

    @property
    def readable(self) -> bool:
        """Whether ``sample`` can say anything at all."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why it is this source, and what is odd."""

    @property
    def note(self) -> str:
        """The notes as one line."""

    def inventory(self) -> tuple[Device, ...]:
        """The devices, as they were when opened."""

    def sample(self) -> Sample:
        """One reading of them all; may block, never raises."""

    def close(self) -> None:
        """Let them go."""


def open_devices(config: Config, env: Mapping[str, str], pynvml: Any = None) -> Devices:
    """The declared devices if there are any, else NVML's, else none. May block in the driver; never raises.

    ``env`` is the daemon's own environment (CUDA_VISIBLE_DEVICES). An empty
    list of declared devices means: none, do not ask NVML.
    """
    if config.devices is not None:
        if not config.devices:
            return NoDevices("the configuration declares no devices: engines run on the CPU")
        return DeclaredDevices(config.devices, config.reserve)
    try:
        devices = NvmlDevices(config.reserve, env, pynvml)
    except NoNvml as error:
        return NoDevices(f"{error}; engines run on the CPU")
    if devices.inventory():
        return devices
    devices.close()
    return NoDevices(f"{devices.note}; engines run on the CPU")
