"""The messages between the daemon and the launcher: one JSON packet per message on AF_UNIX SOCK_SEQPACKET.

A packet is ``{"id": 7, "type": "Signal", "body": {...}}``. The client numbers its requests from 1; an answer has the
number of its request, any other message has 0. Types, sizes and names are checked on both sides: a malformed packet is
answered with ``Failed`` and changes nothing.

The launcher is root, and the daemon parses data from the network, so no packet is trusted: every number and length has
a bound here, every text is Unicode without control characters, and a message object exists only if all checks passed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Any

from vllmd.frozen import frozen
from vllmd.text import control_character

PROTOCOL = 3  # raised when a daemon needs something that an older launcher cannot do; 1 is that of 0.1.0
MAX_PACKET = 128 << 10  # bytes; the kernel's default send buffer takes 208 KiB
MAX_ID = (1 << 53) - 1  # exact in every JSON library
MAX_LINE = 8 << 10  # characters of a log line that are passed on
MAX_LINES = 10_000  # in one request
LINES_PER_PACKET = MAX_PACKET // 2  # bytes
ENGINES_PER_PACKET = MAX_PACKET // 2  # bytes

INSTANCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}\Z")
METADATA_KEY = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
MAX_METADATA_VALUE = 4 << 10  # bytes
MAX_METADATA = 64, 16 << 10  # keys, and bytes as JSON: a cgroup takes 128 attributes, and the launcher has its own
MAX_ARGUMENTS, MAX_ARGUMENT = 1024, 64 << 10  # words of argv or variables in env, bytes of one
MAX_PATH, MAX_SOCKET = 4095, 107  # bytes, of any path and of a Unix socket's
MAX_NUMBER = (1 << 63) - 1
MAX_CPUS, MAX_NODE = 8192, 1023  # the largest numbers that a kernel can be built for
LIMITS: Mapping[str, tuple[tuple[type, ...], float, float]] = {  # types, lowest and highest
    "memory_max": ((int,), 0, MAX_NUMBER),  # bytes
    "memory_high": ((int,), 0, MAX_NUMBER),
    "memory_swap_max": ((int,), 0, MAX_NUMBER),
    "cpu_weight": ((int,), 1, 10_000),
    "cpu_quota": ((int, float), 0.001, 1_000_000),  # 1.0 is one core
    "tasks_max": ((int,), 1, MAX_NUMBER),
    "oom_policy": ((str,), 0, 0),
}
OOM_POLICIES = ("continue", "stop", "kill")
SIGNALS = frozenset({1, 2, 3, 9, 10, 12, 15, 18, 19})  # HUP INT QUIT KILL USR1 USR2 TERM CONT STOP
UNIT_PREFIX, UNIT_SUFFIX = "vllmd-model-", ".scope"


def unit_of(instance: str) -> str:
    """The name of an instance's scope."""
    return f"{UNIT_PREFIX}{instance}{UNIT_SUFFIX}"


def instance_of(unit: str) -> str | None:
    """The instance of a unit's name; None if the unit is no engine's scope."""
    if not (unit.startswith(UNIT_PREFIX) and unit.endswith(UNIT_SUFFIX)):
        return None
    instance = unit[len(UNIT_PREFIX) : -len(UNIT_SUFFIX)]
    return instance if INSTANCE.match(instance) else None


class ProtocolError(Exception):
    """A packet is malformed; the message says how. ``id`` is its number, 0 if it could not be read."""

    def __init__(self, message: str, id: int = 0) -> None:
        super().__init__(message)
        self.id = id


# --- the parts of messages ---


