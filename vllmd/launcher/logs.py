"""The destination of an engine's output, which can be read again: the journal, or a pipe to the launcher."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence

from vllmd.launcher.lines import BURST, LONGEST_RECORD, LineReader, Rate, cursor, message, shown
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.protocol import unit_of

log = logging.getLogger(__name__)
Lines = tuple[str, ...]
TakeLines = Callable[[Lines], None]

STREAM_SOCKET = "/run/systemd/journal/stdout"
KEPT = 500  # lines per engine
TAIL_SECONDS = 3.0  # for a tail, for which a user waits
MAX_TAIL_CHARACTERS = 4 << 20
MAX_TAILS, MAX_FOLLOWS = 32, 512  # processes of journalctl
JOURNALCTL_MEMORY_BYTES = 128 << 20
END_SECONDS = 0.5  # for journalctl to end once it has closed its output
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0  # before a journalctl that ended by itself is started again
_CHUNK = 1 << 16
_PIPE = 1 << 20  # bytes that a pipe can hold, unless root has allowed more


class Journal:
    """Output goes straight to journald, so no line is lost if the daemon or the launcher dies.

    The stream's head has the unit's name, so that every line is attributed to the scope, even of an engine that ends at
    once. journald accepts that name from root only; a user's own launcher matches the identifier instead.
    """

    def __init__(self, loop: Loop, *, user: bool) -> None:
        self._loop = loop
        self._user = user
        self._tails = self._follows = 0

    def open(self, instance: str) -> int:
        """A descriptor for stdout and stderr. Raises OSError where there is no journald."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(STREAM_SOCKET)
            stream.shutdown(socket.SHUT_RD)
            info, take_prefix, no = 6, 1, 0
            head = [instance, unit_of(instance), info, take_prefix, no, no, no]  # no syslog, kmsg, console
            stream.sendall("".join(f"{line}\n" for line in head).encode())
        except OSError as error:
            stream.close()
            message = f"journald, for the engine's output, does not answer at {STREAM_SOCKET}: {error.strerror}"
            raise OSError(error.errno, message) from None
        return stream.detach()

    def forget(self, instance: str) -> None:
        """Do nothing: the journal has limits of its own."""

    def tail(self, instance: str, lines: int, take: TakeLines) -> None:
        """Call ``take`` once, within ``TAIL_SECONDS``, with the last lines up to this moment.

        Raises OSError if too many logs are being read.
        """
        if self._tails >= MAX_TAILS:
            raise OSError(errno.EAGAIN, f"{MAX_TAILS} logs are being read already")
        self._tails += 1

        def read(*options: str, then: Callable[[Lines, bool], None]) -> None:
            try:
                argv = self._journalctl(instance, *options, "--lines", str(lines))
                _Tail(self._loop, argv, lines, then)
            except OSError as error:
                log.warning("cannot run journalctl: %s", error.strerror)
                finish((), True)

        def finish(found: Lines, complete: bool) -> None:
            if not complete:  # a record was too large or took too long: without --all journalctl leaves its text out
                read(then=lambda less, _: finish(less, True))
                return
            self._tails -= 1
            take(found)

        try:
            _Tail(self._loop, ["journalctl", "--sync"], 0, lambda *_: read("--all", then=finish))
        except OSError:
            self._tails -= 1
            raise

    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]:
        """Call ``take`` with the last lines (``KEPT`` or more: all) and all further ones. Returns the function to stop.

        Raises OSError if too many logs are being followed.
        """
        if self._follows >= MAX_FOLLOWS:
            raise OSError(errno.EAGAIN, f"{MAX_FOLLOWS} logs are being followed already")
        # --lines searches from the end of the journal, and misses lines that are written meanwhile (seen on 252). For
        # an engine that has just begun, everything from the beginning on misses nothing.
        shown = ["--no-tail"] if lines >= KEPT else ["--lines", str(lines)]
        follower = _Follower(self._loop, lambda *options: self._journalctl(instance, *options), shown, take)
        self._follows += 1
        following = [follower]

        def stop() -> None:
            while following:
                following.pop().stop()
                self._follows -= 1

        return stop

    def _journalctl(self, instance: str, *options: str) -> list[str]:
        identity = [f"SYSLOG_IDENTIFIER={instance}", f"_UID={os.getuid()}"]
        match = identity if self._user else [f"_SYSTEMD_UNIT={unit_of(instance)}"]
        shape = ["--output=json", "--output-fields=MESSAGE", "--quiet", "--no-pager"]
        return ["journalctl", *shape, *options, *match]


