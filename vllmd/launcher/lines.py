"""Split an engine's output into lines, with a maximum length and in linear time, and limit their rate.

Engines are not trusted, and the launcher has one thread and the memory of a service of root's: a line without an end, a
record of a gigabyte, or a line that arrives byte by byte must cost no more than its bytes. So a reader keeps only the
beginning of a line, counts the rest, and scans each byte once.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator

from vllmd.frozen import frozen
from vllmd.launcher.protocol import MAX_LINE, clip
from vllmd.text import printable

LONGEST = 4 * MAX_LINE  # bytes of a line that are kept: a character has four at most
LONGEST_RECORD = 256 << 10  # bytes of a journal's record; one of MAX_LINE characters is smaller, however it is written
BURST, PERIOD = 10_000, 30.0  # lines in so many seconds: journald's own limit for a unit
_TEXT = re.compile(rb'"MESSAGE"\s*+:\s*+"((?:[^"\\]|\\.)*+)')
_BYTES = re.compile(rb'"MESSAGE"\s*+:\s*+\[([0-9, ]*+)')
_CURSOR = re.compile(rb'"__CURSOR"\s*+:\s*+"([^"\\]{1,500}+)"')


@frozen
class Line:
    """The beginning of a line, and how many bytes it had."""

    kept: bytes
    length: int


class LineReader:
    """Splits bytes, which come in pieces, into lines."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._kept = bytearray()
        self._length = 0
        self._returned = False  # the line so far ends with a carriage return: the next character overwrites it

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that end in ``data``."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._take(data[start:end])
            yield self._line()
            start = end + 1
        self._take(data[start:])

    def end(self) -> Iterator[Line]:
        """The last line, if it has no line end."""
        if self._length:
            yield self._line()

    def _take(self, piece: bytes) -> None:
        """Add a piece to the line. Text before a carriage return, which progress bars overwrite, is dropped."""
        text = piece.rstrip(b"\r")
        returned = len(text) < len(piece)
        if not text:
            self._returned |= returned
            return
        written_over = text.rfind(b"\r") + 1
        if written_over or self._returned:
            self._kept.clear()
            self._length = 0
        piece = text[written_over:]
        self._returned = returned
        self._length += len(piece)
        room = self._longest - len(self._kept)
        if room > 0:
            self._kept.extend(piece[:room])

    def _line(self) -> Line:
        line = Line(bytes(self._kept), self._length)
        self._kept.clear()
        self._length, self._returned = 0, False
        return line


def shown(line: Line) -> str:
    """An engine's line as printable text, clipped: for the daemon, its log files and answers, and terminals."""
    return _shown(line.kept, line.length)


def _shown(kept: bytes, length: int) -> str:
    text = kept.decode(errors="replace").rstrip("\r")
    text = printable(text.rpartition("\r")[2][: MAX_LINE + 1])
    return f"{text[:MAX_LINE]}... [{length} bytes]" if length > len(kept) else clip(text)


def message(record: Line) -> str | None:
    """The line in a record of journalctl's JSON; None if there is none."""
    if record.length > len(record.kept):
        return _shown(_beginning(record.kept), record.length)
    try:
        value = json.loads(record.kept)["MESSAGE"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if value is None:
        return "[a line too long to be shown here; journalctl shows it]"
    while isinstance(value, list) and value and not isinstance(value[0], int):
        value = value[0]  # the record has the field several times
    with contextlib.suppress(ValueError, TypeError):
        data = bytes(value) if isinstance(value, list) else str(value).encode(errors="replace")
        return _shown(data, len(data))
    return None


def cursor(record: Line) -> str:
    """The journal's cursor of the record; "" if that cannot be read."""
    found = _CURSOR.search(record.kept)
    return found[1].decode(errors="replace") if found else ""


def _beginning(record: bytes) -> bytes:
    """The beginning of the message in a record that was cut."""
    if found := _TEXT.search(record):
        for missing in range(7):  # the cut may be within \\uXXXX
            with contextlib.suppress(ValueError):
                text = found[1][: len(found[1]) - missing].decode(errors="replace")
                return str(json.loads(f'"{text}"', strict=False)).encode(errors="replace")
    if found := _BYTES.search(record):
        with contextlib.suppress(ValueError):
            return bytes(int(number) for number in found[1].split(b",")[:-1])
    return b""


class Rate:
    """Passes a number of lines in each period, and reports how many it dropped."""

    def __init__(self, burst: int = BURST, period: float = PERIOD, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._period, self._clock = burst, period, clock
        self._left, self._until, self._missed = burst, clock() + period, 0

    def allow(self, lines: tuple[str, ...]) -> tuple[str, ...]:
        """The lines that pass, after a line with the number of those that were dropped before them."""
        now = self._clock()
        report: tuple[str, ...] = ()
        if now >= self._until:
            report = self.end()
            self._left, self._until = self._burst, now + self._period
        passed = lines[: self._left]
        self._left -= len(passed)
        self._missed += len(lines) - len(passed)
        return report + passed

    def end(self) -> tuple[str, ...]:
        """The line with the number of dropped lines that were not reported yet, if there are any."""
        missed, self._missed = self._missed, 0
        return (left_out(missed),) if missed else ()


def left_out(count: int) -> str:
    """The line in the place of ``count`` dropped ones."""
    return f"[{count} lines were left out here: they came too fast]"
