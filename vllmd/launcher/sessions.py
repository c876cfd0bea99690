"""Engines without systemd: a session each, and a control group of its own where one may be made.

Used by ``vllmd serve`` in plain containers and on machines without systemd. Nothing else would end an engine that the
launcher lost track of, so its processes are found in three ways: orphans become the launcher's children
(PR_SET_CHILD_SUBREAPER), every process has ``VLLMD_INSTANCE`` and ``VLLMD_SESSION`` in its environment, and the main
process gets SIGTERM if the launcher dies (PR_SET_PDEATHSIG). The next launcher of the same session kills the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.errors import OUT_OF_FILES
from vllmd.launcher.backend import Found, Placed
from vllmd.launcher.cgroup import Cgroup, WatchedCgroup, Watcher, cgroup_of
from vllmd.launcher.logs import Pipes
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.process import PR_SET_CHILD_SUBREAPER, Process, prctl, start_time_of, stat_of
from vllmd.launcher.protocol import StartOrder
from vllmd.launcher.spawn import MARKER

log = logging.getLogger(__name__)

SESSION = "VLLMD_SESSION"
POLL = 0.05  # seconds between two scans for an engine's processes after its main process has ended
REFRESH = 2.0  # seconds between two scans before that, to note all of its processes
_FILES: dict[str, tuple[str, Callable[[int | float | str], str]]] = {
    "memory_max": ("memory.max", str),
    "memory_high": ("memory.high", str),
    "memory_swap_max": ("memory.swap.max", str),
    "cpu_weight": ("cpu.weight", str),
    "cpu_quota": ("cpu.max", lambda cores: f"{int(float(cores) * 100_000)} 100000"),
    "tasks_max": ("pids.max", str),
    "oom_policy": ("memory.oom.group", lambda policy: str(int(policy == "kill"))),
}


class Sessions:
    """A backend. ``token`` marks the processes of this session: those of an earlier launcher are killed."""

    dies_with_us = True
    name = "sessions"

    def __init__(self, loop: Loop, *, token: str, use_cgroups: bool = True) -> None:
        self.logs = Pipes(loop)
        self._loop = loop
        self._token = token
        self.marks = {SESSION: token}
        self._watcher = Watcher(loop)
        self._mains: dict[str, Process] = {}
        self._base = _writable_cgroup() if use_cgroups else None
        controllers = (self._base / "cgroup.subtree_control").read_text().split() if self._base else []
        self.limits = tuple(name for name, (file, _) in _FILES.items() if file.split(".")[0] in controllers)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._clean_up()

    def _clean_up(self) -> None:
        """Kill the processes that an earlier launcher of this session left, by control group and by marker."""
        groups = self._base.glob(f"vllmd-{self._token}-*") if self._base else ()
        for path in groups:
            _kill_all(Cgroup(path).pids)
            with contextlib.suppress(OSError):
                _remove(path)
        _kill_all(lambda: [pid for pid in _processes() if _marked(pid, f"{SESSION}={self._token}")])

    def _path(self, instance: str) -> Path | None:
        return self._base / f"vllmd-{self._token}-{instance}" if self._base else None

    @property
    def detail(self) -> str:
        """One sentence for operators: how engines are run here."""
        where = f"control groups in {self._base}" if self._base else "no control group may be made here"
        return f"no systemd: a session per engine, {where}"

    def place(self, order: StartOrder, process: Process, placed: Placed) -> None:
        """Make a control group for the process, if that is possible; it has made its session itself."""
        self._mains[order.instance] = process
        try:
            group = self._make_cgroup(order, process)
        except OSError as error:
            placed(None, f"cannot make a control group: {error}")
            return
        placed(group or ProcessTree(order.instance, self._token, process, self._loop, order.standby), "")

    def _make_cgroup(self, order: StartOrder, process: Process) -> WatchedCgroup | None:
        path = self._path(order.instance)
        if not path:
            return None
        path.mkdir()
        for name in order.limits.keys() & set(self.limits):
            file, convert = _FILES[name]
            (path / file).write_text(convert(order.limits[name]))
        (path / "cgroup.procs").write_text(str(process.pid))
        return WatchedCgroup(path, self._watcher)

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        """Remove the control group; one that cannot be emptied stays."""
        self._mains.pop(instance, None)
        if path := self._path(instance):
            with contextlib.suppress(OSError):
                _remove(path)
        self.reap_orphans()
        retired()

    def adopt(self) -> Sequence[Found]:
        """Always empty: no engine survives a launcher without systemd."""
        return []

    def reap_orphans(self) -> None:
        """Reap orphans that became our children, but no main process, whose status ``engines`` reads."""
        mains = {process.pid for process in self._mains.values()}
        with contextlib.suppress(ChildProcessError):
            while zombie := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if zombie.si_pid in mains:
                    return  # its status is read first; ``retire`` calls this function again
                os.waitpid(zombie.si_pid, 0)

    def kill_unmanaged(self) -> None:
        """Kill all descendants of the launcher, at its end."""
        _kill_all(lambda: _descendants(os.getpid()))


class ProcessTree:
    """An engine's processes without a control group: descendants, its session, and processes with its marker.

    A process may leave any one of these, and vLLM overwrites its environment with its title. So a process that was
    found once is noted by number and start time.
    """

    def __init__(self, instance: str, token: str, main: Process, loop: Loop, born: str = "") -> None:
        """``born``: the standby that became the main process, whose marker it and its children have."""
        self._markers = tuple(f"{MARKER}={name}" for name in (instance, born) if name)
        self._session = f"{SESSION}={token}"
        self._main = main
        self._main_start = main.start_time
        self._seen: dict[int, int] = {}
        self._notes: dict[str, str] = {}
        self._loop = loop
        self._timer: Timer | None = None

    def location(self) -> str:
        """An engine of this backend has no control group: ""."""
        return ""

    def members(self) -> set[int]:
        """The living processes of the engine. Raises OSError where they cannot be looked for."""
        main_lives = start_time_of(self._main.pid) == self._main_start
        found = {self._main.pid, *_descendants(self._main.pid)} if main_lives else set()
        found |= {pid for pid in _processes() if self._belongs(pid)}
        found |= {pid for pid, start in self._seen.items() if start_time_of(pid) == start}
        found -= {os.getpid()}
        self._seen = {pid: start for pid in found if (start := start_time_of(pid)) is not None and _alive(pid)}
        return set(self._seen)

    def _belongs(self, pid: int) -> bool:
        stat = stat_of(pid)
        in_session = bool(stat and int(stat[3]) == self._main.pid)
        return in_session or any(_marked(pid, marker, self._session) for marker in self._markers)

    def empty(self) -> bool:
        """Whether no process of the session is alive; False where that cannot be read."""
        try:
            return not self.members()
        except OSError:
            return False

    def kill(self) -> None:
        """Send SIGKILL in rounds, until a round finds no process. Raises OSError where none can be found."""
        for _ in range(10):
            members = self.members()
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not members:
                return

    def oom_killed(self) -> bool:
        """Always False: without a control group nothing counts OOM kills."""
        return False

    def watch(self, changed: Callable[[], None]) -> None:
        """Scan at intervals: short ones once the main process has ended, else long ones, to note the processes."""

        def look() -> None:
            ended, wait = False, POLL  # where nothing can be read now, it is looked again soon
            with contextlib.suppress(OSError):
                ended = not _alive(self._main.pid) or start_time_of(self._main.pid) != self._main_start
                if not ended:
                    wait = REFRESH
                    self.members()
            self._timer = self._loop.later(wait, look)
            if ended:
                changed()

        self._timer = self._loop.later(POLL, look)

    def annotate(self, values: Mapping[str, str]) -> None:
        """Note keys and values in memory, as long as the launcher lives."""
        self._notes.update(values)

    def annotations(self) -> dict[str, str]:
        """The keys and values that ``annotate`` has written, kept in memory."""
        return dict(self._notes)

    def close(self) -> None:
        """End the calls that ``watch`` asked for."""
        if self._timer:
            self._timer.cancel()


def _writable_cgroup() -> Path | None:
    """The launcher's own control group, if it may make others in it and move processes there."""
    own = cgroup_of("self")
    if own is None or not os.access(own.path, os.W_OK):
        return None
    probe = own.path / f"vllmd-probe-{os.getpid()}"
    try:
        probe.mkdir()
        child = os.fork()
        if child == 0:
            signal.pause()
        try:
            (probe / "cgroup.procs").write_text(str(child))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            probe.rmdir()
    except OSError:
        return None
    return own.path


def _remove(group: Path) -> None:
    """Remove the group and those below it, the deepest first."""
    for folder, _, _ in os.walk(group, topdown=False):
        os.rmdir(folder)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    stat = stat_of(pid)
    return bool(stat) and stat[0] not in "ZX"


def _marked(pid: int, *markers: str) -> bool:
    """Whether the process's environment has all of these; False if it is gone, or may not be read: another user's.

    Raises OSError for want of a file descriptor.
    """
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        return False
    return all(marker.encode() in variables for marker in markers)


def _descendants(ancestor: int) -> list[int]:
    """Children, their children, and so on, by /proc."""
    children: dict[int, list[int]] = {}
    for pid in _processes():
        if stat := stat_of(pid):
            children.setdefault(int(stat[1]), []).append(pid)
    found: list[int] = []
    generation = children.get(ancestor, [])
    while generation:
        found += generation
        generation = [child for pid in generation for child in children.get(pid, [])]
    return found


def _kill_all(find: Callable[[], Iterable[int]], limit: float = 2.0) -> None:
    """Send SIGKILL in rounds, since a process may have forked, until none is alive or ``limit`` seconds have passed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        victims = [pid for pid in find() if pid != os.getpid() and _alive(pid)]
        if not victims:
            return
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
