"""Which devices there are on this machine, and how that is known: the one place that asks every source."""

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
    """The devices, wherever they come from. ``notes`` say why it is this source, and what is odd, readable."""

    @property
    def source(self) -> Literal["nvml", "declared", "none"] | str:
        """``nvml``, ``amdgpu``, ``intel``, ``declared``, ``cpu`` or ``none``."""

    @property
    def readable(self) -> bool:
        """Whether ``sample`` can say anything at all."""

    @property
    def trouble(self) -> Trouble | None:
        """Why it cannot be told which devices there are; None where it can, or where there are none."""

    @property
    def asking(self) -> bool:
        """Whether it may yet be told in a moment."""

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
        """Free what the source holds open, such as a library or a socket."""


def open_devices(
    config: Config,
    env: Mapping[str, str],
    pynvml: Any = None,
    here: Presence = HERE,
    known: Mapping[str, int] = NOTHING,
    amdsmi: Any = None,
) -> Devices:
    """The declared devices if there are any, else NVIDIA's, else AMD's, else Intel's, else the CPU.

    Three answers: these, none, or (``trouble``) something is there that does not answer. ``env`` is the daemon's own
    environment (CUDA_VISIBLE_DEVICES and its like). An empty list of declared devices means: none, do not ask.
    ``known``: the indices that devices had before, by id. May block in the driver; never raises.
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
        why = "there is no GPU with a driver"  # so neither the library nor its Python module is missed
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
    """By AMD's library where it can be had and begun with, else by the driver's files."""
    if not cards(here, AmdDevices.drivers):
        return None
    from vllmd.gpu.amdsmi import SmiDevices, load  # few machines have a card of AMD's

    library = amdsmi or load()
    try:
        devices: AmdDevices = SmiDevices(reserve, here, env, known, library) if library else _by_files(
            reserve, here, env, known)  # fmt: skip
    except Exception as error:  # the files may tell what it does not
        devices = _by_files(reserve, here, env, known)
        devices.notes = (*devices.notes, f"amdsmi does not answer: {error}")
    return _answer(devices)


def _by_files(reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int]) -> AmdDevices:
    return AmdDevices(reserve, here, env, known)


def _intel(
    reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int], amdsmi: Any
) -> Devices | None:
    return _answer(IntelDevices(reserve, here, env, known))


def _answer(devices: SysfsDevices) -> Devices | None:
    """None if there are none of that maker's."""
    if devices.inventory():
        return devices
    devices.close()
    if devices.problems:
        return Unanswered(devices.source, Trouble("; ".join(devices.problems), BAD.remedy))
    if devices.hidden:
        return NoDevices(f"{devices.note}: that hides every device; engines run on the CPU")
    return None


def _without_driver(here: Presence) -> str:
    """A card that nobody has installed a driver for is worth a word."""
    makers = (("an NVIDIA", here.displays(NVIDIA)), ("an AMD", here.unbound(AMD)))
    told = [f"there is {maker} card at {', '.join(cards)} without its driver" for maker, cards in makers if cards]
    return "".join(f"; {words}" for words in told)
