"""AMD's and Intel's devices, by the files of their kernel drivers (amdgpu; xe and i915): no library is needed.

What the files tell is what amd-smi and xpu-smi tell, too. Whose memory it is AMD's compute driver says for everybody to
read; else each process says it in its fdinfo, which only root and the process's own user may read. Intel's drivers have
no figure for what is used on the whole device, so there the sum over the processes stands for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from vllmd.core.types import Device, GiB
from vllmd.gpu.inventory import Inventory, Unanswered
from vllmd.gpu.sample import DeviceSample, Sample, absurdity
from vllmd.gpu.trouble import Presence, Trouble

LEAST = 4 * GiB  # of memory of its own: what has less is a CPU's own graphics, which shares the host's
_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_SCALE = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_VRAM = ("drm-resident-vram", "drm-memory-vram", "drm-total-vram", "drm-resident-local", "drm-total-local")
D = TypeVar("D", bound="SysfsDevices")
_BAD = Trouble("", "dmesg says what the driver met; a reset or a reboot brings the device back")


@dataclass(frozen=True, slots=True)
class Card:
    """One device as the kernel has it: its folder in /sys/class/drm, and its address on the PCI bus."""

    folder: Path
    address: str

    def text(self, name: str) -> str:
        """A file of the device; "" where there is none, or it cannot be read now."""
        try:
            return (self.folder / "device" / name).read_text().strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """A file of the device that has one number. Raises OSError if it is there and cannot be read."""
        path = self.folder / "device" / name
        if not path.exists():
            return None
        try:
            return int(path.read_text())
        except ValueError:
            return None

    def watts(self) -> float | None:
        """From hwmon, which has microwatts."""
        for path in sorted((self.folder / "device/hwmon").glob("hwmon*/power1_*")):
            if path.name in ("power1_average", "power1_input"):
                try:
                    return int(path.read_text()) / 1e6
                except (OSError, ValueError):
                    continue
        return None


def cards(here: Presence, drivers: tuple[str, ...]) -> list[Card]:
    """Those that one of these drivers has taken, in the order of the PCI bus."""
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
    """The devices of one maker. ``problems``: cards that could not be read."""

    readable = True
    source: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    drivers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, reserve: int, here: Presence, known: Mapping[str, int]) -> None:
        self._here = here
        self._cards: dict[int, Card] = {}
        self.problems: list[str] = []
        notes: list[str] = []
        devices: list[Device] = []
        for number, card in enumerate(self.ordered(cards(here, self.drivers))):
            try:
                memory = self.memory(card)
            except OSError as error:
                self.problems.append(f"the device at {card.address} cannot be read: {error.strerror}")
                continue
            if not memory or memory < LEAST:
                own = f"{(memory or 0) / GiB:.1f} GiB of memory of its own"
                notes.append(f"the device at {card.address} is left out: it has {own}")
                continue
            name = card.text("product_name") or f"{self.source} {card.address}"
            id = self.id_of(card)
            taken = {device.index for device in devices} | set(known.values())
            index = known.get(id, number if number not in taken else max(taken) + 1)
            node = card.number("numa_node")
            devices.append(Device(index, id, memory, reserve, name, self.runtime, number,
                                  node=node if node is not None and node >= 0 else None))  # fmt: skip
            self._cards[index] = card
        super().__init__(tuple(devices), (f"driver {'/'.join(self.drivers)}", *notes, *self.problems))

    def ordered(self, found: list[Card]) -> list[Card]:
        """As the maker's runtime counts them."""
        return found

    def id_of(self, card: Card) -> str:
        """What stays the same over a reboot."""
        return card.address

    def memory(self, card: Card) -> int | None:
        """Bytes of its own; None where it does not tell. Raises OSError."""
        raise NotImplementedError

    def used(self, card: Card, held: int) -> int:
        """Bytes in use; ``held``: by the processes that could be seen. Raises OSError, ValueError."""
        raise NotImplementedError

    def sample(self) -> Sample:
        """Read every device; never raises."""
        devices: dict[int, DeviceSample] = {}
        failed: dict[int, str] = {}
        lost: dict[int, str] = {}
        seen, blind = self._processes()
        for device in self._inventory:
            card = self._cards[device.index]
            held = seen.get(card.address, {})
            try:
                total = self.memory(card) or 0
                used = max(self.used(card, sum(held.values())), 0)
                wrong = absurdity(total, used, max(0, total - used), device.memory)
                if wrong:
                    raise ValueError(wrong)
            except (OSError, ValueError) as error:
                failed[device.index] = str(Trouble(f"{card.address}: {error}", _BAD.cure))
                if not (card.folder / "device").exists():
                    lost[device.index] = f"{card.address} is not on the bus any more"
                continue
            busy = card.text("gpu_busy_percent")
            hidden = blind and used > sum(held.values()) + (64 << 20)
            devices[device.index] = DeviceSample(
                total, used, total - used, held, frozenset(), hidden, device.name, card.watts(),
                float(busy) if busy.isdecimal() else None,
            )  # fmt: skip
        return Sample(devices, failed, {}, lost)

    def _processes(self) -> tuple[dict[str, dict[int, int]], bool]:
        """Bytes by PCI address and pid, and whether some processes could not be asked."""
        return from_fdinfo(self._here.root / "proc")


