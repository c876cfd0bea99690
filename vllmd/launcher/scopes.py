"""Engines in transient scopes of systemd, on the system bus or a user's. The only file that knows pystemd.

A scope is ``vllmd-model-INSTANCE.scope`` in ``vllmd.slice``, with

* ``PartOf=vllmd.service``: ``systemctl stop vllmd`` takes it down, ``restart``
  and ``kill -9`` of the daemon leave it running;
* ``Before=vllmd.service``: stops run in the inverse order of starts, so on
  ``stop`` the daemon first drains its requests and exits, then the scope is
  stopped. ``After=`` would SIGTERM the engines first (the streams are cut) and
  would make a scope wait for the daemon's READY=1. Measured on systemd 252: see
  ``units/README.md``;
* ``After=vllmd-launcher.service``: where both are stopped, as at a shutdown, we
  stay until the scope is gone. Without it systemd may ask a launcher that is
  just ending, and the engine learns nothing until it is killed;
* ``Controller=`` us: systemd asks us (signal RequestStop) instead of sending
  SIGTERM to every process, and we send it to the main process alone, because
  workers of vLLM die of it at once. With us gone it falls back to SIGTERM for all.

pystemd holds the GIL in every call, for up to 25 s when PID 1 does not answer:
one more reason for this process of its own. Calls and signals need a connection
each, because a call swallows the readability of signals that arrive during it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES

from vllmd.launcher.backend import Found, Placed
from vllmd.launcher.cgroup import WatchedCgroup, Watcher, cgroup_of, hierarchy
from vllmd.launcher.logs import Journal
from vllmd.launcher.loop import Loop
from vllmd.launcher.process import Process
from vllmd.launcher.protocol import LIMITS, UNIT_PREFIX, UNIT_SUFFIX, StartOrder, instance_of, unit_of

log = logging.getLogger(__name__)

SERVICE, LAUNCHER, SLICE = b"vllmd.service", b"vllmd-launcher.service", b"vllmd.slice"
PATIENCE = 0.1  # seconds for systemd to notice by itself that a scope is empty; it takes about one millisecond
NAME_TRIES, NAME_WAIT = 50, 0.02  # seconds between tries for a name that systemd has not let go
_SYSTEMD, _PATH = b"org.freedesktop.systemd1", b"/org/freedesktop/systemd1"
_MANAGER, _SCOPE = b"org.freedesktop.systemd1.Manager", b"org.freedesktop.systemd1.Scope"
# Missing in pystemd's table (0.11 and 0.15); an unknown property is a KeyError there.
KNOWN_UNIT_SIGNATURES.update({b"PIDs": b"au", b"Controller": b"s", b"OOMPolicy": b"s", b"CPUWeight": b"t"})

_PROPERTIES: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    "memory_max": (b"MemoryMax", int),
    "memory_high": (b"MemoryHigh", int),
    "memory_swap_max": (b"MemorySwapMax", int),
    "cpu_weight": (b"CPUWeight", int),
    "cpu_quota": (b"CPUQuotaPerSecUSec", lambda cores: int(cores * 1_000_000)),
    "tasks_max": (b"TasksMax", int),
    "oom_policy": (b"OOMPolicy", str.encode),
}


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
        self._stop_requested = stop_requested
        self._jobs: dict[bytes, Callable[[str], None]] = {}
        self._loaded: set[str] = set()
        self._retiring: dict[str, Callable[[], None]] = {}
        self._signals: list[Callable[[], None]] = []
        self._calls, self._bus = _connect(user), _connect(user)
        self._own_name: bytes = self._bus.get_unique_name()
        self._manager: Any = Manager(bus=self._calls, _autoload=True).Manager
        self._subscribe()
        version = self._manager.Version.decode()
        self.detail = f"scopes of systemd {version} on the {'user' if user else 'system'} bus"

    # --- what a backend does ---

    def place(self, order: StartOrder, process: Process, placed: Placed, tries: int = NAME_TRIES) -> None:
        """Make the scope with the process in it."""
        unit = unit_of(order.instance)
        try:
            job = self._manager.StartTransientUnit(unit.encode(), b"fail", self._properties(order, process.pid))
        except DBusBaseError as error:
            if "already loaded" in _text(error) and tries:  # UnitRemoved can come a moment before the name is free
                self._loop.later(NAME_WAIT, lambda: self.place(order, process, placed, tries - 1))
                return
            placed(None, f"systemd refused to make {unit}: {_text(error)}")
            return
        self._loaded.add(unit)
        self._jobs[job] = lambda result: placed(*self._outcome(unit, process, result))

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        """Its processes are gone: systemd will notice and forget the unit, which frees its name; else stop it."""
        unit = unit_of(instance)
        if unit not in self._loaded:
            retired()
            return
        self._retiring[unit] = retired
        self._loop.later(PATIENCE, lambda: self._stop(unit))

    def _stop(self, unit: str) -> None:
        """Of a scope around a zombie, or one that is still being made, systemd notices nothing by itself."""
        if unit not in self._retiring:
            return
        try:
            job = self._manager.StopUnit(unit.encode(), b"replace")
        except DBusBaseError as error:
            if "not loaded" not in _text(error):
                log.warning("cannot stop %s: %s", unit, _text(error))
            self._unit_removed(unit)
            return
        self._jobs[job] = lambda _: self._unit_removed(unit)

    def adopt(self) -> Sequence[Found]:
        """The scopes of an earlier launcher; even one without processes, which may linger for ever otherwise."""
        pattern = f"{UNIT_PREFIX}*{UNIT_SUFFIX}".encode()
        units = self._manager.ListUnitsByPatterns([], [pattern])
        self._loaded |= {unit[0].decode() for unit in units}
        found = [(instance_of(unit[0].decode()), self._group(unit[6])) for unit in units]
        return [Found(instance, group) for instance, group in found if instance]

    # --- the bus ---

    def _properties(self, order: StartOrder, pid: int) -> dict[bytes, Any]:
        limits = {_PROPERTIES[name][0]: _PROPERTIES[name][1](value) for name, value in order.limits.items()}
        return {
            b"PIDs": [pid],
            # systemd writes it into the transient unit's file and believes each line of that at its next reload: so it
            # is made here, of the checked instance, and never of a text that somebody sent.
            b"Description": f"vllmd engine {order.instance}".encode(),
            b"Slice": SLICE,
            b"PartOf": [SERVICE],
            b"Before": [SERVICE],
            b"After": [LAUNCHER],
            b"Controller": self._own_name,
            b"CollectMode": b"inactive-or-failed",
            b"TimeoutStopUSec": int(order.stop_timeout * 1_000_000),
            **limits,
        }

    def _outcome(self, unit: str, process: Process, result: str) -> tuple[WatchedCgroup | None, str]:
        """``done`` alone is not enough: a process that died meanwhile leaves a scope that nobody is in."""
        if result != "done":
            return None, f"systemd's job to make {unit} ended with {result!r}"
        cgroup = cgroup_of(process.pid)
        if cgroup is None or cgroup.path.name != unit:
            return None, f"the process died while systemd made {unit}"
        return WatchedCgroup(cgroup.path, self._watcher), ""

    def _group(self, path: bytes) -> WatchedCgroup:
        name = self._calls.get_property(_SYSTEMD, path, _SCOPE, b"ControlGroup", b"s").decode()
        root = hierarchy()
        assert root, "systemd runs, so cgroup v2 is mounted"
        return WatchedCgroup(root / (name.strip("/") or "gone"), self._watcher)

    def _subscribe(self) -> None:
        """The callbacks only take notes: an exception in one would surface in the wrong place."""

        def job_removed(message: Any, error: Any = None, userdata: Any = None) -> None:
            message.process_reply(False)
            _, job, _, result = message.body
            self._signals.append(lambda: self._job_removed(job, result.decode()))

        def unit_removed(message: Any, error: Any = None, userdata: Any = None) -> None:
            message.process_reply(False)
            unit = message.body[0].decode()
            self._signals.append(lambda: self._unit_removed(unit))

        def request_stop(message: Any, error: Any = None, userdata: Any = None) -> None:
            path = message.get_path()
            self._signals.append(lambda: self._asked_to_stop(path))

        self._keep = (job_removed, unit_removed, request_stop)  # pystemd does not hold them; a collected one is a crash
        self._bus.match_signal(_SYSTEMD, _PATH, _MANAGER, b"JobRemoved", job_removed)
        self._bus.match_signal(_SYSTEMD, _PATH, _MANAGER, b"UnitRemoved", unit_removed)
        self._bus.match_signal(_SYSTEMD, None, _SCOPE, b"RequestStop", request_stop)
        manager: Any = Manager(bus=self._bus, _autoload=True).Manager
        manager.Subscribe()
        self._loop.watch(self._bus.get_fd(), self._drain)
        self._loop.later(0, self._drain)  # what the calls above have read ahead

    def _job_removed(self, job: bytes, result: str) -> None:
        if finish := self._jobs.pop(job, None):
            finish(result)

    def _unit_removed(self, unit: str) -> None:
        self._loaded.discard(unit)
        if retired := self._retiring.pop(unit, None):
            retired()

    def _asked_to_stop(self, path: bytes) -> None:
        instance = instance_of(_unescape(path.rpartition(b"/")[2]))
        if instance:
            self._stop_requested(instance)

    def _drain(self) -> None:
        """Process all that has arrived. An internal message looks like none: only several in a row are the end."""
        empty = 0
        try:
            while empty < 3:
                empty = empty + 1 if self._bus.process().is_empty() else 0
        except DBusBaseError as error:
            log.critical("the connection to systemd is lost (%s); the next launcher finds the engines again", error)
            self._loop.unwatch(self._bus.get_fd())
            self._loop.stop()
        signals, self._signals = self._signals, []
        for handle in signals:
            handle()


def _connect(user: bool) -> Any:
    bus = DBus(user_mode=user)
    try:
        bus.open()
    except DBusBaseError as error:
        raise OSError(f"cannot reach the {'user' if user else 'system'} bus: {_text(error)}") from None
    return bus


def _text(error: Any) -> str:
    message = getattr(error, "err_message", "") or str(error)
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)


def _unescape(label: bytes) -> str:
    """``vllmd_2dmodel`` is how D-Bus writes ``vllmd-model`` in a path."""
    head, *parts = label.split(b"_")
    return (head + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in parts)).decode(errors="replace")