class Pipes:
    """Without journald: a pipe per engine, and its last lines, which are kept for a while after its end."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pipes: dict[str, _Pipe] = {}

    def open(self, instance: str) -> int:
        """A pipe for the engine's output: returns the writing end, which the caller closes."""
        reader, writer = os.pipe()
        self._pipes[instance] = _Pipe(self._loop, reader)
        return writer

    def forget(self, instance: str) -> None:
        """Drop the lines of ended engines but the last eight."""
        ended = [name for name, pipe in self._pipes.items() if pipe.ended]
        for name in ended[:-8]:
            del self._pipes[name]

    def tail(self, instance: str, lines: int, take: TakeLines) -> None:
        """Call ``take`` at once with the last lines."""
        pipe = self._pipes.get(instance)
        if pipe:
            pipe.read_all()
        take(tuple(pipe.kept)[-lines:] if pipe and lines > 0 else ())

    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]:
        """Call ``take`` with the last lines and all further ones. Returns the function to stop."""
        pipe = self._pipes.get(instance)
        if pipe is None:
            return lambda: None
        self.tail(instance, lines, take)
        pipe.followers.append(take)
        return lambda: pipe.followers.remove(take)


class _Pipe:
    def __init__(self, loop: Loop, fd: int) -> None:
        self.kept: deque[str] = deque(maxlen=KEPT)
        self.followers: list[TakeLines] = []
        self.ended = False
        self._loop, self._fd, self._reader, self._rate = loop, fd, LineReader(), Rate()
        os.set_blocking(fd, False)
        loop.watch(fd, self.read_once)

    def read_all(self) -> None:
        """Read all that is in the pipe now, before the loop comes to it."""
        for _ in range(_PIPE // _CHUNK):  # bounded: the engine may go on writing
            if self.ended or not self._read():
                return

    def read_once(self) -> None:
        """Read one chunk, so that an engine that writes much does not hold the loop."""
        self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return False
        self.ended = not data
        self._take(tuple(map(shown, self._reader.feed(data) if data else self._reader.end())))
        if self.ended:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
        return bool(data)

    def _take(self, lines: Lines) -> None:
        self.kept.extend(lines)  # whatever the rate: an engine's last lines tell why it failed
        passed = self._rate.allow(lines) + (self._rate.end() if self.ended else ())
        if passed:
            for take in tuple(self.followers):
                take(passed)


class _Tail:
    """Runs a command for its last lines, and kills it after ``seconds``.

    ``take`` gets the lines so far, and whether the command ended by itself with status 0.
    """

    def __init__(
        self,
        loop: Loop,
        argv: Sequence[str],
        lines: int,
        take: Callable[[Lines, bool], None],
        seconds: float = TAIL_SECONDS,
    ) -> None:
        self._loop, self._take = loop, take
        self._records, self._lines, self._size, self._most = LineReader(LONGEST_RECORD), deque[str](), 0, lines
        self._process = _run(argv)
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._timer = loop.later(seconds, self._finish)
        loop.watch(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        for record in self._records.feed(data):
            if (line := message(record)) is not None:
                self._keep(line)
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is just ending; its status is needed
                self._process.wait(END_SECONDS)
            self._finish()

    def _keep(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        while len(self._lines) > self._most or self._size > MAX_TAIL_CHARACTERS:
            self._size -= len(self._lines.popleft())

    def _finish(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._fd)
        _end(self._process)
        self._take(tuple(self._lines), self._process.returncode == 0)


class _Follower:
    """Runs journalctl --follow, and passes its lines on in groups as they come.

    If it ends by itself, a record was too large for its memory limit, or the kernel killed it for memory: it is started
    again behind the last record, without --all, so that it leaves the text of very long records out.
    """

    def __init__(self, loop: Loop, journalctl: Callable[..., list[str]], shown: Sequence[str], take: TakeLines) -> None:
        self._loop, self._journalctl, self._shown, self._take = loop, journalctl, shown, take
        self._cursor, self._pause, self._rate = "", MIN_PAUSE_SECONDS, Rate(2 * BURST)  # journald limits to BURST
        self._timer: Timer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._begin("--all", *shown)

    def _begin(self, *options: str) -> None:
        self._records = LineReader(LONGEST_RECORD)
        self._process = _run(self._journalctl(*options, "--follow"))
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._loop.watch(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        if not data:
            self._ended()
            return
        records = list(self._records.feed(data))
        if records:
            self._cursor = cursor(records[-1]) or self._cursor
            self._pause = MIN_PAUSE_SECONDS
        lines = self._rate.allow(tuple(line for line in map(message, records) if line is not None))
        if lines:
            self._take(lines)

    def _ended(self) -> None:
        log.warning("journalctl --follow has ended by itself; it is started again in %g s", self._pause)
        self._close()
        self._timer = self._loop.later(self._pause, self._resume)
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)

    def _resume(self) -> None:
        try:
            self._begin(*([f"--after-cursor={self._cursor}"] if self._cursor else self._shown))
        except OSError as error:
            log.warning("cannot run journalctl: %s", error.strerror)
            self._timer = self._loop.later(self._pause, self._resume)

    def _close(self) -> None:
        if self._process:
            self._loop.unwatch(self._fd)
            _end(self._process)
            self._process = None

    def stop(self) -> None:
        """Stop: no more lines are read or passed on."""
        if self._timer:
            self._timer.cancel()
        self._close()


def _run(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError):  # it has ended
        # It reads a whole record into memory, of any size; the journal's files, which it maps, do not count.
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (JOURNALCTL_MEMORY_BYTES, JOURNALCTL_MEMORY_BYTES))
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
