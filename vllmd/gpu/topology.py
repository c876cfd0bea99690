"""Links between devices, their PCIe switches and NUMA nodes, by sysfs; ``root`` is the directory of /sys."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

XGMI = 11  # of the types of links in the compute driver's topology
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def node_of(root: Path, address: str) -> int | None:
    """The NUMA node of a PCI device; None where the machine has only one, or does not tell."""
    try:
        node = int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def switch_of(root: Path, address: str) -> str:
    """The PCIe root port above a device; "" if that is not known.

    A root port has one link, so devices below the same one share a switch there, and talk through it alone.
    """
    try:
        path = (root / "sys/bus/pci/devices" / address).resolve(strict=True)
    except OSError:
        return ""
    ports = [part for part in path.parts if _ADDRESS.fullmatch(part)]
    return ports[0] if len(ports) > 1 else ""


def cpus_of(root: Path, node: int | None) -> tuple[int, ...]:
    """The CPUs of a NUMA node; none if that is not told, or all of the machine's are."""
    lists: dict[str, tuple[int, ...]] = {}
    for path in (root / "sys/devices/system/node").glob("node*/cpulist"):
        try:
            lists[path.parent.name] = tuple(listed(path.read_text()))
        except (OSError, ValueError):
            continue
    with_cpus = {name: cpus for name, cpus in lists.items() if cpus}
    return with_cpus.get(f"node{node}", ()) if len(with_cpus) > 1 else ()


def listed(text: str) -> Iterator[int]:
    """The numbers of a list such as ``0-3,8``. Raises ValueError."""
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)


def kfd_nodes(root: Path) -> dict[str, str]:
    """PCI address by gpu_id, in the order of AMD's compute driver, in which ROCm counts."""
    return dict(_kfd(root).values())


def kfd_links(root: Path) -> Mapping[str, frozenset[str]]:
    """PCI addresses that each is joined with by AMD's own links, by address."""
    nodes = _kfd(root)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for number, (_, address) in nodes.items():
        for path in (root / f"sys/class/kfd/kfd/topology/nodes/{number}/io_links").glob("*/properties"):
            told = _properties(path)
            other = nodes.get(told.get("node_to", -1))
            if told.get("type") == XGMI and other:
                found[address].add(other[1])
    return {address: frozenset(others) for address, others in found.items()}


def _kfd(root: Path) -> dict[int, tuple[str, str]]:
    """gpu_id and PCI address by the number of the node; the CPUs' nodes are left out."""
    found: dict[int, tuple[str, str]] = {}
    for folder in (root / "sys/class/kfd/kfd/topology/nodes").glob("*"):
        try:
            gpu = (folder / "gpu_id").read_text().strip()
        except OSError:
            continue
        if gpu not in ("", "0") and folder.name.isdecimal():
            told = _properties(folder / "properties")
            place = told.get("location_id", 0)
            address = f"{told.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
            found[int(folder.name)] = (gpu, address)
    return dict(sorted(found.items()))


def _properties(path: Path) -> dict[str, int]:
    """A file of words and numbers; what is none is left out."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}
