"""systemd's manager on the bus: calls, and signals, over a restart of either. The only file that knows pystemd.

``systemctl restart dbus`` closes every connection, and ``daemon-reexec`` takes the
manager away for a moment. Both are over within a second, no unit is harmed, and
systemd goes on with its jobs; only signals are lost. So a call that cannot be made
raises ``BusError`` with ``lost``, the connections are made again here, and whoever
waits for a signal looks for himself meanwhile (``units``).

pystemd holds the GIL in every call, for up to 25 s when PID 1 does not answer:
one more reason for a process of its own. Calls and signals need a connection
each, because a call swallows the readability of signals that arrive during it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES

from vllmd.launcher.loop import Loop

log = logging.getLogger(__name__)

FIRST_RETRY, LAST_RETRY = 0.05, 1.0  # seconds between attempts to connect again
# The connection is gone, or there is nobody behind the manager's name: it says nothing about what was asked.
_LOST = frozenset(
    {errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.ECONNREFUSED, errno.ESHUTDOWN}
    | {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENXIO}
)
_SYSTEMD, _PATH = b"org.freedesktop.systemd1", b"/org/freedesktop/systemd1"
_MANAGER, _SCOPE = b"org.freedesktop.systemd1.Manager", b"org.freedesktop.systemd1.Scope"
# Missing in pystemd's table (0.11 and 0.15); an unknown property is a KeyError there.
KNOWN_UNIT_SIGNATURES.update({b"PIDs": b"au", b"Controller": b"s", b"OOMPolicy": b"s", b"CPUWeight": b"t"})


class BusError(Exception):
    """systemd refused, or (``lost``) could not be asked, and nobody knows whether it was done."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as ListUnits shows it. ``job``: the type of the job it has, such as ``stop``; "" if none."""

    name: str
    active: str
    path: bytes
    job: str


class Hearer(Protocol):
    """Who is told what systemd says."""

    def job_removed(self, job: bytes, result: str) -> None: ...
    def unit_removed(self, unit: str) -> None: ...
    def stop_requested(self, path: bytes) -> None: ...
    def reconnected(self) -> None: ...


