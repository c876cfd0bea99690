"""What this place has, as control groups and sysctls leave it.

A container sees the whole machine's memory and CPUs, and may use less of them. What counts is the least of all limits:
those of our own groups, ours within a container and all above, and those of the engines' slice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vllmd.frozen import frozen

CACHE = ("inactive_file", "active_file")
LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
SERVICE = "vllmd.service"
ENGINES = "vllmd.slice"  # the engines' own limits, where systemd runs


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that could be had now without swapping, of the machine and of each group that counts; None: unknown.

    Of a group the cache of files counts as free: the kernel drops it first.
    """
    _, free = memory_of_machine(root)
    found = [] if free is None else [free]
    found += [left for group in _groups(root, "memory") for left in _left(group)]
    return max(0, min(found)) if found else None


@frozen
class Cpus:
    """``count``: so many may be used at a time, at least 1. ``machine``: so many there are.

    ``quota``: the limit in cores, which no program finds by itself; None: none but the CPUs themselves.
    """

    count: int
    machine: int
    quota: float | None = None

    def within(self, quota: float | None) -> Cpus:
        """The same under a further limit in cores."""
        if quota is None:
            return self
        least = quota if self.quota is None else min(quota, self.quota)
        return Cpus(max(1, min(self.count, math.floor(least))), self.machine, least)


def cpus(root: Path = Path("/"), affinity: int | None = None) -> Cpus:
    """The CPUs that the daemon's engines may use. ``affinity``: how many our own may (by the kernel, if not given)."""
    ours = affinity if affinity is not None else len(os.sched_getaffinity(0))
    sets = [len(list(_numbers(text))) for text in _values(root, "cpuset.cpus.effective", "cpuset") if text]
    quotas = [cores for text in _values(root, "cpu.max", "cpu") if (cores := _cores(text))]
    allowed = min([ours, *(size for size in sets if size)])
    return Cpus(allowed, max(os.cpu_count() or 1, allowed)).within(min(quotas, default=None))


def tasks(root: Path = Path("/")) -> int | None:
    """Processes and threads that there may be at a time; None: no limit is set."""
    limits = [int(text) for text in _values(root, "pids.max", "pids") if text.isdecimal()]
    with suppress(OSError, ValueError):
        limits.append(int((root / "proc/sys/kernel/threads-max").read_text()))
    return min(limits, default=None)


@frozen
class PortLimits:
    """``least``: below it only root may listen. ``outgoing``: from these the kernel takes for outgoing connections.

    ``reserved``: of those the ones that it leaves alone.
    """

    least: int = 1
    outgoing: tuple[int, int] = (0, 0)
    reserved: frozenset[int] = frozenset()

    def taken(self, port: int) -> bool:
        """Whether an outgoing connection of anybody's may have it at any moment."""
        return self.outgoing[0] <= port <= self.outgoing[1] and port not in self.reserved


def port_limits(root: Path = Path("/")) -> PortLimits:
    """As the sysctls of this network namespace say."""
    folder = root / "proc/sys/net/ipv4"
    words = _line(folder / "ip_local_port_range").split()
    first, last = words if len(words) == 2 else ("0", "0")
    try:
        least = int(_line(folder / "ip_unprivileged_port_start") or 1)
        return PortLimits(
            least, (int(first), int(last)), frozenset(_numbers(_line(folder / "ip_local_reserved_ports")))
        )
    except ValueError:
        return PortLimits()


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that the daemon's engines may use: the machine's, or the least limit that is set for them."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(root)])


def memory_of_machine(root: Path = Path("/")) -> tuple[int, int | None]:
    """Bytes that the whole machine has, and those that could be had of it without swapping (None: unknown)."""
    told = {name: kib << 10 for name, kib in _table(root / "proc/meminfo")}
    return told.get("MemTotal:", 0), told.get("MemAvailable:")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without taking from anybody but old pages of files, by our own service's limits as well.

    To it the pages are counted that we have read.
    """
    free = [memory_of_machine(root)[1] or 0]
    top = root / "sys/fs/cgroup"
    for line in _line(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            path = line[3:]
            free += [left for group in {top / path.lstrip("/"), *_upwards(top, path)} for left in _left(group)]
    return max(0, min(free))


def _left(group: Path) -> Iterator[int]:
    """What each limit of a group leaves; pages of files do not count, which it gives back when it must."""
    files = sum(size for name, size in _table(group / "memory.stat") if name in CACHE)
    held = _line(group / "memory.current") or _line(group / "memory.usage_in_bytes")
    for limit in (_line(group / name) for name in LIMITS):
        if limit.isdecimal() and held.isdecimal():
            yield int(limit) - int(held) + files


def _limits(root: Path) -> Iterator[int]:
    """Bytes of each limit that is set."""
    for name in LIMITS:
        for text in _values(root, name, "memory"):
            with suppress(ValueError):  # "max": none
                yield int(text)


def _values(root: Path, name: str, controller: str) -> Iterator[str]:
    """What a file of that name has in each group that counts."""
    yield from (text for group in _groups(root, controller) if (text := _line(group / name)))


def _groups(root: Path, controller: str) -> list[Path]:
    top = root / "sys/fs/cgroup"
    groups = [top / ENGINES]
    for line in _line(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":  # version 2: one tree
            groups += _upwards(top, path)
        elif controller in controllers.split(","):
            groups += _upwards(top / controller, path)
    return groups


def _table(path: Path) -> Iterator[tuple[str, int]]:
    """Lines of a name and a number; what stands behind that does not matter."""
    for words in map(str.split, _line(path).splitlines()):
        if len(words) > 1 and words[1].isdecimal():
            yield words[0], int(words[1])


def _cores(text: str) -> float | None:
    """Of ``cpu.max``: microseconds per period; None for "max"."""
    share, _, period = text.partition(" ")
    return int(share) / int(period or 100_000) if share.isdecimal() and int(share) else None


def _numbers(text: str) -> Iterator[int]:
    """Of a list such as ``0-3,8``; nothing of what is none."""
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            yield from range(int(first), int(last or first) + 1)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """A group and all that it is in. A container's own is the top of what it sees.

    What the daemon's own service may use is nothing to engines, which are not in it.
    """
    group = top / path.lstrip("/")
    if group.name != SERVICE:
        yield group
    for parent in group.parents:
        if not parent.is_relative_to(top):
            return
        yield parent
