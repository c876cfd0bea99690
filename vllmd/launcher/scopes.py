"""Engines in transient scopes of systemd, on the system bus or a user's; ``bus`` makes the calls.

A scope is ``vllmd-model-INSTANCE.scope`` in ``vllmd.slice``, with

* ``PartOf=vllmd.service``: ``systemctl stop vllmd`` takes it down, ``restart``
  and ``kill -9`` of the daemon leave it running;
* ``Before=vllmd.service``: stops run in the inverse order of starts, so on
  ``stop`` the daemon first drains its requests and exits, then the scope is
  stopped. ``After=`` would SIGTERM the engines first (the streams are cut) and
  would make a scope wait for the daemon's READY=1. Measured on systemd 252: see
  ``units/README.md``;
* ``After=vllmd-launcher.service``: if both are stopped, as at a shutdown, the
  launcher stays until the scope is gone. Without it systemd may send RequestStop to
  a launcher that is just ending, and the engine gets no signal until it is killed;
* ``Controller=`` the launcher: systemd asks the launcher (signal RequestStop) instead
  of sending SIGTERM to every process, and the launcher sends it to the main process
  alone, because workers of vLLM die of it at once. If the launcher is gone, or has a
  new connection to the bus, systemd falls back to SIGTERM for all.

While the daemon's service has a job, a scope needs care. ``PartOf=`` is resolved
when ``systemctl stop`` is given: a scope made later is not stopped with the daemon,
and because of ``Before=`` its start waits until the daemon has ended. So nothing is
started once the service has a stop job, and the job is checked again before the gate
is opened: a stop in between has either taken the scope along, or its job is still
there. A *restart* also delays scopes, for as long as the daemon drains; it needs its
engines meanwhile and leaves them running, so the scope is made with the job mode
``ignore-dependencies`` then.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmd.launcher.backend import Found, Placed
from vllmd.launcher.bus import Bus, BusError, Unit
from vllmd.launcher.cgroup import Cgroup, WatchedCgroup, Watcher, cgroup_of, hierarchy
from vllmd.launcher.logs import Journal
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.process import Process
from vllmd.launcher.protocol import LIMITS, UNIT_PREFIX, UNIT_SUFFIX, StartOrder, instance_of, unit_of

log = logging.getLogger(__name__)

SERVICE, LAUNCHER, SLICE = "vllmd.service", "vllmd-launcher.service", "vllmd.slice"
EMPTY_SECONDS = 0.1  # for systemd to notice by itself that a scope is empty; it takes about one millisecond
RETRY_SECONDS = 0.02  # until the next try: for a name that is still in use, or while systemd cannot be reached
NAME_TRIES = 50
FAILED_COST = 10  # tries that a failed job costs: a failure with another cause repeats itself
JOB_CHECK_SECONDS = 1.0  # after which a job is looked up: its signal may be lost
STOPPED = "vllmd is being stopped: no model is started any more"

_PROPERTIES: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    "memory_max": (b"MemoryMax", int),
    "memory_high": (b"MemoryHigh", int),
    "memory_swap_max": (b"MemorySwapMax", int),
    "cpu_weight": (b"CPUWeight", int),
    "cpu_quota": (b"CPUQuotaPerSecUSec", lambda cores: int(cores * 1_000_000)),
    "tasks_max": (b"TasksMax", int),
    "oom_policy": (b"OOMPolicy", str.encode),
}

NO_VERSION_2 = (
    "this machine has control groups of version 1 alone, in which an engine's processes cannot be watched; "
    "boot it with systemd.unified_cgroup_hierarchy=1"
)


class Scopes:
    """A backend. Raises OSError if the bus cannot be reached."""

    dies_with_us = False
    marks: Mapping[str, str] = MappingProxyType({})

    def __init__(self, loop: Loop, *, user: bool, stop_requested: Callable[[str], None]) -> None:
        self.name = "systemd-user" if user else "systemd"
        self.limits = tuple(LIMITS)
        self.logs = Journal(loop, user=user)
        self._loop = loop
        self._watcher = Watcher(loop)
        self._ask_to_stop = stop_requested
        self._jobs: dict[bytes, _Job] = {}
        self._loaded: set[str] = set()
        self._folders: dict[str, Path] = {}  # unit -> its cgroup
        self._placing: dict[str, Timer] = {}  # units whose creation is tried again
        self._retiring: dict[str, Callable[[], None]] = {}
        self._bus = Bus(loop, self, user=user)
        self.detail = f"scopes of systemd {self._bus.version} on the {'user' if user else 'system'} bus"

    # --- what a backend does ---

    def place(self, order: StartOrder, process: Process, placed: Placed, tries: int = NAME_TRIES) -> None:
        """Make the scope with the process in it. While systemd cannot be reached it is tried again, until `retire`."""
        if hierarchy() is None:
            placed(None, NO_VERSION_2)
            return
        unit = unit_of(order.instance)
        self._placing.pop(unit, None)
        try:
            service, slice = self._bus.units(SERVICE, SLICE)
            job = self._make(unit, self._properties(order, process.pid), service, slice)
        except BusError as error:
            exists = "already loaded" in str(error)  # UnitRemoved can come a moment before the name is free
            made = False
            with contextlib.suppress(OSError):  # where it cannot be seen now, the next try may see it
                made = exists and _is_in(process, unit) is not None
            if made:  # by an earlier call, whose answer was lost
                self._made(unit, process, "done", placed)
                return
            if error.lost:
                self._loaded.add(unit)  # the call may have been carried out
            if error.lost or (exists and tries):
                again = tries - 1 if exists else tries
                self._placing[unit] = self._loop.later(RETRY_SECONDS, lambda: self.place(order, process, placed, again))
                return
            placed(None, f"systemd refused to make {unit}: {error}")
            return
        if job is None:
            placed(None, STOPPED)
            return
        self._loaded.add(unit)

        def ended(result: str) -> None:
            # systemd cannot put a process into the cgroup of the last unit of this name, which it is just removing.
            if result == "failed" and tries > 0:
                again = lambda: self.place(order, process, placed, tries - FAILED_COST)  # noqa: E731
                self._placing[unit] = self._loop.later(RETRY_SECONDS, again)
            else:
                self._made(unit, process, result, placed, was_down=_is_down(service))

        self._await(job, unit, ended)

    def _make(self, unit: str, properties: Mapping[bytes, Any], service: Unit, slice: Unit) -> bytes | None:
        """The path of the job that makes the scope, or None if nothing may be started. Raises BusError."""
        if service.job == "stop":
            return None
        mode = b"fail"
        if "restart" in service.job:
            mode = b"ignore-dependencies"
            if slice.active != "active":
                self._bus.start(SLICE)
        return self._bus.start_scope(unit, mode, properties)

    def _made(self, unit: str, process: Process, result: str, placed: Placed, *, was_down: bool = False) -> None:
        """The job has ended. ``done`` alone is not enough: a process that died meanwhile leaves an empty scope.

        ``was_down``: the service was down before the call, so the daemon was started in another way (by hand, a test),
        and its being down now is no stop.
        """
        if result != "done":
            placed(None, f"systemd's job to make {unit} ended with {result!r}")
            return
        try:
            (service,) = self._bus.units(SERVICE)
        except BusError as error:
            if error.lost:
                again = lambda: self._made(unit, process, result, placed, was_down=was_down)  # noqa: E731
                self._placing[unit] = self._loop.later(RETRY_SECONDS, again)
            else:
                placed(None, f"systemd does not say what {SERVICE} is doing: {error}")
            return
        self._placing.pop(unit, None)
        if service.job == "stop" or (_is_down(service) and not was_down):
            placed(None, STOPPED)
            return
        try:
            cgroup = _is_in(process, unit)
        except OSError as error:
            placed(None, f"it cannot be seen whether the process is in {unit}: {error.strerror}")
            return
        if cgroup:
            self._folders[unit] = cgroup.path
            placed(WatchedCgroup(cgroup.path, self._watcher), "")
        else:
            placed(None, f"the process died while systemd made {unit}")

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        """Wait until systemd has forgotten the empty scope, which frees its name; after a while stop the unit."""
        unit = unit_of(instance)
        if again := self._placing.pop(unit, None):
            again.cancel()
        if unit not in self._loaded:
            retired()
            return
        self._retiring[unit] = retired
        self._loop.later(EMPTY_SECONDS, lambda: self._stop(unit))

    def _stop(self, unit: str) -> None:
        """Stop a unit that systemd does not remove by itself: one around a zombie, or one that is still being made.

        It is abandoned first. Otherwise systemd would ask its controller, this launcher, to end processes that do not
        exist, and would wait until the stop timeout for a change of a scope that is empty already.
        """
        if unit not in self._retiring:
            return
        with contextlib.suppress(BusError):  # fails while the scope is still being made; ``stop`` works then, too
            self._bus.abandon(unit)
        try:
            job = self._bus.stop(unit)
        except BusError as error:
            if error.lost:
                self._loop.later(RETRY_SECONDS, lambda: self._stop(unit))
                return
            if "not loaded" not in str(error):
                log.warning("cannot stop %s: %s", unit, error)
            self.unit_removed(unit)
            return
        self._await(job, unit, lambda _: self.unit_removed(unit))

    def adopt(self) -> Sequence[Found]:
        """The scopes of an earlier launcher, empty ones included, which would stay for ever."""
        try:
            units = self._bus.matching(f"{UNIT_PREFIX}*{UNIT_SUFFIX}")
            found = [(instance_of(unit.name), self._group(unit)) for unit in units]
        except BusError as error:
            raise OSError(f"cannot list the engines' scopes: {error}") from None
        self._loaded |= {unit.name for unit in units}
        self._folders |= {unit_of(instance): Path(group.location()) for instance, group in found if instance}
        root = hierarchy()  # remove empty cgroups of scopes that systemd does not know any more
        for folder in root.glob(f"{SLICE}/{UNIT_PREFIX}*{UNIT_SUFFIX}") if root else ():
            if folder.name not in self._loaded:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        return [Found(instance, group) for instance, group in found if instance]

    def abandoned(self) -> bool:
        """Whether the daemon's service is down and stays down: it has no job."""
        try:
            (service,) = self._bus.units(SERVICE)
        except BusError:
            return False
        return _is_down(service)

    def end(self, instance: str) -> None:
        """Have systemd stop the scope, as ``systemctl stop`` would."""
        try:
            self._bus.stop(unit_of(instance))
        except BusError as error:
            log.warning("cannot stop %s: %s", unit_of(instance), error)

    # --- the properties, the group ---

    def _properties(self, order: StartOrder, pid: int) -> dict[bytes, Any]:
        limits = {_PROPERTIES[name][0]: _PROPERTIES[name][1](value) for name, value in order.limits.items()}
        return {
            b"PIDs": [pid],
            # systemd writes it into the transient unit's file and parses each line of that at its next reload. So it is
            # made of the checked instance, never of a text from a packet.
            b"Description": f"vllmd engine {order.instance}".encode(),
            b"Slice": SLICE.encode(),
            b"PartOf": [SERVICE.encode()],
            b"Before": [SERVICE.encode()],
            b"After": [LAUNCHER.encode()],
            b"Controller": self._bus.own_name,
            b"CollectMode": b"inactive-or-failed",
            b"TimeoutStopUSec": int(order.stop_timeout * 1_000_000),
            **limits,
        }

    def _group(self, unit: Unit) -> WatchedCgroup:
        root = hierarchy()
        assert root, "systemd runs, so cgroup v2 is mounted"
        return WatchedCgroup(root / (self._bus.control_group(unit).strip("/") or "gone"), self._watcher)

    # --- jobs and systemd's signals ---

    def _await(self, job: bytes, unit: str, finish: Callable[[str], None]) -> None:
        self._jobs[job] = _Job(unit, finish, self._loop.later(JOB_CHECK_SECONDS, lambda: self._check_job(job)))

    def _check_job(self, job: bytes) -> None:
        """Look a job up. If its unit does not have it any more, it has ended, and the unit's state shows how."""
        waiting = self._jobs.get(job)
        if waiting is None:
            return
        waiting.check.cancel()
        try:
            (unit,) = self._bus.units(waiting.unit)
        except BusError:
            unit = None
        if unit and not unit.job:
            self.job_removed(job, "done" if unit.active == "active" else "lost")
        else:
            waiting.check = self._loop.later(JOB_CHECK_SECONDS, lambda: self._check_job(job))

    def reconnected(self) -> None:
        """Signals may be lost: look all jobs up."""
        for job in tuple(self._jobs):
            self._check_job(job)
        for unit in tuple(self._retiring):
            self._stop(unit)

    def job_removed(self, job: bytes, result: str) -> None:
        """A job of systemd's has ended with ``result``, such as ``done`` or ``failed``."""
        if waiting := self._jobs.pop(job, None):
            waiting.check.cancel()
            waiting.finish(result)

    def unit_removed(self, unit: str) -> None:
        """systemd has forgotten the unit, so its name is free."""
        self._loaded.discard(unit)
        if folder := self._folders.pop(unit, None):
            with contextlib.suppress(OSError):  # systemd leaves a cgroup that was not quite empty in that moment
                folder.rmdir()
        if retired := self._retiring.pop(unit, None):
            retired()

    def stop_requested(self, path: bytes) -> None:
        """systemd is stopping a scope."""
        instance = instance_of(_unescape(path.rpartition(b"/")[2]))
        if instance:
            self._ask_to_stop(instance)


class _Job:
    """A job of systemd's; ``finish`` is called with its result, ``check`` looks it up if no signal came."""

    __slots__ = ("check", "finish", "unit")

    def __init__(self, unit: str, finish: Callable[[str], None], check: Timer) -> None:
        self.unit, self.finish, self.check = unit, finish, check


def _is_down(unit: Unit) -> bool:
    """Whether the unit is inactive and has no job."""
    return unit.active in ("inactive", "failed") and not unit.job


def _is_in(process: Process, unit: str) -> Cgroup | None:
    """The scope's group if the process is in it, else None. Raises OSError where that cannot be seen."""
    cgroup = cgroup_of(process.pid)
    return cgroup if cgroup and cgroup.path.name == unit else None


def _unescape(label: bytes) -> str:
    """The name in a D-Bus path, which has ``vllmd_2dmodel`` for ``vllmd-model``; "" if it is malformed."""
    head, *parts = label.split(b"_")
    try:
        text = head + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in parts)
    except ValueError:
        return ""
    return text.decode(errors="replace")