class Bus:
    """Two connections. Raises OSError where the first ones cannot be made."""

    def __init__(self, loop: Loop, hearer: Hearer, *, user: bool) -> None:
        self._loop, self._hearer, self._user = loop, hearer, user
        self._heard: list[Callable[[], None]] = []
        self._fd = -1  # of the signals' connection, kept here because a closed one does not tell it any more
        self._connected = False
        try:
            self._connect()
        except DBusBaseError as error:
            raise OSError(f"cannot reach the {'user' if user else 'system'} bus: {_text(error)}") from None

    # --- calls; each raises BusError ---

    def start_scope(self, unit: str, mode: bytes, properties: Mapping[bytes, Any]) -> bytes:
        """Returns the job."""
        return self._call(lambda: self._manager.StartTransientUnit(unit.encode(), mode, properties))  # type: ignore[no-any-return]

    def start(self, unit: str) -> bytes:
        """Returns the job."""
        return self._call(lambda: self._manager.StartUnit(unit.encode(), b"fail"))  # type: ignore[no-any-return]

    def stop(self, unit: str) -> bytes:
        """Returns the job."""
        return self._call(lambda: self._manager.StopUnit(unit.encode(), b"replace"))  # type: ignore[no-any-return]

    def matching(self, pattern: str) -> list[Unit]:
        """The loaded units of such names."""
        return _units(self._call(lambda: self._manager.ListUnitsByPatterns([], [pattern.encode()])))

    def units(self, *names: str) -> list[Unit]:
        """These units, in this order; one that is not loaded is ``inactive``."""
        found = _units(self._call(lambda: self._manager.ListUnitsByNames([name.encode() for name in names])))
        by_name = {unit.name: unit for unit in found}
        return [by_name.get(name, Unit(name, "inactive", b"", "")) for name in names]

    def control_group(self, unit: Unit) -> str:
        """Its path below the hierarchy, "" if it has none."""
        get = self._calls.get_property
        return self._call(lambda: get(_SYSTEMD, unit.path, _SCOPE, b"ControlGroup", b"s")).decode()  # type: ignore[no-any-return]

    def _call(self, ask: Callable[[], Any]) -> Any:
        if not self._connected:
            raise BusError("the connection to the bus is lost", lost=True)
        try:
            return ask()
        except DBusBaseError as error:
            lost = -error.errno in _LOST
            if lost and -error.errno != errno.ETIMEDOUT:
                self._lose(_text(error))
            raise BusError(_text(error), lost=lost) from None

    # --- the connections ---

    def _connect(self) -> None:
        """Raises DBusBaseError, also as long as systemd itself is not back on the bus."""
        self._calls, self._signals = DBus(user_mode=self._user), DBus(user_mode=self._user)
        self._calls.open()
        self._signals.open()
        self._manager: Any = Manager(bus=self._calls, _autoload=True).Manager
        self.version: str = self._manager.Version.decode()
        self._subscribe()
        self.own_name: bytes = self._signals.get_unique_name()  # what is sent to it arrives as a signal
        self._fd = self._signals.get_fd()
        self._loop.watch(self._fd, self._drain)
        self._connected = True
        self._loop.later(0, self._drain)  # what the calls above have read ahead

    def _lose(self, why: str) -> None:
        if not self._connected:
            return
        self._connected = False
        log.warning("the connection to systemd is lost (%s): connecting again; engines run on", why)
        self._loop.unwatch(self._fd)
        self._loop.later(FIRST_RETRY, lambda: self._connect_again(FIRST_RETRY))

    def _connect_again(self, delay: float) -> None:
        for connection in (self._calls, self._signals):
            with contextlib.suppress(DBusBaseError):
                connection.close()
        try:
            self._connect()
        except DBusBaseError as error:
            delay = min(2 * delay, LAST_RETRY)
            log.warning("cannot reach systemd on the bus: %s; trying again in %.2f s", _text(error), delay)
            self._loop.later(delay, lambda: self._connect_again(delay))
            return
        log.info("connected to systemd again")
        self._hearer.reconnected()

    # --- signals ---

    def _subscribe(self) -> None:
        """The callbacks only take notes: an exception in one would surface in the wrong place."""

        def job_removed(message: Any, error: Any = None, userdata: Any = None) -> None:
            message.process_reply(False)
            _, job, _, result = message.body
            self._heard.append(lambda: self._hearer.job_removed(job, result.decode()))

        def unit_removed(message: Any, error: Any = None, userdata: Any = None) -> None:
            message.process_reply(False)
            unit = message.body[0].decode()
            self._heard.append(lambda: self._hearer.unit_removed(unit))

        def request_stop(message: Any, error: Any = None, userdata: Any = None) -> None:
            path = message.get_path()
            self._heard.append(lambda: self._hearer.stop_requested(path))

        self._keep = (job_removed, unit_removed, request_stop)  # pystemd does not hold them; a collected one is a crash
        self._signals.match_signal(_SYSTEMD, _PATH, _MANAGER, b"JobRemoved", job_removed)
        self._signals.match_signal(_SYSTEMD, _PATH, _MANAGER, b"UnitRemoved", unit_removed)
        self._signals.match_signal(_SYSTEMD, None, _SCOPE, b"RequestStop", request_stop)
        manager: Any = Manager(bus=self._signals, _autoload=True).Manager
        manager.Subscribe()

    def _drain(self) -> None:
        """Process all that has arrived. An internal message looks like none: only several in a row are the end."""
        empty = 0
        try:
            while self._connected and empty < 3:
                empty = empty + 1 if self._signals.process().is_empty() else 0
        except DBusBaseError as error:
            self._lose(_text(error))
        heard, self._heard = self._heard, []
        for tell in heard:
            tell()


def _units(listed: Sequence[Any]) -> list[Unit]:
    """Of ``a(ssssssouso)``: name, description, load, active, sub, following, path, job, its type, its path."""
    return [Unit(one[0].decode(), one[3].decode(), one[6], one[8].decode() if one[7] else "") for one in listed]


def _text(error: Any) -> str:
    message = getattr(error, "err_message", "") or str(error)
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)
