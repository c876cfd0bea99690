"""A control group per container: two containers in one group would share, and break, one tree."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

KILL_LIMIT = 10.0


def hierarchy() -> Path | None:
    """Where cgroup v2 is mounted, also beside v1 on a hybrid system."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(mount.split()[4])
    return None


def path_of(name: str) -> Path:
    root = hierarchy()
    assert root is not None, "no cgroup v2 hierarchy is mounted"
    return root / name


def create(name: str) -> Path:
    group = path_of(name)
    group.mkdir()
    return group


def populated(group: Path) -> bool:
    return "populated 1" in (group / "cgroup.events").read_text()


def pids(group: Path) -> list[int]:
    """Every process in it and below."""
    return [int(pid) for file in group.rglob("cgroup.procs") for pid in file.read_text().split()]


def kill(group: Path) -> None:
    """SIGKILL every process in it and below, and wait until none is left."""
    (group / "cgroup.kill").write_text("1")
    end = time.monotonic() + KILL_LIMIT
    while populated(group):
        assert time.monotonic() < end, f"processes in {group} outlive SIGKILL"
        time.sleep(0.005)


def remove(group: Path) -> None:
    """Remove the empty group and its subgroups, the deepest first."""
    for child in [path for path in group.iterdir() if path.is_dir()]:
        remove(child)
    with contextlib.suppress(FileNotFoundError):
        group.rmdir()
