"""Files that somebody else may write: one reader for all of them.

A model's folder belongs to whoever downloaded it, and the engines' cache to programs that run a model's own code. So a
``config.json`` may be a FIFO (opening it waits for ever), a link to ``/dev/zero`` (reading it never ends) or to a file
that its author may not read himself, nested a million deep, or 100 MB of brackets that become gigabytes once parsed.

What is true of every file that is read here, whoever wrote it:

- It is looked at before it is opened (``O_PATH`` opens nothing): a device or a FIFO is never touched. What is read then
  is that very file, by its descriptor, whatever meanwhile became of the name.
- Links are followed, for the Hugging Face cache is made of them (``snapshots/HASH/config.json`` leads to
  ``blobs/...``). With a ``root`` they must end beneath it; this, too, is asked of the descriptor.
- Bytes, names, values, nesting and seconds are bounded: of one file by constants, of all that is read for one model by
  a ``Budget``. What is larger than some MiB is stepped through and never held (``Members``), so that no single call
  keeps the interpreter from answering clients for long.
- What is wrong raises ``Unreadable`` (or OSError), with words that quote little and hold no control characters.

A file system that does not answer holds a thread in the kernel, which nothing ends: ``within`` leaves it behind.
"""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vllmd import sizes
from vllmd.frozen import mutable

S = TypeVar("S")
T = TypeVar("T")

JSON_SIZE = 8 << 20  # bytes of a JSON file that is read whole
JSON_VALUES = 400_000  # in it: a dict of one member takes 250 bytes of memory for 8 of text
DEPTH = 100  # of nesting
NAMES = 20_000  # in one folder
PIECE = 256 << 10  # bytes that are read at a time of what is stepped through
LONGEST = 1 << 20  # characters of a single value in it
STUCK = 4  # threads that may be held by file systems that do not answer; then nothing more is begun

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_A_VALUE = re.compile(r"[ \t\n\r]*[,:\]}]")


class Unreadable(ValueError):
    """A file is not what it should be; the message names the file and says what is wrong, readable."""


def quoted(value: object, length: int = 80) -> str:
    """A foreign text as one that can be shown: in quotes, without control characters, not longer than ``length``."""
    text = repr(value if isinstance(value, int | float | str | None) else type(value).__name__)
    return text if len(text) <= length else f"{text[: length - 4]}...{text[-1]}"


def shown(name: str, length: int = 120) -> str:
    """A file's name as it is, if it can be shown so; else quoted."""
    return name if name.isprintable() and 0 < len(name) <= length else quoted(name, length)


def about(subject: str, error: OSError | Unreadable) -> str:
    """What is wrong as a sentence about ``subject``."""
    text = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
    if text.startswith(subject):
        return text
    return f"{subject} {text}" if text.startswith(("is ", "has ")) else f"{subject}: {text}"


@mutable
class Budget:
    """What may still be spent on one model's files."""

    size: int = 512 << 20  # bytes
    seconds: float = 10.0
    _ends: float = field(init=False)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.seconds

    def take(self, size: int) -> None:
        """Before ``size`` bytes are read. Raises Unreadable when it is spent."""
        self.size -= size
        if self.size < 0:
            raise Unreadable("its files have more to read than any model's")
        if time.monotonic() > self._ends:
            raise Unreadable(f"its files were not read within {self.seconds:g} s")


class Folder:
    """A folder that somebody else may write. ``root``: links may not lead out of it; None lets them lead anywhere."""

    def __init__(self, path: Path, root: Path | None = None, budget: Budget | None = None) -> None:
        self.path = path
        self.root = Path(os.path.realpath(root)) if root else None
        self.budget = budget or Budget()

    def names(self) -> list[str]:
        """What is in it, sorted. Raises OSError, Unreadable."""
        self.budget.take(0)
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._beneath(handle, self.path.name)
            found = []
            with os.scandir(handle) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) > NAMES:
                        raise Unreadable(f"{shown(self.path.name)} has more than {NAMES} names in it")
        finally:
            os.close(handle)
        return sorted(found)

    def size(self, name: str) -> int | None:
        """Bytes of a regular file; None if it is none, or is not here (a blob that is still being downloaded)."""
        try:
            with self._opened_path(name) as handle:
                return os.fstat(handle).st_size
        except (OSError, Unreadable):
            return None

    def sub(self, name: str) -> Folder:
        """A folder in it, for which the same holds."""
        return Folder(self.path / name, self.root, self.budget)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[File]:
        """A regular file in it. Raises OSError, Unreadable."""
        with self._opened_path(name) as handle:
            # The kernel opens what the handle means, not what the name means by now.
            try:
                fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                error.filename = str(self.path / name)  # its reader knows no handles
                raise
        try:
            yield File(fd, os.fstat(fd).st_size, self.budget)
        finally:
            os.close(fd)

    def read(self, name: str, limit: int) -> bytes:
        """All of a file that has at most ``limit`` bytes. Raises OSError, Unreadable."""
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise Unreadable(f"{shown(name)} is larger than {sizes.in_words(limit)}")
        return data

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of at most ``JSON_SIZE``. Raises Unreadable."""
        try:
            return parse(self.read(name, JSON_SIZE))
        except (OSError, Unreadable) as error:
            raise Unreadable(about(shown(name), error)) from error

    @contextlib.contextmanager
    def _opened_path(self, name: str) -> Iterator[int]:
        """A handle of a regular file that is where it may be; nothing has been opened by it."""
        self.budget.take(0)
        handle = os.open(self.path / name, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Unreadable(f"{shown(name)} is no regular file")
            self._beneath(handle, name)
            yield handle
        finally:
            os.close(handle)

    def _beneath(self, handle: int, name: str) -> None:
        if self.root and not Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(self.root):
            raise Unreadable(f"{shown(name)} is a link that leads out of {shown(str(self.root))}")


@mutable
class File:
    """An open one. ``size``: bytes, as it says itself."""

    fd: int
    size: int
    budget: Budget

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size``; fewer at the end only. Raises OSError, Unreadable."""
        pieces: list[bytes] = []
        while size > 0:
            self.budget.take(min(size, PIECE))
            piece = os.read(self.fd, min(size, PIECE))
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. Raises Unreadable, also for one that would take far more memory than its text."""
    if data.count(b",") + data.count(b"{") + data.count(b"[") > JSON_VALUES:
        raise Unreadable(f"has more than {JSON_VALUES} values")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not JSON: {_told(error)}") from error
    if not isinstance(content, dict):
        raise Unreadable("is no JSON object")
    level: list[Any] = [content]
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return content
    raise Unreadable(f"is nested more than {DEPTH} deep")


def _told(error: Exception) -> str:
    """What the parser says; never the text itself."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "nested too deep" if isinstance(error, RecursionError) else type(error).__name__