class AmdDevices(SysfsDevices):
    """AMD's devices, as the driver amdgpu shows them in sysfs."""

    source, runtime, drivers = "amdgpu", "hip", ("amdgpu",)

    def ordered(self, found: list[Card]) -> list[Card]:
        """ROCm counts the nodes of its compute driver."""
        nodes = list(kfd_nodes(self._here.root).values())
        return sorted(found, key=lambda card: nodes.index(card.address) if card.address in nodes else len(nodes))

    def id_of(self, card: Card) -> str:
        unique = card.text("unique_id")
        return f"GPU-{unique.removeprefix('0x').lower()}" if unique else card.address

    def memory(self, card: Card) -> int | None:
        return card.number("mem_info_vram_total")

    def used(self, card: Card, held: int) -> int:
        told = card.number("mem_info_vram_used")
        return held if told is None else told

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
        """As the driver says; else the window on the bus by which the CPU reaches all of it, where that is as large."""
        told = card.text("tile0/physical_vram_size_bytes")
        if told:
            return int(told, 0)
        total = _file(card.folder / "lmem_total_bytes")
        return total if total is not None else _window(card.text("resource"))

    def used(self, card: Card, held: int) -> int:
        total, free = _file(card.folder / "lmem_total_bytes"), _file(card.folder / "lmem_avail_bytes")
        return held if total is None or free is None else total - free


def amd(reserve: int, here: Presence, known: Mapping[str, int]) -> AmdDevices | Unanswered | None:
    """AMD's devices; None if there are none."""
    return _answer(AmdDevices(reserve, here, known))


def intel(reserve: int, here: Presence, known: Mapping[str, int]) -> IntelDevices | Unanswered | None:
    """Intel's devices; None if there are none."""
    return _answer(IntelDevices(reserve, here, known))


def _answer(devices: D) -> D | Unanswered | None:
    if devices.inventory():
        return devices
    if devices.problems:
        return Unanswered(devices.source, Trouble("; ".join(devices.problems), _BAD.cure))
    return None


def kfd_nodes(root: Path) -> dict[str, str]:
    """PCI address by gpu_id, in the compute driver's order."""
    found: dict[int, tuple[str, str]] = {}
    for folder in (root / "sys/class/kfd/kfd/topology/nodes").glob("*"):
        try:
            gpu = (folder / "gpu_id").read_text().strip()
            lines = (line.split() for line in (folder / "properties").read_text().splitlines())
            told = {words[0]: int(words[1]) for words in lines if len(words) == 2}
        except (OSError, ValueError):
            continue
        if gpu not in ("", "0"):
            place = told.get("location_id", 0)
            address = f"{told.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
            found[int(folder.name)] = (gpu, address)
    return {gpu: address for _, (gpu, address) in sorted(found.items())}


def from_kfd(root: Path) -> dict[str, dict[int, int]]:
    """Bytes by PCI address and pid, as AMD's compute driver tells everybody."""
    addresses = kfd_nodes(root)
    seen: dict[str, dict[int, int]] = {}
    for path in (root / "sys/class/kfd/kfd/proc").glob("*/vram_*"):
        address = addresses.get(path.name.removeprefix("vram_"))
        size = _file(path)
        if address and size and path.parent.name.isdecimal():
            seen.setdefault(address, {})[int(path.parent.name)] = size
    return seen


def from_fdinfo(proc: Path) -> tuple[dict[str, dict[int, int]], bool]:
    """Bytes by PCI address and pid, as the processes' open files tell; and whether some could not be asked."""
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
            continue  # it went away while we looked
    return seen, blind


def _of_process(folder: Path) -> Iterator[tuple[str, int]]:
    """Each client of a graphics driver once, however many files it has open."""
    clients = set()
    for path in (folder / "fdinfo").iterdir():
        lines = path.read_text().splitlines()
        told = dict(part for line in lines if len(part := line.split(":", 1)) == 2)
        address, client = told.get("drm-pdev", "").strip(), told.get("drm-client-id", "").strip()
        if address and (address, client) not in clients:
            clients.add((address, client))
            yield address, _vram(told)


def _vram(told: Mapping[str, str]) -> int:
    """The sum over its regions, by the first of the names under which drivers tell it."""
    for prefix in _VRAM:
        sizes = [match for name, value in told.items() if name.startswith(prefix) and (match := _SIZE.search(value))]
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
