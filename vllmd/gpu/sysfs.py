"""AMD's and Intel's devices, by the files of their kernel drivers (amdgpu; xe and i915): no library is needed.

The files have the same figures as amd-smi and xpu-smi; where AMD's library is installed, ``amdsmi`` reads that first.
Memory by process: AMD's compute driver shows it to every user; else it is in each process's fdinfo, which only root and
the process's own user may read. Intel's drivers have no figure for the memory in use on a whole device; the sum over
the processes is used for it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from vllmd.core.types import Device
from vllmd.frozen import frozen
from vllmd.gpu.hwmon import Hwmon
from vllmd.gpu.inventory import Inventory
from vllmd.gpu.sample import DeviceSample, Sample, absurdity
from vllmd.gpu.topology import cpus_of, kfd_links, kfd_nodes, node_of, switch_of
from vllmd.gpu.trouble import Presence, Trouble
from vllmd.gpu.visible import left_of
from vllmd.sizes import GiB

MIN_MEMORY_BYTES = 4 * GiB  # a device with less of its own is a CPU's graphics, which shares the host's memory
_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_SCALE = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_VRAM = ("drm-resident-vram", "drm-memory-vram", "drm-total-vram", "drm-resident-local", "drm-total-local")
BAD = Trouble("", "dmesg has the driver's messages; a reset or a reboot brings the device back")
UNCORRECTED = "{} uncorrectable ECC errors since its driver was loaded: reset it or reboot"
# i915's names of reasons for a slowdown; xe's have another prefix. Power limits are left out: a busy device is always
# at one.
_SLOWDOWNS = ("thermal", "prochot", "vr_thermalert", "vr_tdc", "ratl")


@frozen
class Card:
    """One device of the kernel: its folder in /sys/class/drm, and its address on the PCI bus."""

    folder: Path
    address: str

    def text(self, name: str) -> str:
        """The text of a file of the device; "" if there is none, or it cannot be read now."""
        try:
            return (self.folder / "device" / name).read_text().strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """The number in a file of the device, None without one. Raises OSError if the file cannot be read."""
        path = self.folder / "device" / name
        if not path.exists():
            return None
        try:
            return int(path.read_text())
        except ValueError:
            return None

    @property
    def sensors(self) -> Hwmon:
        """The driver's hwmon folder of the device."""
        return Hwmon(self.folder / "device/hwmon")


def cards(here: Presence, drivers: tuple[str, ...]) -> list[Card]:
    """The cards that one of these drivers is bound to, in the order of the PCI bus."""
    found = []
    for folder in (here.root / "sys/class/drm").glob("card*"):
        if folder.name[4:].isdecimal():
            device = (folder / "device").resolve()
            try:
                driver = Path(os.readlink(device / "driver")).name
            except OSError:
                continue
            if driver in drivers:
                found.append(Card(folder, device.name))
    return sorted(found, key=lambda card: card.address)


