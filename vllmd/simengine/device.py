"""A pretended GPU: a file that says how much memory there is and who holds how much.

The file is one JSON object, padded with spaces::

    {"memory": 25769803776, "held": [{"pid": 4711, "start": 812345, "bytes": 1073741824}], "lost": 0}

``memory`` and ``bytes`` are bytes; ``start`` is the process's start time (field
22 of ``/proc/PID/stat``), so that a reused pid is not taken for the holder. What
a dead process held is free: readers leave it out, the next writer removes it.
``lost`` bytes belong to nobody, as on a device whose driver did not take them back.
Readers hold a shared flock, writers an exclusive one, and a writer replaces
the content with one write, so a SIGKILL leaves no torn file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
_SIZE = 4096  # one page: a single write of it is never seen half done


class OutOfDeviceMemory(Exception):
    """The device has not enough free memory. Figures in bytes."""

    def __init__(self, wanted: int, free: int, memory: int) -> None:
        super().__init__(f"{wanted} bytes wanted, {free} of {memory} free")
        self.wanted, self.free, self.memory = wanted, free, memory


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What a pretended GPU holds now, in bytes; ``processes`` is pid -> bytes, ``lost`` nobody's."""

    memory: int
    processes: dict[int, int]
    lost: int = 0

    @property
    def used(self) -> int:
        return sum(self.processes.values()) + self.lost

    @property
    def free(self) -> int:
        return self.memory - self.used


def make_device(path: str | Path, memory: int, mode: int = 0o666) -> Path:
    """Make a pretended GPU of ``memory`` bytes, or leave the one that is there as it is.

    ``mode`` lets engines of another user write it.
    """
    path = Path(path)
    create = 0 if path.exists() else os.O_CREAT  # O_CREAT on another user's file in /tmp is refused by the kernel
    with _locked(path, os.O_RDWR | create, fcntl.LOCK_EX) as fd:
        if os.fstat(fd).st_size == 0:  # looked at under the lock: two engines may come at once
            os.fchmod(fd, mode)
            _write(fd, {"memory": memory, "held": []})
    return path


def device_usage(path: str | Path) -> DeviceUsage:
    """The processes that hold the pretended GPU now. Raises OSError if there is none, ValueError if it is not one."""
    with _locked(Path(path), os.O_RDONLY, fcntl.LOCK_SH) as fd:
        return _usage(_read(fd))


class FakeGpu:
    """One process's hold on a pretended GPU."""

    def __init__(self, path: str | Path, pid: int | None = None) -> None:
        self.path = Path(path)
        self.pid = os.getpid() if pid is None else pid

    @property
    def memory(self) -> int:
        """Bytes the device has in all."""
        return device_usage(self.path).memory

    def hold(self, size: int) -> None:
        """Hold ``size`` bytes from now on, instead of what was held. Raises OutOfDeviceMemory, changing nothing."""
        with _locked(self.path, os.O_RDWR, fcntl.LOCK_EX) as fd:
            content = _read(fd)
            others = [entry for entry in content["held"] if entry["pid"] != self.pid and _alive(entry)]
            free = content["memory"] - sum(entry["bytes"] for entry in others) - content.get("lost", 0)
            if size > free:
                raise OutOfDeviceMemory(size, free, content["memory"])
            mine = [{"pid": self.pid, "start": _start_time(self.pid), "bytes": size}] if size else []
            _write(fd, {**content, "held": others + mine})

    def lose(self, size: int) -> None:
        """Have ``size`` bytes belong to nobody from now on; 0 gives them back."""
        with _locked(self.path, os.O_RDWR, fcntl.LOCK_EX) as fd:
            _write(fd, {**_read(fd), "lost": size})

    def check(self, size: int) -> None:
        """Raise OutOfDeviceMemory if ``size`` bytes could not be held now."""
        usage = device_usage(self.path)
        free = usage.free + usage.processes.get(self.pid, 0)
        if size > free:
            raise OutOfDeviceMemory(size, free, usage.memory)


@contextlib.contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a FIFO in its place must not make anybody wait
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a pretended GPU: no regular file")
        fcntl.flock(fd, lock)
        yield fd
    finally:
        os.close(fd)


def _read(fd: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(fd, 1 << 20, 0))
    except RecursionError:
        raise ValueError("not a pretended GPU: nested too deep") from None
    if not isinstance(content, dict) or not isinstance(content.get("memory"), int):
        raise ValueError("not a pretended GPU: no object with an integer 'memory'")
    return content


def _write(fd: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    size = max(_SIZE, os.fstat(fd).st_size, len(data))
    os.pwrite(fd, data.ljust(size), 0)


def _usage(content: dict[str, Any]) -> DeviceUsage:
    processes: dict[int, int] = {}
    for entry in filter(_alive, content["held"]):
        processes[entry["pid"]] = processes.get(entry["pid"], 0) + entry["bytes"]
    return DeviceUsage(content["memory"], processes, content.get("lost", 0))


def _alive(entry: dict[str, Any]) -> bool:
    began = _start_time(entry["pid"])
    return _hidden(entry["pid"]) if began is None else bool(began == entry["start"])


def _hidden(pid: int) -> bool:
    """Whether it runs although /proc does not show it (hidepid, systemd's ProtectProc=): then its start is unknown."""
    if (PROC / str(pid)).exists():
        return False  # a zombie
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return False
    try:
        return not select.select([fd], [], [], 0)[0]  # a pidfd is readable once its process has ended
    finally:
        os.close(fd)


def _start_time(pid: int) -> int | None:
    """The process's start time in clock ticks; None if it is gone or a zombie, whose memory is free."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
