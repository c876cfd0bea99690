"""Read-ahead: weight files of the replica that is next in line are read into the page cache while others make room.

A swap has two halves that need different things: its victims drain and fall asleep, which takes the device, and its
target reads its files, which takes the disk. And a start has two: imports, and the weights. So files are read from the
moment at which the core says who is next (``commands.ReadAhead``), or a start is begun, until the engine has read
them itself, or is not to come any more.

What is read is what the engine will read, in its order. It is never more than the page cache can take without having to
give up anything else that was promised memory: neither what sleeps at level 1 nor what is about to. A file that is
there already is passed over. One thread does all of it, at low priority, and piece by piece, so that it can be called
off; pages go from the disk to the cache and are not copied. A file system that does not answer costs that one thread
and what it would have saved, nothing else. Files that the daemon's user may not read are the engine's business.

Pages are charged to the control group of the process that reads: the service's ``Memory:`` in ``systemctl status``
shows them, though they are the kernel's to take back at any time. A limit of the service bounds what is read.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vllmd.core import commands, events
from vllmd.engines.weight_files import WeightFile
from vllmd.foreign import Folder, Unreadable
from vllmd.place import free_memory
from vllmd.sizes import GiB, in_words

log = logging.getLogger("vllmd.engines")

PIECE = 16 << 20  # bytes after which the reading thread looks whether it is to stop
AHEAD = 4 * PIECE  # bytes that the kernel is asked for in advance: as many requests as loaders have under way
PROBES = 1 << 20  # bytes between two pages that are looked for in the cache
RESERVE = GiB  # bytes of memory that are left alone
LINGER = 1.0  # seconds for which the thread waits for more
NICE = 15  # which lowers its priority on the disk as well

Files = Callable[[str], Sequence[WeightFile]]  # replica -> what its engine will read; may take its time
OVER = (events.EngineReady, events.EngineStartFailed, events.EngineAwake, events.EngineWakeFailed, events.EngineStopped,
        events.EngineExited)  # fmt: skip


@dataclass(eq=False)
class _Work:
    """Reading for one replica. ``host_memory``: bytes that others take meanwhile."""

    replica: str
    host_memory: int
    over: threading.Event = field(default_factory=threading.Event)
    read: int = 0  # bytes that came from the disk
    cached: int = 0  # bytes that were there already


class ReadAhead:
    """Reads what the next engines will read. Its methods are called in the event loop and never wait."""

    def __init__(
        self, files: Files, wanted: Callable[[], bool] = lambda: True, free: Callable[[], int] = free_memory
    ) -> None:
        """``wanted``: whether the configuration has it on. ``free``: bytes of memory that are available."""
        self._files = files
        self._wanted = wanted
        self._free = free
        self._works: dict[str, _Work] = {}  # by replica, until its engine is up, or not to come
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._busy = threading.Lock()  # held by the thread that reads

    # -- what the core says, and what becomes of engines

    def begin(self, command: commands.ReadAhead) -> None:
        """A replica is next in line: read its files."""
        self._begin(command.replica, command.host_memory)

    def stop(self, command: commands.StopReadAhead) -> None:
        """A replica is no longer next in line: stop reading its files."""
        self._end(command.replica)

    def starting(self, command: commands.StartEngine | commands.WakeEngine) -> None:
        """A replica's engine starts, or wakes from where its weights are not in memory."""
        if isinstance(command, commands.StartEngine) or command.level == 2:
            self._begin(command.replica, 0)

    def on_event(self, event: events.Event) -> None:
        """An engine is up, or gone: what is not read by now is of no use."""
        if isinstance(event, OVER):
            self._end(event.replica)

    def close(self) -> None:
        """Stop reading for every replica."""
        for replica in list(self._works):
            self._end(replica)

    def _begin(self, replica: str, host_memory: int) -> None:
        if replica in self._works or not self._wanted():
            return
        work = self._works[replica] = _Work(replica, host_memory)
        self._queue.put(work)
        if self._busy.acquire(blocking=False):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def _end(self, replica: str) -> None:
        if work := self._works.pop(replica, None):
            work.over.set()

    # -- in the thread

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            try:
                self._do(self._queue.get(timeout=LINGER))
            except queue.Empty:
                self._busy.release()
                # More work may have been queued between the two, by a caller who found the thread still busy.
                if self._queue.empty() or not self._busy.acquire(blocking=False):
                    return

    def _do(self, work: _Work) -> None:
        began = time.monotonic()
        try:
            if not work.over.is_set():
                self._read(work)
        except Exception:  # a defect of ours; the engine reads them itself
            log.exception("%s: its files cannot be read ahead", work.replica)
        if work.read:
            log.info("%s: %s of its files were read ahead in %.1f s", work.replica, in_words(work.read),
                     time.monotonic() - began, extra={"journal": {"MODEL": work.replica}})  # fmt: skip

    def _read(self, work: _Work) -> None:
        for file in self._files(work.replica):
            try:
                with Folder(file.path.parent, file.root).open(file.path.name) as opened:
                    for start, length in pieces(opened.fd, opened.size):
                        if work.over.is_set():
                            return
                        if work.read + work.cached + length > self._free() - RESERVE - work.host_memory:
                            log.info("%s: no more of its files is read ahead: memory is short", work.replica)
                            return
                        if is_cached(opened.fd, start, length):
                            work.cached += length
                            continue
                        read = read_piece(opened.fd, start, length)
                        work.read += read
                        if read < length:  # the file is shorter than it was when it was opened
                            break
            except (OSError, Unreadable) as error:
                log.debug("%s: %s is not read ahead: %s", work.replica, file.path.name, error)


def pieces(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The start and the length of each piece of a file; the kernel is asked to read the next ones."""
    advised = 0
    for start in range(0, size, PIECE):
        while advised < min(size, start + AHEAD):
            if not is_cached(fd, advised, min(PIECE, size - advised)):
                os.posix_fadvise(fd, advised, PIECE, os.POSIX_FADV_WILLNEED)
            advised += PIECE
        yield start, min(PIECE, size - start)


def is_cached(fd: int, start: int, length: int) -> bool:
    """Whether a piece of a file is in the page cache, by a look at some of its pages."""
    byte = bytearray(1)
    try:
        return all(os.preadv(fd, [byte], at, os.RWF_NOWAIT) for at in (*range(start, start + length, PROBES),
                                                                       start + length - 1))  # fmt: skip
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return False


def read_piece(fd: int, start: int, length: int) -> int:
    """Have a piece of a file read into the page cache, without copying it. Returns the bytes that were read."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < length:
            sent = os.sendfile(null, fd, start + done, length - done)
            if not sent:
                break
            done += sent
        return done
    finally:
        os.close(null)
