"""What this place has, as control groups leave it: a container sees the whole machine's memory, and may use less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ENGINES = "vllmd.slice"  # the engines' own limits, where systemd runs


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that the daemon's engines may use: the machine's, or the least limit that is set for them."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(root)])


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without taking anything from anybody but old pages of files; by our own limits as well."""
    here = [0]
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        here = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    top, groups = root / "sys/fs/cgroup", list[Path]()
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                groups += _upwards(top, line[3:])
    for group in groups:
        for name in ("memory.max", "memory.high"):
            with suppress(OSError, ValueError):
                here.append(int((group / name).read_text()) - _kept(group))
    return max(0, min(here, default=0))


def _kept(group: Path) -> int:
    """Bytes that a group holds and cannot give back: all but the pages of files that are not in use."""
    held = int((group / "memory.current").read_text())
    words = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return held - int(words.get("inactive_file", 0)) - int(words.get("active_file", 0))


def _limits(root: Path) -> Iterator[int]:
    """Those of our own groups, ours within a container and all above, and those of the engines' slice."""
    top = root / "sys/fs/cgroup"
    groups = [top / ENGINES]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":  # version 2: one tree
                groups += _upwards(top, path)
            elif "memory" in controllers.split(","):
                groups += _upwards(top / "memory", path)
    for group in groups:
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max": none
                yield int((group / name).read_text())


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """A group and all that it is in. A container's own is the top of what it sees."""
    group = top / path.lstrip("/")
    yield group
    for parent in group.parents:
        if not parent.is_relative_to(top):
            return
        yield parent
