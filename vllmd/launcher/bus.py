"""systemd's manager on D-Bus: calls and signals, across a restart of either. The only file that knows pystemd.

``systemctl restart dbus`` closes every connection, and ``daemon-reexec`` takes the
manager away for a moment. Both are over within a second, no unit is harmed, and
systemd goes on with its jobs; only signals are lost. So a call that cannot be made
raises ``BusError`` with ``lost``, the connections are made again here, and callers
that wait for a signal poll the unit meanwhile (``units``).

Any local user may send a signal with systemd's interface: the bus delivers every
message that is addressed to this connection, subscribed or not. Only the sender's
unique name, which the bus itself writes, can be trusted. So the owner of systemd's
name is queried and followed, and signals of other senders are counted and not parsed.
Signals of systemd may have another shape in another version: one that cannot be parsed
is counted, and does not affect those that came with it.

pystemd holds the GIL in every call, for up to 25 s when PID 1 does not answer:
one more reason for a process of its own. Calls and signals need a connection
each, because a call swallows the readability of signals that arrive during it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES

from vllmd.frozen import frozen
from vllmd.launcher.loop import Loop
from vllmd.systemd.throttle import Throttle

log = logging.getLogger(__name__)

MESSAGES_PER_TURN = 200  # of the launcher's loop
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 1.0  # between attempts to connect again
# The connection is gone, or the manager's name has no owner: whether the call was carried out is not known.
_LOST = frozenset(
    {errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.ECONNREFUSED, errno.ESHUTDOWN}
    | {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENXIO}
)
_SYSTEMD, _PATH = b"org.freedesktop.systemd1", b"/org/freedesktop/systemd1"
_BUS, _BUS_PATH = b"org.freedesktop.DBus", b"/org/freedesktop/DBus"
_MANAGER, _SCOPE = b"org.freedesktop.systemd1.Manager", b"org.freedesktop.systemd1.Scope"
# Missing in pystemd's table (0.11 and 0.15); an unknown property is a KeyError there.
KNOWN_UNIT_SIGNATURES.update({b"PIDs": b"au", b"Controller": b"s", b"OOMPolicy": b"s", b"CPUWeight": b"t"})


class BusError(Exception):
    """systemd refused a call, or (``lost``) could not be reached, and whether it carried the call out is not known."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


@frozen
class Unit:
    """A unit as ListUnits shows it. ``job``: the type of the job it has, such as ``stop``; "" if none."""

    name: str
    active: str
    path: bytes
    job: str


class SignalHandler(Protocol):
    """The receiver of systemd's signals."""

    def job_removed(self, job: bytes, result: str) -> None: ...
    def unit_removed(self, unit: str) -> None: ...
    def stop_requested(self, path: bytes) -> None: ...
    def reconnected(self) -> None: ...