class SysfsDevices(Inventory):
    """The devices of one vendor. ``problems``: cards that could not be read. ``env``: the daemon's own environment."""

    readable = True
    source: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    drivers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int]) -> None:
        self._here = here
        self._cards: dict[int, Card] = {}
        self._energy: dict[int, tuple[float, float]] = {}  # index -> seconds and joules of the last reading
        self.problems: list[str] = []
        self.hidden = False  # the environment leaves none of the devices
        notes: list[str] = []
        devices: list[Device] = []
        found = self.ordered(cards(here, self.drivers))
        left = left_of(self.runtime, env, [self.id_of(card) for card in found])
        for place, card in enumerate(found):
            try:
                memory = self.memory(card)
            except (OSError, ValueError) as error:
                why = (error.strerror if isinstance(error, OSError) else "") or error
                self.problems.append(f"the device at {card.address} cannot be read: {why}")
                continue
            if not memory or memory < MIN_MEMORY_BYTES:
                own = f"{(memory or 0) / GiB:.1f} GiB of memory of its own"
                notes.append(f"the device at {card.address} is left out: it has {own}")
                continue
            if place not in left.numbers:
                self.hidden = True
                continue
            taken = {device.index for device in devices} | set(known.values())
            id = self.id_of(card)
            index = known.get(id, place if place not in taken else max(taken) + 1)
            number = left.numbers[place] if self.counted(card) else None
            devices.append(self._device(index, card, memory, reserve, number))
            self._cards[index] = card
        self.hidden = self.hidden and not devices
        notes = [note for note in (*notes, left.note, *self.problems) if note]
        super().__init__(tuple(self._linked(devices)), (f"driver {'/'.join(self.drivers)}", *notes))

    def _device(self, index: int, card: Card, memory: int, reserve: int, number: int | None) -> Device:
        name = card.text("product_name") or f"{self.source} {card.address}"
        root = self._here.root
        node = node_of(root, card.address)
        return Device(index, self.id_of(card), memory, reserve, name, self.runtime, number,
                      node=node, switch=switch_of(root, card.address), cpus=cpus_of(root, node), read=True)  # fmt: skip

    def _linked(self, devices: list[Device]) -> Iterator[Device]:
        """Each device with the others that its links reach."""
        links = self.links()
        index_at = {self._cards[device.index].address: device.index for device in devices}
        for device in devices:
            reached = links.get(self._cards[device.index].address, frozenset())
            yield replace(device, links=frozenset(index_at[address] for address in reached if address in index_at))

    def links(self) -> Mapping[str, frozenset[str]]:
        """Address -> addresses of the cards at its links; empty if the vendor's links are not known."""
        return {}

    def counted(self, card: Card) -> bool:
        """Whether the vendor's runtime certainly counts the card at its place."""
        return True

    def ordered(self, found: list[Card]) -> list[Card]:
        """The cards in the order in which the vendor's runtime counts them."""
        return found

    def id_of(self, card: Card) -> str:
        """An id that stays the same over a reboot."""
        return card.address

    def memory(self, card: Card) -> int | None:
        """Bytes of the card's own memory; None if there is no figure. Raises OSError, ValueError."""
        raise NotImplementedError

    def used(self, card: Card, held: int) -> int:
        """Bytes in use; ``held``: by the processes that can be seen. Raises OSError, ValueError."""
        raise NotImplementedError

    def tells_use(self, card: Card) -> bool:
        """Whether ``used`` is a figure of the device, not the sum over the processes that can be seen."""
        return True

    def fault(self, card: Card) -> str:
        """Why the card should not be used although it answers; "" if it may."""
        return ""

    def slowdown(self, card: Card) -> str:
        """Why the card is slowed down, by heat for example; "" if it is not, or this is not known."""
        return card.sensors.overheated()

    def watts(self, index: int, card: Card) -> float | None:
        """Power: the driver's figure, or from its counter of joules since the last reading; None without either."""
        power = card.sensors.watts()
        if power is not None:
            return power
        joules, now, before = card.sensors.joules(), time.monotonic(), self._energy.get(index)
        if joules is None:
            return None
        self._energy[index] = now, joules
        if before is None or now <= before[0] or joules < before[1]:
            return None
        return (joules - before[1]) / (now - before[0])

    def busy(self, card: Card) -> float | None:
        """Utilisation in per cent; None if there is no figure."""
        percent = card.text("gpu_busy_percent")
        return float(percent) if percent.isdecimal() else None

    def celsius(self, card: Card) -> float | None:
        """The temperature of the card's hottest sensor; None without one."""
        return card.sensors.celsius()

    def sample(self) -> Sample:
        """Read every device; never raises."""
        devices: dict[int, DeviceSample] = {}
        failed: dict[int, str] = {}
        lost: dict[int, str] = {}
        ill: dict[int, str] = {}
        seen, blind = self._processes()
        for device in self._inventory:
            card = self._cards[device.index]
            held = seen.get(card.address, {})
            try:
                devices[device.index] = self._read(device, card, held, blind)
            except (OSError, ValueError) as error:
                failed[device.index] = str(Trouble(f"{card.address}: {error}", BAD.remedy))
                if not (card.folder / "device").exists():
                    lost[device.index] = f"{card.address} is not on the bus any more"
            else:
                if why := self.fault(card):
                    ill[device.index] = why
        return Sample(devices, failed, ill, lost)

    def _read(self, device: Device, card: Card, held: dict[int, int], blind: bool) -> DeviceSample:
        """Read one device. Raises OSError, ValueError if its memory cannot be read."""
        total = self.memory(card) or 0
        used = max(self.used(card, sum(held.values())), 0)
        wrong = absurdity(total, used, max(0, total - used), device.memory)
        if wrong:
            raise ValueError(wrong)
        hidden = blind and (not self.tells_use(card) or used > sum(held.values()) + (64 << 20))
        return DeviceSample(
            total, used, total - used, held, frozenset(), hidden, device.name, self.watts(device.index, card),
            self.busy(card), self.celsius(card), self.slowdown(card),
        )  # fmt: skip

    def _processes(self) -> tuple[dict[str, dict[int, int]], bool]:
        """PCI address -> pid -> bytes, and whether some processes could not be read."""
        return from_fdinfo(self._here.root / "proc")


