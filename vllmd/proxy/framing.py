"""Where a message's body ends: by length, by chunks, or by the end of the connection. Pure.

``scan(data)`` takes the bytes as they come and returns the index in ``data`` after the body's last byte, or -1 while
the body goes on. With ``keep`` the payload, free of framing, collects in ``pieces``.

A stream is scanned at every token, so ``Chunked`` has three ways, each as correct as the last one: a lookup for one
whole chunk (``scan``), a loop over whole chunks (``_chunks``), and a state machine for everything else (``_step``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e]{0,256})?\r\n")
SIZE_LINE_PREFIX = re.compile(rb"[0-9A-Fa-f]{0,15}(?:(?<=[0-9A-Fa-f])(?:;[\t\x20-\x7e]{0,256})?\r?)?")
TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
MAX_TRAILER_BYTES = 4096
NO_RUN = re.compile(rb"(?!)")
CR, LF = b"\r\n"
HEX = frozenset(b"0123456789abcdefABCDEF")
MAX_SIZES_KEPT = 4096
_sizes: dict[bytes, int] = {}  # plain size lines, line end included -> the size; a stream has but a few of them
_joints: dict[bytes, int] = {}  # the same lines behind the line end of the chunk before them
_runs: dict[bytes, re.Pattern[bytes]] = {}  # joint -> the pattern of several chunks that each begin with it
MAX_RUN_CHUNK_BYTES, MAX_RUNS = 4096, 256  # runs are looked for of chunks up to that size, and of so many sizes


class BadFraming(ValueError):
    """The bytes are no chunked body; the message says why."""


class Framing(Protocol):
    """Finds the end of one body in the bytes as they come. Has a state, so each body needs a new one."""

    keep: bool
    pieces: list[bytes]

    def scan(self, data: bytes) -> int:
        """The index after the body's last byte, -1 if it goes on. Raises BadFraming."""

    def finished_by_eof(self) -> bool:
        """Whether the end of the connection is now a clean end of the body."""


class Length:
    """A body of ``length`` bytes."""

    __slots__ = ("keep", "left", "pieces")

    def __init__(self, length: int, *, keep: bool = False) -> None:
        self.left = length
        self.keep = keep
        self.pieces: list[bytes] = []

    def scan(self, data: bytes) -> int:
        """The index after the last of ``length`` bytes, -1 if it has not come."""
        size = len(data)
        if size < self.left:
            self.left -= size
            if self.keep:
                self.pieces.append(data)
            return -1
        end, self.left = self.left, 0
        if self.keep and end:
            self.pieces.append(data if end == size else data[:end])
        return end

    def finished_by_eof(self) -> bool:
        """Not before the last byte."""
        return False


class UntilEof:
    """A body that ends with its connection."""

    __slots__ = ("keep", "pieces")

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.pieces: list[bytes] = []

    def scan(self, data: bytes) -> int:
        """Always -1: only the end of the connection ends the body."""
        if self.keep:
            self.pieces.append(data)
        return -1

    def finished_by_eof(self) -> bool:
        """Always: no other end is possible."""
        return True


