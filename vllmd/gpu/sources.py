"""Find the devices of this machine, by trying every source in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from vllmd.config.types import Config
from vllmd.core.types import Device
from vllmd.gpu.cpu import CpuDevice
from vllmd.gpu.declared import DeclaredDevices
from vllmd.gpu.inventory import NoDevices, Unanswered
from vllmd.gpu.nvml import HERE, NOTHING, NoNvml, NvmlDevices
from vllmd.gpu.sample import Sample
from vllmd.gpu.sysfs import BAD, AmdDevices, IntelDevices, SysfsDevices, cards
from vllmd.gpu.trouble import AMD, NVIDIA, Presence, Trouble


class Devices(Protocol):
    """The devices of one source."""

    @property
    def source(self) -> Literal["nvml", "declared", "none"] | str:
        """``nvml``, ``amdgpu``, ``intel``, ``declared``, ``cpu`` or ``none``."""

    @property
    def readable(self) -> bool:
        """Whether ``sample`` can have any figures."""

    @property
    def trouble(self) -> Trouble | None:
        """Why the devices are not known; None if they are, or if there are none."""

    @property
    def asking(self) -> bool:
        """Whether the devices may be known in a moment: the driver has not answered yet."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for operators: why it is this source, and anything unusual."""

    @property
    def note(self) -> str:
        """The notes as one line."""

    def inventory(self) -> tuple[Device, ...]:
        """The devices, as they were when opened."""

    def sample(self) -> Sample:
        """Read all devices once; may block, never raises."""

    def close(self) -> None:
        """Close the source's library or socket."""


def open_devices(
    config: Config,
    env: Mapping[str, str],
    pynvml: Any = None,
    here: Presence = HERE,
    known: Mapping[str, int] = NOTHING,
    amdsmi: Any = None,
) -> Devices:
    """The declared devices if there are any, else NVIDIA's, else AMD's, else Intel's, else the CPU.

    Three results: devices, none, or (``trouble``) something is there that does not answer. ``env`` is the daemon's own
    environment (CUDA_VISIBLE_DEVICES and its like). An empty list of declared devices means none, and no source is
    tried. ``known``: id -> index of devices that were found before. May block in the driver; never raises.
    """
    if config.devices is not None:
        if not config.devices:
            return NoDevices("the configuration declares no devices: engines run on the CPU")
        return DeclaredDevices(config.devices, config.reserve)
    try:
        devices = NvmlDevices(config.reserve, env, pynvml, here=here, known=known)
    except NoNvml as error:
        if error.trouble:
            return Unanswered("nvml", error.trouble)
        why = "there is no GPU with a driver"  # then a library or a Python module that is missing is no trouble
    else:
        if devices.inventory():
            return devices
        devices.close()
        why = devices.note
    for source in (_amd, _intel):
        if found := source(config.reserve, here, env, known, amdsmi):
            return found
    return CpuDevice(f"{why}{_without_driver(here)}; engines run on the CPU", config.reserve, here.root)


def _amd(reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int], amdsmi: Any) -> Devices | None:
    """AMD's devices by the library, if it is installed and answers, else by the driver's files."""
    if not cards(here, AmdDevices.drivers):
        return None
    from vllmd.gpu.amdsmi import SmiDevices, load  # few machines have a card of AMD's

    problem = ""
    if library := amdsmi or load():
        try:
            return _answer(SmiDevices(reserve, here, env, known, library))
        except Exception as error:
            problem = f"amdsmi does not answer: {error}"
    devices = AmdDevices(reserve, here, env, known)
    if problem:
        devices.notes = (*devices.notes, problem)
    return _answer(devices)


def _intel(
    reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int], amdsmi: Any
) -> Devices | None:
    return _answer(IntelDevices(reserve, here, env, known))


def _answer(devices: SysfsDevices) -> Devices | None:
    """The devices; Unanswered if none of them can be read; None if the vendor has none here."""
    if devices.inventory():
        return devices
    devices.close()
    if devices.problems:
        return Unanswered(devices.source, Trouble("; ".join(devices.problems), BAD.remedy))
    if devices.hidden:
        return NoDevices(f"{devices.note}: that hides every device; engines run on the CPU")
    return None


def _without_driver(here: Presence) -> str:
    """The note about cards that have no driver, "" if there are none."""
    vendors = (("an NVIDIA", here.displays(NVIDIA)), ("an AMD", here.unbound(AMD)))
    notes = [f"there is {vendor} card at {', '.join(cards)} without its driver" for vendor, cards in vendors if cards]
    return "".join(f"; {note}" for note in notes)