class AmdDevices(SysfsDevices):
    """AMD's devices, as the driver amdgpu shows them in sysfs."""

    source, runtime, drivers = "amdgpu", "hip", ("amdgpu",)

    def ordered(self, found: list[Card]) -> list[Card]:
        """ROCm counts in the order of the compute driver's nodes."""
        nodes = list(kfd_nodes(self._here.root).values())
        return sorted(found, key=lambda card: nodes.index(card.address) if card.address in nodes else len(nodes))

    def id_of(self, card: Card) -> str:
        unique = card.text("unique_id")
        return f"GPU-{unique.removeprefix('0x').lower()}" if unique else card.address

    def memory(self, card: Card) -> int | None:
        return card.number("mem_info_vram_total")

    def used(self, card: Card, held: int) -> int:
        used = card.number("mem_info_vram_used")
        return held if used is None else used

    def counted(self, card: Card) -> bool:
        """ROCm has only the cards of its compute driver; if there is none, all cards are assumed to be counted."""
        nodes = kfd_nodes(self._here.root).values()
        return card.address in nodes or not nodes

    def links(self) -> Mapping[str, frozenset[str]]:
        return kfd_links(self._here.root)

    def fault(self, card: Card) -> str:
        """Uncorrectable errors by the counters of the memory controller, ``ue: 2`` and ``ce: 17``."""
        counters = dict(line.split(":", 1) for line in card.text("ras/umc_err_count").splitlines() if ":" in line)
        errors = counters.get("ue", "").strip()
        return UNCORRECTED.format(errors) if errors.isdecimal() and int(errors) else ""

    def _processes(self) -> tuple[dict[str, dict[int, int]], bool]:
        seen, blind = super()._processes()
        computing = from_kfd(self._here.root)
        for address, sizes in computing.items():
            seen[address] = {**seen.get(address, {}), **sizes}
        return seen, blind and not computing


class IntelDevices(SysfsDevices):
    """xe's and i915's cards with memory of their own."""

    source, runtime, drivers = "intel", "xpu", ("xe", "i915")

    def memory(self, card: Card) -> int | None:
        """The driver's figure; else the size of the PCI window to it, which has all of it with a resizable BAR."""
        for path in (card.folder / "device/tile0/physical_vram_size_bytes", card.folder / "lmem_total_bytes"):
            if path.exists():
                return int(path.read_text(), 0)
        return _window(card.text("resource"))

    def slowdown(self, card: Card) -> str:
        names = [*(card.folder / "gt").glob("gt*"), *(card.folder / "device").glob("tile*/gt*/freq*/throttle")]
        reasons = [
            reason.replace("_", " ")
            for reason in _SLOWDOWNS
            if any(_file(folder / f"{kind}_{reason}") for folder in names for kind in ("throttle_reason", "reason"))
        ]
        return ", ".join(reasons) or super().slowdown(card)

    def tells_use(self, card: Card) -> bool:
        return (card.folder / "lmem_avail_bytes").exists()

    def used(self, card: Card, held: int) -> int:
        total, free = _file(card.folder / "lmem_total_bytes"), _file(card.folder / "lmem_avail_bytes")
        return held if total is None or free is None else total - free


def from_kfd(root: Path) -> dict[str, dict[int, int]]:
    """PCI address -> pid -> bytes, by AMD's compute driver, for processes of every user."""
    addresses = kfd_nodes(root)
    seen: dict[str, dict[int, int]] = {}
    for path in (root / "sys/class/kfd/kfd/proc").glob("*/vram_*"):
        address = addresses.get(path.name.removeprefix("vram_"))
        size = _file(path)
        if address and size and path.parent.name.isdecimal():
            seen.setdefault(address, {})[int(path.parent.name)] = size
    return seen


def from_fdinfo(proc: Path) -> tuple[dict[str, dict[int, int]], bool]:
    """PCI address -> pid -> bytes, by the fdinfo of open files, and whether some processes could not be read."""
    seen: dict[str, dict[int, int]] = {}
    blind = False
    for folder in proc.glob("[0-9]*"):
        try:
            for address, size in _of_process(folder):
                sizes = seen.setdefault(address, {})
                sizes[int(folder.name)] = sizes.get(int(folder.name), 0) + size
        except PermissionError:
            blind = True
        except (OSError, ValueError):
            continue  # the process has ended
    return seen, blind


def _of_process(folder: Path) -> Iterator[tuple[str, int]]:
    """PCI address and bytes of each client of a graphics driver, once for all files that it has open."""
    clients = set()
    for path in (folder / "fdinfo").iterdir():
        lines = path.read_text().splitlines()
        fields = dict(part for line in lines if len(part := line.split(":", 1)) == 2)
        address, client = fields.get("drm-pdev", "").strip(), fields.get("drm-client-id", "").strip()
        if address and (address, client) not in clients:
            clients.add((address, client))
            yield address, _vram(fields)


def _vram(fields: Mapping[str, str]) -> int:
    """The sum over the client's regions; drivers have different names for them."""
    for prefix in _VRAM:
        sizes = [match for name, value in fields.items() if name.startswith(prefix) and (match := _SIZE.search(value))]
        if sizes:
            return sum(int(match[1]) * _SCALE[match[2]] for match in sizes)
    return 0


def _file(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _window(resource: str) -> int | None:
    """The size of BAR 2, as the kernel lists it: first address, last address, flags."""
    lines = [line.split() for line in resource.splitlines()]
    if len(lines) < 3 or len(lines[2]) < 2:
        return None
    first, last = int(lines[2][0], 16), int(lines[2][1], 16)
    return last - first + 1 if last > first else None
