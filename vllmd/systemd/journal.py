"""Logging: to journald with structured fields where stderr is the journal, else as readable text.

A record often quotes others (an engine's words, a name, an answer), so all of it
goes through ``printable_lines`` here, whichever part logs it.

A record's fields are given as ``log.info("...", extra={"journal": {"MODEL": "m"}})``.
The native protocol is a datagram of ``NAME=value`` lines (or, where a value has a
newline, the name, its length as 64 bits little-endian and the value), see
https://systemd.io/JOURNAL_NATIVE_PROTOCOL. No Python binding is needed for it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from typing import TextIO

from vllmd.text import printable_lines

SOCKET = "/run/systemd/journal/socket"
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
COLOURS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}\Z")
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def setup_logging(level: str | int = "info", *, identifier: str = "vllmd", stream: TextIO | None = None) -> None:
    """Give the root logger the one handler that fits where stderr goes. ``level``: a name or number of ``logging``."""
    handler = _handler(identifier, sys.stderr if stream is None else stream)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper() if isinstance(level, str) else level)


def _handler(identifier: str, stream: TextIO) -> logging.Handler:
    if not _is_journal_stream(stream):
        text = logging.StreamHandler(stream)
        text.setFormatter(TextFormatter(colour=stream.isatty()))
        return text
    try:
        return JournalHandler(identifier)
    except OSError:  # the stream is journald's but its native socket is not in our mount namespace
        prefixed = logging.StreamHandler(stream)
        prefixed.setFormatter(PrefixFormatter())
        return prefixed


def _is_journal_stream(stream: TextIO) -> bool:
    """Whether ``$JOURNAL_STREAM`` names this very stream, as systemd.exec(5) says to check."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends each record to journald as one datagram; a large one as a sealed memfd.

    It never blocks: while journald does not read, records are counted and dropped,
    and the next one that gets through says how many. Raises OSError if journald's
    socket cannot be reached.
    """

    def __init__(self, identifier: str = "vllmd", address: str = SOCKET) -> None:
        super().__init__()
        self._identifier = identifier
        self._address = address
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; if earlier ones were lost, a record of their number first."""
        try:
            if self._lost:
                self._send({"MESSAGE": f"{self._lost} log records lost while journald did not read", "PRIORITY": 4})
                self._lost = 0
            self._send(self._fields(record))
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """Close the socket to journald."""
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        return {
            "MESSAGE": printable_lines(self.format(record)),
            "PRIORITY": _priority(record),
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName or "",
            **journal_fields(record),
        }

    def _send(self, fields: Mapping[str, object]) -> None:
        data = encode({"SYSLOG_IDENTIFIER": self._identifier, **fields})
        try:
            self._send_datagram(data)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_memfd(data)

    def _send_datagram(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN):
                raise
            self._socket.connect(self._address)  # journald was restarted and has a new socket
            self._socket.send(data)

    def _send_memfd(self, data: bytes) -> None:
        fd = os.memfd_create("vllmd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
            self._socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        finally:
            os.close(fd)


class PrefixFormatter(logging.Formatter):
    """``<N>`` before every line, which journald reads as the priority of a line of stderr."""

    def format(self, record: logging.LogRecord) -> str:
        """The text, each line with its prefix."""
        prefix = f"<{_priority(record)}>"
        return "\n".join(prefix + line for line in _text(super().format(record), record).splitlines())


class TextFormatter(logging.Formatter):
    """Text for people: time, level where it matters, message, then the fields; coloured on request."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback's after it."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{self.formatTime(record, self.datefmt)} {level}{_text(super().format(record), record)}"
        code = COLOURS.get(record.levelno)
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text


def journal_fields(record: logging.LogRecord) -> dict[str, object]:
    """The record's own fields; a name that journald would refuse is left out, as journald itself would."""
    given = getattr(record, "journal", None) or {}
    shown = {name: printable_lines(value) if isinstance(value, str) else value for name, value in given.items()}
    return {name: value for name, value in shown.items() if _FIELD.match(name)}


def encode(fields: Mapping[str, object]) -> bytes:
    """The native protocol's form of the fields."""
    return b"".join(_encode_field(name, value) for name, value in fields.items())


def _encode_field(name: str, value: object) -> bytes:
    data = value if isinstance(value, bytes) else str(value).encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _priority(record: logging.LogRecord) -> int:
    """syslog's priority of the nearest level at or below the record's."""
    known = [level for level in PRIORITIES if level <= record.levelno]
    return PRIORITIES[max(known)] if known else 7


def _text(message: str, record: logging.LogRecord) -> str:
    """The message's first line with the fields after it, then what follows (a traceback)."""
    fields = " ".join(f"{name}={value}" for name, value in journal_fields(record).items())
    head, newline, rest = printable_lines(message).partition("\n")
    return f"{head}  [{fields}]{newline}{rest}" if fields else f"{head}{newline}{rest}"