@frozen
class StartOrder:
    """The order to start one engine. Times in seconds. Raises ProtocolError for an order that could never work.

    - ``instance`` is never used twice (``qwen3-1a2b``); the unit is ``vllmd-model-INSTANCE.scope``.
    - ``env`` is added to the launcher's base environment.
    - ``run_dir`` is made, and removed, by the engine's user; ``listen_uds``: a stale socket in it, unlinked first.
    - ``user``: "" is the launcher's default.
    - ``limits``: fields of ``config.types.ScopeLimits`` that are set.
    - ``metadata`` survives launcher and daemon.
    - ``timeout``: for the scope to be made and the command executed; ``stop_timeout``: between SIGTERM and SIGKILL when
      systemd itself stops the scope.
    - ``cpus``: the initial CPU affinity, empty for all; ``node``: the preferred NUMA node, -1 for any.
    - ``waits``: the engine is a standby (``launcher.handover``), which ends with the connection of its order.
    - ``standby``: the instance of a standby that is to become this engine. If that fails, it is started without.
    """

    instance: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    run_dir: str = ""
    listen_uds: str = ""
    user: str = ""
    limits: Mapping[str, int | float | str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 10.0
    stop_timeout: float = 30.0
    cpus: tuple[int, ...] = ()
    node: int = -1
    waits: bool = False
    standby: str = ""

    def __post_init__(self) -> None:
        check_instance(self.instance)
        check_standby(self)
        check_metadata(self.metadata)
        check_limits(self.limits)
        if not self.argv or not self.argv[0]:
            raise ProtocolError("argv is empty: there is no command to run")
        if max(len(self.argv), len(self.env)) > MAX_ARGUMENTS:
            raise ProtocolError(f"argv or env has more than {MAX_ARGUMENTS} entries")
        for word in (*self.argv, *self.env, self.user):
            check_text("argv, env or user", word, MAX_ARGUMENT)
        for value in self.env.values():  # a certificate or a template has lines; systemd never sees them
            check_text("env", value.replace("\n", "").replace("\t", ""), MAX_ARGUMENT)
        if any(not name or "=" in name for name in self.env):
            raise ProtocolError("a name in env is empty or has '='")
        check_text("argv[0]", self.argv[0], MAX_PATH)
        check_text("cwd", self.cwd, MAX_PATH)
        if self.cwd and not self.cwd.startswith("/"):
            raise ProtocolError(f"cwd {brief(self.cwd)} is not an absolute path")
        check_path("run_dir", self.run_dir)
        check_path("listen_uds", self.listen_uds, MAX_SOCKET)
        if self.listen_uds and not is_beneath(self.listen_uds, self.run_dir):
            raise ProtocolError(f"listen_uds {self.listen_uds!r} is not in run_dir {self.run_dir!r}")
        check_place(self.cpus, self.node)
        if not (0 < self.timeout <= 600 and 0 < self.stop_timeout <= 3600):
            raise ProtocolError("timeout must be in (0, 600] and stop_timeout in (0, 3600] seconds")


@frozen
class Running:
    """An engine that was started or adopted. ``cgroup`` is a path, "" if it has none of its own.

    ``ending``: its main process has ended (``pid`` may be 0 then); Exited follows when its other processes are gone.
    ``uid``: the user id that it runs as, -1 if that is not known. ``standby``: the instance that it was made of.
    """

    instance: str
    pid: int
    unit: str
    cgroup: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    ending: bool = False
    uid: int = -1
    standby: str = ""


@frozen
class ExitReport:
    """An engine's end. ``status`` and ``signal`` are None if they cannot be known.

    ``empty``: no process of it is left (False only after every attempt to kill them failed). ``oom``: the kernel killed
    one of its processes for memory. ``log_tail``: its last lines; empty if a signal or kill requested the end.
    """

    instance: str
    status: int | None = None
    signal: int | None = None
    empty: bool = True
    oom: bool = False
    log_tail: tuple[str, ...] = ()


@frozen
class LauncherInfo:
    """The backend (``systemd``, ``systemd-user`` or ``sessions``), and the limits that have an effect there.

    ``protocol``: the launcher's PROTOCOL. A daemon waits for a launcher that is not older than itself.
    """

    backend: str
    detail: str
    limits: tuple[str, ...] = ()
    protocol: int = 1


# --- requests ---


@frozen
class Start:
    """Start an engine. Answered by Started when the command has been executed, or Failed."""

    order: StartOrder


@frozen
class Signal:
    """Send a signal to the main process only. Answered by Done."""

    instance: str
    signum: int

    def __post_init__(self) -> None:
        check_instance(self.instance)
        if self.signum not in SIGNALS:
            raise ProtocolError(f"signal {self.signum} is not one of {', '.join(map(str, sorted(SIGNALS)))}")


@frozen
class Kill:
    """SIGKILL every process of the engine. Answered by Done; Exited follows."""

    instance: str

    def __post_init__(self) -> None:
        check_instance(self.instance)


@frozen
class Annotate:
    """Set these keys of the metadata. Answered by Done."""

    instance: str
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        check_instance(self.instance)
        check_metadata(self.metadata)


@frozen
class Follow:
    """Send the last ``lines`` of an engine's log and all further ones as Logged. Answered by Done.

    For an engine that does not run only the last lines are sent.
    """

    instance: str
    lines: int = 50

    def __post_init__(self) -> None:
        check_instance(self.instance)
        check_lines(self.lines)


@frozen
class Unfollow:
    """End what Follow began: send no more lines of this engine. Answered by Done."""

    instance: str

    def __post_init__(self) -> None:
        check_instance(self.instance)


@frozen
class Tail:
    """Ask for the last lines of a running or ended engine. Answered by Lines."""

    instance: str
    lines: int = 50

    def __post_init__(self) -> None:
        check_instance(self.instance)
        check_lines(self.lines)


@frozen
class List:
    """Request the list of engines that run. Answered by Engines."""


@frozen
class Info:
    """Request the launcher's properties. Answered by LauncherInfo."""


# --- answers, and messages to every client ---


@frozen
class Done:
    """The request has been carried out."""


@frozen
class Failed:
    """The request was refused or failed. ``permanent``: trying again cannot help."""

    message: str
    permanent: bool = False


@frozen
class Started:
    """The command has been executed."""

    engine: Running


@frozen
class Engines:
    """A part of the list; ``more`` follows under the same number."""

    engines: tuple[Running, ...]
    more: bool = False


@frozen
class Lines:
    """A part of the lines; ``more`` follows under the same number."""

    lines: tuple[str, ...]
    more: bool = False


@frozen
class Exited:
    """An engine has ended; sent to every client."""

    report: ExitReport


@frozen
class Logged:
    """A followed engine wrote these lines."""

    instance: str
    lines: tuple[str, ...]


@frozen
class Waiting:
    """A standby's imports are done, and it waits for an order; sent to every client. ``memory``: its own, in bytes."""

    instance: str
    memory: int = 0


Request = Start | Signal | Kill | Annotate | Follow | Unfollow | Tail | List | Info
Reply = Done | Failed | Started | Engines | Lines | LauncherInfo
Message = Request | Reply | Exited | Logged | Waiting
_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Message)}
_BODIES = (*typing.get_args(Message), StartOrder, Running, ExitReport)
_HINTS = {kind: typing.get_type_hints(kind) for kind in _BODIES}


