"""Where an engine's output goes, and how it is read again: the journal, or a pipe kept here."""

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
TAIL_LIMIT = 3.0  # seconds; a tail is asked for while somebody waits
TAIL_SIZE = 4 << 20  # characters of all its lines
MAX_TAILS, MAX_FOLLOWS = 32, 512  # processes of journalctl
JOURNALCTL_MEMORY = 128 << 20  # bytes of its own
END_LIMIT = 0.5  # seconds for it to end once it has closed its output
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds before another is started in the place of one that ended by itself
_CHUNK = 1 << 16
_PIPE = 1 << 20  # bytes that a pipe can hold, unless root has allowed more


class Journal:
    """journald takes the output itself, so neither daemon nor launcher can lose a line by dying.

    With the unit's name in the stream's head, every line of even the shortest life
    is attributed to the scope; journald believes it from root only. A user's own
    launcher therefore looks for the identifier instead.
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
            why = f"journald, which takes its output, does not answer at {STREAM_SOCKET}: {error.strerror}"
            raise OSError(error.errno, why) from None
        return stream.detach()

    def forget(self, instance: str) -> None:
        """Nothing to forget: the journal keeps it."""

    def tail(self, instance: str, lines: int, take: TakeLines) -> None:
        """Give the last lines once, within ``TAIL_LIMIT``, those written just now included.

        Raises OSError where too many are asked for at a time.
        """
        if self._tails >= MAX_TAILS:
            raise OSError(errno.EAGAIN, f"{MAX_TAILS} logs are being read already")
        self._tails += 1
        wanted = ("--lines", str(lines))

        def ask(*options: str, then: Callable[[Lines, bool], None]) -> None:
            try:
                _Tail(self._loop, self._journalctl(instance, *options, *wanted), lines, then)
            except OSError as error:
                log.warning("cannot run journalctl: %s", error.strerror)
                give((), True)

        def give(found: Lines, content: bool) -> None:
            if not content:  # it met a record that it cannot hold, or that takes it too long
                ask(then=lambda less, _: give(less, True))
                return
            self._tails -= 1
            take(found)

        try:
            _Tail(self._loop, ["journalctl", "--sync"], 0, lambda *_: ask("--all", then=give))
        except OSError:
            self._tails -= 1
            raise

    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]:
        """Give the last lines (``KEPT`` or more: all of them) and all further ones. Returns what ends it.

        Raises OSError where there are too many already.
        """
        if self._follows >= MAX_FOLLOWS:
            raise OSError(errno.EAGAIN, f"{MAX_FOLLOWS} logs are being followed already")
        # --lines looks from the end of the journal: of an engine that has just begun it would miss what is written
        # meanwhile (seen on 252). From the beginning on nothing is missed.
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
    """Without journald: a pipe per engine, its last lines kept, and also after its end until it is forgotten."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pipes: dict[str, _Pipe] = {}

    def open(self, instance: str) -> int:
        """A pipe for the engine's output: returns the writing end, which the caller closes."""
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


class _Pipe:
    def __init__(self, loop: Loop, fd: int) -> None:
        self.kept: deque[str] = deque(maxlen=KEPT)
        self.followers: list[TakeLines] = []
        self.ended = False
        self._loop, self._fd, self._reader, self._rate = loop, fd, LineReader(), Rate()
        os.set_blocking(fd, False)
        loop.watch(fd, self.read_once)

    def read_all(self) -> None:
        """What is there now, also if the loop has not come to it yet."""
        for _ in range(_PIPE // _CHUNK):  # an engine that goes on writing does not keep us
            if self.ended or not self._read():
                return

    def read_once(self) -> None:
        """What is there now, a chunk at most, so that a talkative engine does not keep the loop."""
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
        self.kept.extend(lines)  # all of them: the last words of an engine in a hurry tell why
        passed = self._rate.allow(lines) + (self._rate.end() if self.ended else ())
        if passed:
            for take in tuple(self.followers):
                take(passed)


class _Tail:
    """A command whose last lines are wanted, within a limit; killed after it, whatever came by then is given.

    ``take`` also gets whether the command came to its end.
    """

    def __init__(
        self, loop: Loop, argv: Sequence[str], lines: int, take: Callable[[Lines, bool], None], end: float = TAIL_LIMIT
    ) -> None:
        self._loop, self._take = loop, take
        self._records, self._lines, self._size, self._most = LineReader(LONGEST_RECORD), deque[str](), 0, lines
        self._process = _run(argv)
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._timer = loop.later(end, self._finish)
        loop.watch(self._fd, self._read)

    def _read(self) -> None:
        data = os.read(self._fd, _CHUNK)
        for record in self._records.feed(data):
            if (line := message(record)) is not None:
                self._keep(line)
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is just ending: how, tells whether that was all
                self._process.wait(END_LIMIT)
            self._finish()

    def _keep(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        while len(self._lines) > self._most or self._size > TAIL_SIZE:
            self._size -= len(self._lines.popleft())

    def _finish(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._fd)
        _end(self._process)
        self._take(tuple(self._lines), self._process.returncode == 0)


class _Follower:
    """journalctl --follow, its lines given in groups as they come.

    One that ends by itself has met a record that it cannot hold, or the kernel took its memory: another goes on
    behind what was shown, and leaves out the text of what is very long.
    """

    def __init__(self, loop: Loop, journalctl: Callable[..., list[str]], shown: Sequence[str], take: TakeLines) -> None:
        self._loop, self._journalctl, self._shown, self._take = loop, journalctl, shown, take
        self._cursor, self._pause, self._rate = "", FIRST_PAUSE, Rate(2 * BURST)  # journald has its own
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
            self._pause = FIRST_PAUSE
        lines = self._rate.allow(tuple(line for line in map(message, records) if line is not None))
        if lines:
            self._take(lines)

    def _ended(self) -> None:
        log.warning("journalctl --follow has ended by itself; going on in %g s", self._pause)
        self._close()
        self._timer = self._loop.later(self._pause, self._resume)
        self._pause = min(2 * self._pause, LAST_PAUSE)

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
        """End the following: no more lines are read or passed on."""
        if self._timer:
            self._timer.cancel()
        self._close()


def _run(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError):  # it has ended
        # It holds a record whole; the journal itself, which it maps, does not count.
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (JOURNALCTL_MEMORY, JOURNALCTL_MEMORY))
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
