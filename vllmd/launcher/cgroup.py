"""A control group (v2): its processes, whether it is empty, killing all of them, and the attributes written on it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from vllmd.launcher.loop import Loop
from vllmd.launcher.process import GONE

log = logging.getLogger(__name__)

_XATTR = "user.vllmd."
_IN_MODIFY = 0x2
LOOK = 0.2  # seconds


class Cgroup:
    """The group at ``path``. systemd removes it as soon as it is empty: a missing one is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._oom_kills = 0

    def empty(self) -> bool:
        """Whether no process is in the group or below it; False where that cannot be read. A zombie does not count."""
        try:
            return "populated 0" in (self.path / "cgroup.events").read_text()
        except OSError as error:
            return error.errno in GONE

    def pids(self) -> list[int]:
        """The ids of the processes in the group and below it. Raises OSError where they cannot be read."""
        found = []
        for folder, _, _ in os.walk(self.path, onerror=_raise_unless_gone):
            try:
                found += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
            except OSError as error:
                _raise_unless_gone(error)
        return found

    def kill(self) -> None:
        """Send SIGKILL to all of them at once; before Linux 5.14, to each until none is left.

        Raises OSError where that cannot be: for want of a file descriptor, say.
        """
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            self._kill_each()

    def _kill_each(self) -> None:
        for _ in range(10):  # a process may fork meanwhile; its child is killed in the next round
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def oom_killed(self) -> bool:
        """Whether the kernel has killed one of them for memory, by the last reading before the group was removed."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.path / "memory.events").read_text().splitlines()
            self._oom_kills = int(dict(line.split() for line in lines).get("oom_kill", 0))
        return self._oom_kills > 0

    def annotate(self, values: Mapping[str, str]) -> None:
        """Write extended attributes ``user.vllmd.KEY``. Raises OSError (before Linux 5.7 there are none)."""
        for key, value in values.items():
            os.setxattr(self.path, _XATTR + key, value.encode())

    def annotations(self) -> dict[str, str]:
        """The keys and values that ``annotate`` wrote; empty where there are none. Raises OSError."""
        found = {}
        try:
            for name in os.listxattr(self.path):
                if name.startswith(_XATTR):
                    found[name.removeprefix(_XATTR)] = os.getxattr(self.path, name).decode(errors="replace")
        except OSError as error:
            if error.errno not in {*GONE, errno.ENOTSUP, errno.ENODATA}:
                raise
        return found


def _raise_unless_gone(error: OSError) -> None:
    if error.errno not in GONE:
        raise error


@functools.cache
def hierarchy() -> Path | None:
    """The mount point of cgroup v2, also beside v1 on a hybrid system; None if there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(mount.split()[4])
    return None


def cgroup_of(pid: int | str) -> Cgroup | None:
    """The group of a process; None if it is gone or there is no cgroup v2. Raises OSError if unknown."""
    root = hierarchy()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        _raise_unless_gone(error)
        return None
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return Cgroup(root / paths[0]) if root and paths else None


class Watcher:
    """inotify on the groups' event files, which change when a group becomes empty or has an OOM kill.

    The number of inotify instances and watches per user is limited, and other programs use them, too: groups that
    cannot be watched are polled every ``LOOK`` seconds.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._unwatched: dict[int, Callable[[], None]] = {}  # by numbers below zero, which no watch has
        self._looking = False
        if self._fd >= 0:
            loop.watch(self._fd, self._read)
        else:
            log.warning(
                "no inotify (%s): engines' cgroups are polled every %g s", os.strerror(ctypes.get_errno()), LOOK
            )

    def add(self, cgroup: Cgroup, changed: Callable[[], None]) -> list[int]:
        """Call ``changed`` at every change. Returns the watches for ``remove``; none for a group that is gone."""
        watches, refused = [], self._fd < 0
        for name in ("cgroup.events", "memory.events"):
            path = os.fsencode(cgroup.path / name)
            if (watch := int(self._libc.inotify_add_watch(self._fd, path, _IN_MODIFY))) >= 0:
                self._callbacks[watch] = changed
                watches.append(watch)
            else:
                refused |= ctypes.get_errno() in (errno.ENOSPC, errno.ENOMEM)
        if refused:
            watches.append(min(self._unwatched, default=0) - 1)
            self._unwatched[watches[-1]] = changed
            self._keep_looking()
        return watches

    def _keep_looking(self) -> None:
        if self._unwatched and not self._looking:
            self._looking = True
            self._loop.later(LOOK, self._look)

    def _look(self) -> None:
        self._looking = False
        for changed in tuple(self._unwatched.values()):
            changed()
        self._keep_looking()

    def remove(self, watches: list[int]) -> None:
        """End the calls of these watches; the kernel may have removed a watch with its file."""
        for watch in watches:
            if self._unwatched.pop(watch, None):
                continue
            self._callbacks.pop(watch, None)
            self._libc.inotify_rm_watch(self._fd, watch)

    def _read(self) -> None:
        data, offset = os.read(self._fd, 65536), 0
        changed = []
        while offset < len(data):
            watch, _, _, length = struct.unpack_from("iIII", data, offset)
            offset += 16 + length
            changed.append(self._callbacks.get(watch))
        for callback in {callback for callback in changed if callback}:
            callback()


class WatchedCgroup(Cgroup):
    """A cgroup whose changes are reported: the ``Group`` of both backends."""

    def __init__(self, path: Path, watcher: Watcher) -> None:
        super().__init__(path)
        self._watcher = watcher
        self._watches: list[int] = []

    def location(self) -> str:
        """The group's directory, an absolute path."""
        return str(self.path)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` at every change of the group's event files."""
        self._watches = self._watcher.add(self, changed)

    def close(self) -> None:
        """End the calls that ``watch`` asked for."""
        self._watcher.remove(self._watches)
        self._watches = []