# --- to and from packets ---


def encode(message: Message, id: int = 0) -> bytes:
    """The packet of a message. Raises ProtocolError if it would be too large."""
    body = dataclasses.asdict(message)
    packet = json.dumps({"id": id, "type": type(message).__name__, "body": body}, separators=(",", ":")).encode()
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a {type(message).__name__} of {len(packet)} bytes; at most {MAX_PACKET} fit a packet", id)
    return packet


def decode(packet: bytes, *, newer: bool = False) -> tuple[int, Message]:
    """The number and the message. Raises ProtocolError, with the number where it could be read, and nothing else.

    ``newer``: ignore unknown fields. The daemon reads a launcher's packets so, which may be newer after an upgrade.
    """
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a packet of more than {MAX_PACKET} bytes")
    try:
        value = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    id = value.get("id") if isinstance(value, dict) else None
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id <= MAX_ID:
        raise ProtocolError(f"a packet must be an object with a number `id`, from 0 to {MAX_ID}")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ProtocolError(f"unknown type {brief(kind)}; known are {', '.join(_TYPES)}", id)
    try:
        message: Message = _build(_TYPES[kind], value.get("body"), kind, newer)
    except ProtocolError as error:
        raise ProtocolError(str(error), id) from None
    return id, message


def pack_lines(lines: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The lines in groups that fit a packet each; an overlong line is clipped."""
    group: list[str] = []
    size = 0
    for line in lines:
        shown = clip(line)
        cost = len(json.dumps(shown)) + 1
        if group and size + cost > LINES_PER_PACKET:
            yield tuple(group)
            group, size = [], 0
        group.append(shown)
        size += cost
    yield tuple(group)


def clip(line: str, longest: int = MAX_LINE) -> str:
    """The line, or its beginning and its length."""
    return line if len(line) <= longest else f"{line[:longest]}... [{len(line)} characters]"


def pack_engines(engines: Iterable[Running]) -> Iterator[tuple[Running, ...]]:
    """The engines in groups that fit a packet each."""
    group: list[Running] = []
    size = 0
    for engine in engines:
        cost = len(json.dumps(dataclasses.asdict(engine))) + 1
        if group and size + cost > ENGINES_PER_PACKET:
            yield tuple(group)
            group, size = [], 0
        group.append(engine)
        size += cost
    yield tuple(group)


def brief(value: object) -> str:
    """The beginning of the repr of a value that was sent, for error messages."""
    text = repr(value if isinstance(value, str | int | float | None) else type(value).__name__)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_instance(instance: str) -> None:
    """Raises ProtocolError unless the name can be a part of a unit's name, unescaped."""
    if not INSTANCE.match(instance):
        raise ProtocolError(
            f"instance {brief(instance)} must be 1 to 128 of a-z, 0-9, '.' and '-', the first a letter or digit"
        )


def check_standby(order: StartOrder) -> None:
    """Raises ProtocolError for a standby that no engine could be made of."""
    if order.standby:
        check_instance(order.standby)
    if order.standby and (order.waits or order.standby == order.instance):
        raise ProtocolError("a standby cannot be made of a standby, nor of itself")


def check_lines(lines: int) -> None:
    """Raises ProtocolError for a number of lines that is too large."""
    if not 0 <= lines <= MAX_LINES:
        raise ProtocolError(f"lines must be from 0 to {MAX_LINES}")


def check_text(where: str, text: str, longest: int) -> None:
    """Raises ProtocolError for a control character, for text that is no Unicode, and for more than ``longest`` bytes.

    Some texts become a line of a file or of the log, where a line end would begin another one.
    """
    if found := control_character(text):
        raise ProtocolError(f"the control character {found} in {where}")
    if len(text.encode()) > longest:
        raise ProtocolError(f"{where}: {brief(text)} is longer than {longest} bytes")


def check_path(name: str, path: str, longest: int = MAX_PATH) -> None:
    """Raises ProtocolError unless it is empty or an absolute path that can exist, without ``..`` or empty parts."""
    check_text(name, path, longest)
    if path and (not path.startswith("/") or path.startswith("//") or os.path.normpath(path) != path):
        raise ProtocolError(f"{name} {brief(path)} is not an absolute path without '.', '..' and doubled slashes")


def is_beneath(path: str, root: str) -> bool:
    """Whether a checked path is really inside of ``root``, not the same."""
    return bool(root) and path.startswith(root.rstrip("/") + "/")


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises ProtocolError unless every pair can be an extended attribute of a cgroup, and all of them together."""
    most, size = MAX_METADATA
    if len(metadata) > most or len(json.dumps(dict(metadata))) > size:
        raise ProtocolError(f"the metadata has more than {most} keys or {size} bytes")
    for key, value in metadata.items():
        if not METADATA_KEY.match(key):
            raise ProtocolError(f"metadata key {brief(key)} must be 1 to 63 of a-z, 0-9 and '_', a letter first")
        check_text(f"the metadata {key!r}", value, MAX_METADATA_VALUE)


def check_place(cpus: tuple[int, ...], node: int) -> None:
    """Raises ProtocolError for CPUs or a NUMA node that no kernel has."""
    if len(cpus) > MAX_CPUS or not all(0 <= cpu < MAX_CPUS for cpu in cpus):
        raise ProtocolError(f"cpus must be numbers below {MAX_CPUS}")
    if not -1 <= node <= MAX_NODE:
        raise ProtocolError(f"node must be -1 to {MAX_NODE}, not {node}")


def check_limits(limits: Mapping[str, int | float | str]) -> None:
    """Raises ProtocolError for a limit that is not in the table: nothing else becomes a property of a scope."""
    for name, value in limits.items():
        if name not in LIMITS:
            raise ProtocolError(f"limit {brief(name)} is not one of {', '.join(LIMITS)}")
        types, low, high = LIMITS[name]
        if type(value) not in types or (not isinstance(value, str) and not low <= value <= high):
            raise ProtocolError(f"limit {name} cannot be {brief(value)}")
    if (policy := limits.get("oom_policy", "stop")) not in OOM_POLICIES:
        raise ProtocolError(f"limit oom_policy must be {', '.join(OOM_POLICIES)}, not {brief(policy)}")


def _build(kind: type[Any], body: object, where: str, newer: bool) -> Any:
    """A dataclass from a JSON object: every field known, typed, and there unless it has a default."""
    if not isinstance(body, dict):
        raise ProtocolError(f"{where} must be an object, not {type(body).__name__}")
    hints = _HINTS[kind]
    if (unknown := body.keys() - hints.keys()) and not newer:
        raise ProtocolError(f"{where} has no field {', '.join(map(brief, sorted(unknown)[:3]))}")
    known = {name: value for name, value in body.items() if name in hints}
    values = {name: _convert(hints[name], value, f"{where}.{name}", newer) for name, value in known.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ProtocolError(f"{where}: {error}") from None


def _convert(hint: Any, value: object, where: str, newer: bool) -> Any:
    """A JSON value as the type ``hint``. Raises ProtocolError if it has another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where, newer)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{index}]", newer) for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {
            _text(key, where): _convert(arguments[1], item, f"{where}[{brief(key)}]", newer)
            for key, item in value.items()
        }
    if origin is types.UnionType or origin is typing.Union:
        return _plain(arguments, value, where)
    return _plain((hint,), value, where)


def _plain(kinds: tuple[Any, ...], value: object, where: str) -> object:
    """A number, string, boolean or null of one of the ``kinds``; an int is accepted as a float."""
    accepted = (*kinds, int) if float in kinds else kinds
    if type(value) not in accepted:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ProtocolError(f"{where} must be {expected}, not {type(value).__name__}")
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # NaN is not, either
        raise ProtocolError(f"{where} is no finite number of 64 bits")
    return value


def _text(value: str, where: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can express and UTF-8 cannot. Raises ProtocolError."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError(f"{where}: {brief(value)} is not Unicode") from None
    return value
