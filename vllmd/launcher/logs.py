"""Where an engine's output goes, and how it is read again: the journal, or a pipe kept here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence

from vllmd.launcher.loop import Loop
from vllmd.launcher.protocol import clip, unit_of
from vllmd.text import printable

log = logging.getLogger(__name__)
Lines = tuple[str, ...]
TakeLines = Callable[[Lines], None]

STREAM_SOCKET = "/run/systemd/journal/stdout"
KEPT = 500  # lines per engine
TAIL_LIMIT = 3.0  # seconds; a tail is asked for while somebody waits
_CHUNK = 1 << 16


class Journal:
    """journald takes the output itself, so neither daemon nor launcher can lose a line by dying.

    With the unit's name in the stream's head, every line of even the shortest life
    is attributed to the scope; journald believes it from root only. A user's own
    launcher therefore looks for the identifier instead.
    """

    def __init__(self, loop: Loop, *, user: bool) -> None:
        self._loop = loop
        self._user = user

    def open(self, instance: str) -> int:
        """A descriptor for stdout and stderr. Raises OSError where there is no journald."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(STREAM_SOCKET)
            stream.shutdown(socket.SHUT_RD)
            info, take_prefix, no = 6, 1, 0
            head = [instance, unit_of(instance), info, take_prefix, no, no, no]  # no syslog, kmsg, console
            stream.sendall("".join(f"{line}\n" for line in head).encode())
        except OSError:
            stream.close()
            raise
        return stream.detach()

    def forget(self, instance: str) -> None:
        """Nothing to forget: the journal keeps it."""

    def tail(self, instance: str, lines: int, take: TakeLines) -> None:
        """Give the last lines once, within ``TAIL_LIMIT``, those written just now included."""

        def synced(_: bytes) -> None:
            _Command(self._loop, self._journalctl(instance, "--lines", str(lines)), lambda out: take(_messages(out)))

        _Command(self._loop, ["journalctl", "--sync"], synced)

    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]:
        """Give the last lines (``KEPT`` or more: all of them) and all further ones. Returns what ends it."""
        # --lines looks from the end of the journal: of an engine that has just begun it would miss what is written
        # meanwhile (seen on 252). From the beginning on nothing is missed.
        shown = ["--no-tail"] if lines >= KEPT else ["--lines", str(lines)]
        return _Follower(self._loop, self._journalctl(instance, *shown, "--follow"), take).stop

    def _journalctl(self, instance: str, *options: str) -> list[str]:
        identity = [f"SYSLOG_IDENTIFIER={instance}", f"_UID={os.getuid()}"]
        match = identity if self._user else [f"_SYSTEMD_UNIT={unit_of(instance)}"]
        shape = ["--output=json", "--output-fields=MESSAGE", "--all", "--quiet", "--no-pager"]
        return ["journalctl", *shape, *options, *match]


class Pipes:
    """Without journald: a pipe per engine, its last lines kept, and also after its end until it is forgotten."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pipes: dict[str, _Pipe] = {}

    def open(self, instance: str) -> int:
        """The writing end."""
        reader, writer = os.pipe()
        self._pipes[instance] = _Pipe(self._loop, reader)
        return writer

    def forget(self, instance: str) -> None:
        """Keep its lines a while longer, but not those of ever more ended engines."""
        ended = [name for name, pipe in self._pipes.items() if pipe.ended]
        for name in ended[:-8]:
            del self._pipes[name]

    def tail(self, instance: str, lines: int, take: TakeLines) -> None:
        """Give the last lines at once."""
        pipe = self._pipes.get(instance)
        if pipe:
            pipe.read_all()
        take(tuple(pipe.kept)[-lines:] if pipe and lines > 0 else ())

    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]:
        """Give the last lines and all further ones. Returns what ends it."""
        pipe = self._pipes.get(instance)
        if pipe is None:
            return lambda: None
        self.tail(instance, lines, take)
        pipe.followers.append(take)
        return lambda: pipe.followers.remove(take)


class _LineSplitter:
    """Bytes to lines of text; an endless line is cut so that it cannot fill the memory."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Lines:
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _CHUNK:
            whole.append(self._rest)
            self._rest = b""
        return tuple(map(shown, whole))

    def end(self) -> Lines:
        return self.feed(b"\n") if self._rest else ()


class _Pipe:
    def __init__(self, loop: Loop, fd: int) -> None:
        self.kept: deque[str] = deque(maxlen=KEPT)
        self.followers: list[TakeLines] = []
        self.ended = False
        self._loop, self._fd, self._splitter = loop, fd, _LineSplitter()
        os.set_blocking(fd, False)
        loop.watch(fd, self.read_once)

    def read_all(self) -> None:
        """What is there now, also if the loop has not come to it yet."""
        while not self.ended and self._read():
            pass

    def read_once(self) -> None:
        """What is there now, a chunk at most, so that a talkative engine does not keep the loop."""
        self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return False
        self._take(self._splitter.feed(data) if data else self._splitter.end())
        if not data:
            self.ended = True
            self._loop.unwatch(self._fd)
            os.close(self._fd)
        return bool(data)

    def _take(self, lines: Lines) -> None:
        self.kept.extend(lines)
        if lines:
            for take in tuple(self.followers):
                take(lines)


class _Command:
    """A command whose whole output is wanted, within a limit; killed after it, whatever came by then is given."""

    def __init__(self, loop: Loop, argv: Sequence[str], take: Callable[[bytes], None]) -> None:
        self._loop, self._take, self._output = loop, take, b""
        self._process = _run(argv)
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._timer = loop.later(TAIL_LIMIT, self._finish)
        loop.watch(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        self._output += data
        if not data:
            self._finish()

    def _finish(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._fd)
        _end(self._process)
        self._take(self._output)


class _Follower:
    """journalctl --follow, its lines given in groups as they come."""

    def __init__(self, loop: Loop, argv: Sequence[str], take: TakeLines) -> None:
        self._loop, self._take, self._splitter = loop, take, _JsonSplitter()
        self._process = _run(argv)
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        loop.watch(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        if not data:
            log.warning("journalctl --follow has ended by itself")
            self.stop()
        elif lines := self._splitter.feed(data):
            self._take(lines)

    def stop(self) -> None:
        """No more lines."""
        if self._process.returncode is None:
            self._loop.unwatch(self._fd)
            _end(self._process)


class _JsonSplitter:
    """journalctl's records, one JSON object per line, to the lines that they hold."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Lines:
        whole, _, self._rest = (self._rest + data).rpartition(b"\n")
        return _messages(whole)


def _messages(records: bytes) -> Lines:
    lines = []
    for record in records.splitlines():
        with contextlib.suppress(ValueError):
            message = json.loads(record).get("MESSAGE")
            data = bytes(message) if isinstance(message, list) else str(message or "").encode(errors="replace")
            lines.append(shown(data))
    return tuple(lines)


def shown(line: bytes) -> str:
    """An engine's line as everybody gets it, the daemon, its log files and answers, and people's terminals.

    Of a progress bar that was written over again and again, what it came to; no escape sequences; not longer than
    a packet can hold.
    """
    text = clip(line.decode(errors="replace").rstrip("\r"))
    return clip(printable(text.rpartition("\r")[2]))


def _run(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