class Chunked:
    """A chunked body (RFC 9112, 7.1), strictly: line ends are CRLF, sizes are plain hex, trailers are well-formed.

    Chunk extensions and trailers are recognised and left out of ``pieces``. With ``counted``, ``seen`` counts all bytes
    and ``payload`` the body's own, so that a reader can refuse a body of tiny chunks. ``between``: the next byte begins
    a chunk's size line.
    """

    __slots__ = (
        "_held",
        "_left",
        "_line",
        "_step",
        "_trailers",
        "between",
        "counted",
        "keep",
        "payload",
        "pieces",
        "seen",
    )

    def __init__(self, *, keep: bool = False, counted: bool = False) -> None:
        self.keep = keep
        self.counted = counted
        self.pieces: list[bytes] = []
        self.seen = 0
        self.payload = 0
        self.between = True
        self._line = 5  # bytes of the last size line: a stream's are mostly as long as the one before
        self._held = b""  # a line that has not come whole yet
        self._left = 0  # bytes of the present chunk still to come
        self._trailers = 0
        # A function of the class, not a bound method: that would be a reference to itself, and each stream would leave
        # an object for the cycle collector.
        self._step: Callable[[Chunked, bytes, int], int] = Chunked._size

    def scan(self, data: bytes) -> int:
        """Walk over as many chunks as there are."""
        size = len(data)
        if self.counted:
            self.seen += size
        if self.between:  # the common case, at each event of a stream: one chunk, whole
            start = self._line
            payload = _sizes.get(data[:start], 0)
            if not payload:
                start = self._line = data.find(b"\n", 0, 18) + 1
                payload = _sizes.get(data[:start], 0)
            if payload and start + payload + 2 == size and data[-1] == LF and data[-2] == CR:
                if self.counted:
                    self.payload += payload
                if self.keep:
                    self.pieces.append(data[start:-2])
                return -1
        held = len(self._held)
        if held:
            data, self._held, size = self._held + data, b"", held + size
        pos, end = self._chunks(data, 0), -1
        while 0 <= pos < size:
            pos = self._chunks(data, self._step(self, data, pos))
            if self._step is Chunked._over:
                end = pos - held
                break
        self.between = self._step is Chunked._size and not self._held
        return end

    def finished_by_eof(self) -> bool:
        """Only the last chunk ends it."""
        return False

    @property
    def over(self) -> bool:
        """Whether the last chunk has come."""
        return self._step is Chunked._over

    def _chunks(self, data: bytes, pos: int) -> int:
        """Skip the chunks that lie whole in ``data``: the common case, in one loop.

        A stream's size lines are mostly as long as the one before, so the end of a chunk and the size line after it
        are looked up together (``joint``): 0.1 microseconds per chunk instead of 0.35. Several chunks of the same size
        are a run, whose end a regular expression finds, in a tenth of that, where nobody wants the payload.
        """
        if self._step is not Chunked._size or pos < 0:
            return pos
        sizes, joints, payload, runs = _sizes, _joints, 0, not self.keep
        while (start := data.find(b"\n", pos, pos + 18) + 1) > pos:
            line = data[pos:start]
            size, joint = sizes.get(line) or _plain_size(line), len(line) + 2
            if not size:
                break
            end = start + size
            while following := joints.get(data[end : end + joint]):
                if runs and following == size and (run := _run(data[end : end + joint], size).match(data, end)):
                    payload += (run.end() - end) // (joint + size) * size
                    end = run.end()
                    start = end - size
                    continue
                if self.keep:
                    self.pieces.append(data[start:end])
                payload += size
                start, size = end + joint, following
                end = start + size
            if data[end : end + 2] != b"\r\n":
                pos = start - joint + 2
                break  # _size looks closer
            if self.keep:
                self.pieces.append(data[start:end])
            payload += size
            pos = end + 2
        self.payload += payload
        return pos

    def _size(self, data: bytes, pos: int) -> int:
        match = SIZE_LINE.match(data, pos)
        if match is None:
            if SIZE_LINE_PREFIX.fullmatch(data, pos) is None:
                raise BadFraming(f"bad chunk size line {data[pos : pos + 20]!r}")
            return self._hold(data, pos)
        self._left = int(match[1], 16)
        self._step = Chunked._data if self._left else Chunked._trailer
        return match.end()

    def _data(self, data: bytes, pos: int) -> int:
        end = min(pos + self._left, len(data))
        if self.keep and end > pos:
            self.pieces.append(data[pos:end])
        self._left -= end - pos
        self.payload += end - pos
        if self._left:
            return -1
        self._step = Chunked._data_end
        return end

    def _data_end(self, data: bytes, pos: int) -> int:
        mark = data[pos : pos + 2]
        if mark == b"\r\n":
            self._step = Chunked._size
            return pos + 2
        if b"\r\n".startswith(mark):
            return self._hold(data, pos)
        raise BadFraming(f"a chunk is followed by {mark!r} instead of CRLF")

    def _trailer(self, data: bytes, pos: int) -> int:
        end = data.find(b"\n", pos)
        if (len(data) if end < 0 else end) - pos + self._trailers > MAX_TRAILER_BYTES:
            raise BadFraming(f"more than {MAX_TRAILER_BYTES} bytes of trailers")
        if end < 0:
            return self._hold(data, pos)
        line = data[pos : end + 1]
        if line == b"\r\n":
            self._step = Chunked._over
            return end + 1
        if line[-2:] != b"\r\n" or TRAILER_LINE.fullmatch(line, 0, len(line) - 2) is None:
            raise BadFraming(f"bad trailer line {line[:40]!r}")
        self._trailers += len(line)
        return end + 1

    def _over(self, data: bytes, pos: int) -> int:
        raise BadFraming("the body is over")

    def _hold(self, data: bytes, pos: int) -> int:
        self._held = data[pos:]
        return -1


def _run(joint: bytes, size: int) -> re.Pattern[bytes]:
    """The pattern of consecutive whole chunks of ``size`` bytes, each with ``joint`` before it."""
    run = _runs.get(joint)
    if run is None:
        if size > MAX_RUN_CHUNK_BYTES or len(_runs) >= MAX_RUNS:
            return NO_RUN
        run = _runs[joint] = re.compile(b"(?s:%b.{%d})+" % (joint, size))
    return run


def _plain_size(line: bytes) -> int:
    """The size in a size line without extensions; 0 for the last chunk's, and for any line that is not plain.

    The digits are checked first, because int() accepts 0x5, 1_0 and spaces, too.
    """
    digits = line[:-2]
    if line[-2:] != b"\r\n" or digits[:1] in b"0" or not HEX.issuperset(digits):
        return 0
    if len(_sizes) >= MAX_SIZES_KEPT:
        _sizes.clear()
        _joints.clear()
    size = int(digits, 16)
    _sizes[line] = _joints[b"\r\n" + line] = size
    return size