def members(read: Callable[[int], bytes], into: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Step through a JSON object of any size: the path and the value of each member.

    Members called as in ``into`` whose values are objects are entered, and yield their own members by a path of two.
    ``read`` gives the next bytes, none at the end. Raises Unreadable; what was yielded before is true all the same.
    """
    text = _Text(read)
    try:
        if text.next() != "{":
            raise Unreadable("is no JSON object")
        yield from _members(text, (), into)
        if text.next():
            raise Unreadable("is not JSON: something follows its end")
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not JSON: {_told(error)}") from error


def _members(text: _Text, path: tuple[str, ...], into: frozenset[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The members of the object that is open, up to its end."""
    mark = text.next()
    while mark != "}":
        name = text.value(mark)
        if not isinstance(name, str) or text.next() != ":":
            raise Unreadable("is not JSON: a member without a name")
        mark = text.next()
        if mark == "{" and not path and name in into:
            yield from _members(text, (name,), into)
        else:
            yield (*path, name), text.value(mark)
        mark = text.next()
        if mark == ",":
            mark = text.next()
            if mark == "}":
                raise Unreadable("is not JSON: a comma before the end")
        elif mark != "}":
            raise Unreadable("is not JSON: no comma between two members")


class _Text:
    """A window that moves over a text."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is no space, which is passed; "" at the end."""
        while True:
            at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches anywhere
            if at < len(self._text):
                self._at = at + 1
                return self._text[at]
            self._at = at
            if not self._more():
                return ""

    def value(self, first: str) -> Any:
        """The value whose first character was just passed."""
        self._at -= len(first)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if self._ended or _AFTER_A_VALUE.match(self._text, end):  # else a number may go on in the next piece
                    self._at = end
                    return value
            except (ValueError, RecursionError):
                if self._ended:
                    raise
            if len(self._text) - self._at > LONGEST:
                raise Unreadable(f"is not JSON, or has a value of more than {LONGEST} characters")
            self._more()

    def _more(self) -> bool:
        data = self._read(PIECE)
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, self._ended)
        self._at = 0
        return bool(data)


_stuck = 0
_counting = threading.Lock()
_guarded = threading.local()  # has ``by_whoever_waits`` in a thread of ``each_within``


class _Thread:
    """A thread that reads files and may be left behind. Until it ends it is counted then, in ``_stuck``."""

    def __init__(self) -> None:
        self.over = threading.Event()  # the work has ended, or nobody waits for it any more
        self.failure: BaseException | None = None
        self._late = False

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            global _stuck
            try:
                work()
            except BaseException as error:  # whatever it is, it belongs to whoever waits
                self.failure = error
            with _counting:
                self.over.set()
                _stuck -= self._late

        threading.Thread(target=run, name="files", daemon=True).start()

    def leave(self) -> bool:
        """Wait no longer. Returns whether the work has not ended."""
        global _stuck
        with _counting:
            self._late = not self.over.is_set()
            _stuck += self._late
            self.over.set()
        return self._late


def each_within(seconds: float, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """What ``function`` returns for each item; what it raises is raised. In one thread as long as that comes along.

    A thread for each of ten thousand models takes ten seconds of CPU time. An item at which nothing comes along for
    ``seconds`` is tried once more by itself, as are those behind it: what reads files there has limits of its own
    (``within``), which are not heeded in the common thread. One that hangs counts as one of theirs that do.
    """
    if _stuck >= STUCK:
        return [function(item) for item in items]
    came: list[T] = []

    def work() -> None:
        _guarded.by_whoever_waits = True
        for item in items:
            if thread.over.is_set():
                break
            came.append(function(item))

    thread = _Thread()
    thread.start(partial(contextvars.copy_context().run, work))
    before = -1
    while not thread.over.wait(seconds) and len(came) > before:
        before = len(came)
    thread.leave()
    if thread.failure:
        raise thread.failure
    done = came[: len(items)]
    return [*done, *(function(item) for item in items[len(done) :])]


def within(seconds: float, function: Callable[[], T]) -> T:
    """What ``function`` returns or raises. Raises Unreadable if it takes longer; its thread is then left behind.

    To be called from a thread: it waits.
    """
    if getattr(_guarded, "by_whoever_waits", False):
        return function()
    if _stuck >= STUCK:
        raise Unreadable("the file system does not answer: nothing more is read")
    came: list[T] = []
    thread = _Thread()
    thread.start(lambda: came.append(function()))
    thread.over.wait(seconds)
    if thread.leave():
        raise Unreadable(f"its files could not be read within {seconds:g} s")
    if thread.failure:
        raise thread.failure
    return came[0]