class Bus:
    """Two connections to the bus. Raises OSError if the first ones cannot be made."""

    def __init__(self, loop: Loop, handler: SignalHandler, *, user: bool) -> None:
        self._loop, self._handler, self._user = loop, handler, user
        self._signals_received: list[tuple[bytes, Callable[[bytes, Any], None], bytes, Any]] = []
        self._fds: tuple[int, ...] = ()  # of the connections, kept because a closed one cannot be asked for it
        self._connected = False
        self._owner = b""  # of systemd's name
        self._foreign_senders = Throttle(log)
        try:
            self._connect()
        except DBusBaseError as error:
            raise OSError(f"cannot reach the {'user' if user else 'system'} bus: {_text(error)}") from None

    # --- calls; each raises BusError ---

    def start_scope(self, unit: str, mode: bytes, properties: Mapping[bytes, Any]) -> bytes:
        """Ask systemd for a transient scope. Returns the job's object path; raises BusError."""
        return self._call(lambda: self._manager.StartTransientUnit(unit.encode(), mode, properties))  # type: ignore[no-any-return]

    def start(self, unit: str) -> bytes:
        """Ask systemd to start a unit (mode ``fail``). Returns the job's object path; raises BusError."""
        return self._call(lambda: self._manager.StartUnit(unit.encode(), b"fail"))  # type: ignore[no-any-return]

    def stop(self, unit: str) -> bytes:
        """Ask systemd to stop a unit (mode ``replace``). Returns the job's object path; raises BusError."""
        return self._call(lambda: self._manager.StopUnit(unit.encode(), b"replace"))  # type: ignore[no-any-return]

    def abandon(self, unit: str) -> None:
        """Give up being the scope's controller: systemd then stops it without RequestStop."""
        ask = [(ord("s"), unit.encode())]

        def abandon() -> None:
            path = self._calls.call_method(_SYSTEMD, _PATH, _MANAGER, b"GetUnit", ask).body
            self._calls.call_method(_SYSTEMD, path, _SCOPE, b"Abandon", [])

        self._call(abandon)

    def matching(self, pattern: str) -> list[Unit]:
        """The loaded units whose names match ``pattern``."""
        return _units(self._call(lambda: self._manager.ListUnitsByPatterns([], [pattern.encode()])))

    def units(self, *names: str) -> list[Unit]:
        """The state of each of these units, in this order; a unit that is not loaded is ``inactive``."""
        found = _units(self._call(lambda: self._manager.ListUnitsByNames([name.encode() for name in names])))
        by_name = {unit.name: unit for unit in found}
        return [by_name.get(name, Unit(name, "inactive", b"", "")) for name in names]

    def control_group(self, unit: Unit) -> str:
        """The path of a unit's control group below the hierarchy, "" if it has none."""
        get = self._calls.get_property
        return self._call(lambda: get(_SYSTEMD, unit.path, _SCOPE, b"ControlGroup", b"s")).decode()  # type: ignore[no-any-return]

    def _call(self, ask: Callable[[], Any]) -> Any:
        self._discard()
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
        self.own_name: bytes = self._signals.get_unique_name()  # RequestStop is sent to it
        self._fds = (self._signals.get_fd(), self._calls.get_fd())
        self._loop.watch(self._fds[0], self._drain)
        self._loop.watch(self._fds[1], self._discard)
        self._connected = True
        self._loop.later(0, self._drain)  # signals that the calls above have read along with their answers

    def _lose(self, why: str) -> None:
        if not self._connected:
            return
        self._connected = False
        log.warning("the connection to systemd is lost (%s): reconnecting; engines are not affected", why)
        for fd in self._fds:
            self._loop.unwatch(fd)
        self._loop.later(MIN_RETRY_SECONDS, lambda: self._connect_again(MIN_RETRY_SECONDS))

    def _connect_again(self, delay: float) -> None:
        for connection in (self._calls, self._signals):
            with contextlib.suppress(DBusBaseError):
                connection.close()
        try:
            self._connect()
        except DBusBaseError as error:
            delay = min(2 * delay, MAX_RETRY_SECONDS)
            log.warning("cannot reach systemd on the bus: %s; trying again in %.2f s", _text(error), delay)
            self._loop.later(delay, lambda: self._connect_again(delay))
            return
        log.info("connected to systemd again")
        self._handler.reconnected()

    # --- signals ---

    def _subscribe(self) -> None:
        """Subscribe to systemd's signals, and to changes of the bus name's owner. The callbacks only store signals."""
        self._keep: list[Any] = []  # pystemd holds no reference to the callbacks; a collected one would crash
        on = self._on_signal
        on(_BUS, _BUS_PATH, _BUS, b"NameOwnerChanged", self._owner_changed)
        on(_SYSTEMD, _PATH, _MANAGER, b"JobRemoved", lambda path, body: self._handler.job_removed(*_job_of(body)))
        on(_SYSTEMD, _PATH, _MANAGER, b"UnitRemoved", lambda path, body: self._handler.unit_removed(_unit_of(body)))
        on(_SYSTEMD, None, _SCOPE, b"RequestStop", lambda path, body: self._handler.stop_requested(path))
        ask = [(ord("s"), _SYSTEMD)]
        self._owner = self._signals.call_method(_BUS, _BUS_PATH, _BUS, b"GetNameOwner", ask).body
        manager: Any = Manager(bus=self._signals, _autoload=True).Manager
        manager.Subscribe()

    def _on_signal(
        self, name: bytes, path: bytes | None, interface: bytes, member: bytes, handle: Callable[[bytes, Any], None]
    ) -> None:
        """Call ``handle`` with object path and body for each such signal of the owner of ``name``."""

        def arrived(message: Any, error: Any = None, userdata: Any = None) -> None:
            # An exception in here would be raised in another call, and the signals behind this one would be lost.
            try:
                trusted = self._owner if name == _SYSTEMD else name
                if not trusted or message.get_sender() != trusted:
                    self._say("a signal %s of %s was ignored: it is not systemd's", member, message.get_sender())
                    return
                message.process_reply(False)
                if name == _BUS:  # at once: the next signal may be the new owner's
                    handle(message.get_path(), message.body)
                else:
                    self._signals_received.append((member, handle, message.get_path(), message.body))
            except Exception as error:
                self._say("a signal %s could not be read: %s", member, type(error).__name__)

        self._keep.append(arrived)
        self._signals.match_signal(name, path, interface, member, arrived)

    def _say(self, message: str, member: bytes, what: object) -> None:
        self._foreign_senders.say(logging.WARNING, message, member.decode(), _text(what))

    def _owner_changed(self, path: bytes, body: Any) -> None:
        """A name on the bus has another owner, or none; if it is systemd's, signals are lost meanwhile."""
        name, _, owner = body
        if name != _SYSTEMD or owner == self._owner:
            return
        self._owner = owner
        if owner:
            self._loop.later(0, self._resubscribe)

    def _resubscribe(self) -> None:
        """Subscribe again: after ``daemon-reexec`` the manager may have forgotten its subscribers."""
        if not self._connected:
            return
        with contextlib.suppress(DBusBaseError):  # already subscribed
            Manager(bus=self._signals, _autoload=True).Manager.Subscribe()
        self._handler.reconnected()
        self._drain()

    def _discard(self) -> None:
        """Drop messages on the connection for calls other than answers, which would pile up."""
        empty = 0
        try:
            for _ in range(MESSAGES_PER_TURN):
                if not self._connected or empty == 3:
                    break
                empty = empty + 1 if self._calls.process().is_empty() else 0
        except DBusBaseError as error:
            self._lose(_text(error))

    def _drain(self) -> None:
        """Process signals, at most ``MESSAGES_PER_TURN``, so that a fast sender does not hold the loop.

        ``process`` returns "empty" for an internal message, too: only several in a row mean that there is none left.
        """
        empty = 0
        try:
            for _ in range(MESSAGES_PER_TURN):
                if not self._connected or empty == 3:
                    break
                empty = empty + 1 if self._signals.process().is_empty() else 0
            else:
                self._loop.later(0, self._drain)
        except DBusBaseError as error:
            self._lose(_text(error))
        received, self._signals_received = self._signals_received, []
        for member, handle, path, body in received:
            try:
                handle(path, body)
            except Malformed as error:
                self._say("a signal %s has another shape than expected: %s", member, str(error))
            except Exception:
                log.exception("the handler of a signal %s failed", member.decode())


class Malformed(ValueError):
    """A signal's body is not what systemd sends; the message is its Python type."""


def _job_of(body: Any) -> tuple[bytes, str]:
    """Path and result of a job, from a body of type ``uoss``: number, path, unit, result. Raises Malformed."""
    if isinstance(body, list) and len(body) == 4 and all(isinstance(part, bytes) for part in body[1:]):
        return body[1], body[3].decode(errors="replace")
    raise Malformed(type(body).__name__)


def _unit_of(body: Any) -> str:
    """The unit's name, from a body of type ``so``: name and path. Raises Malformed."""
    if isinstance(body, list) and len(body) == 2 and isinstance(body[0], bytes):
        return body[0].decode(errors="replace")
    raise Malformed(type(body).__name__)


def _units(listed: Sequence[Any]) -> list[Unit]:
    """Units from ``a(ssssssouso)``: name, description, load, active, sub, following, path, job, its type, its path."""
    return [Unit(one[0].decode(), one[3].decode(), one[6], one[8].decode() if one[7] else "") for one in listed]


def _text(error: Any) -> str:
    message = error if isinstance(error, bytes) else getattr(error, "err_message", "") or str(error)
    return message.decode(errors="replace") if isinstance(message, bytes) else str(message)
