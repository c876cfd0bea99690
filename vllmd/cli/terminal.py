"""What fits a terminal: tables, prose, a line that shows that something is under way.

The rule: on a terminal no line is wider than the terminal, so that nothing wraps into the next row; names are shortened
in the middle, where the least is lost, and notes go on lines of their own. Into a pipe everything is whole, a row a
line.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from vllmd.text import shortened, width

COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "grey": 90, "bold": 1}
EMPTY = "-"
SHORTEST = 12  # columns that a name keeps
NARROWEST = 20  # columns of a terminal that is believed
BENEATH = 4  # columns by which a note under its row is set in
PATIENCE, REDRAW = 1.0, 0.5  # seconds before anything is said of a wait, and between looks at the clock


def coloured(stream: Any = None) -> bool:
    """Whether to colour: a terminal that can, and no NO_COLOR."""
    stream = stream or sys.stdout
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if colour and coloured() else text


def columns(stream: Any = None) -> int | None:
    """How wide a line may be; None where no terminal is."""
    stream = stream or sys.stdout
    try:
        if not stream.isatty():
            return None
        wide = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return None
    return max(NARROWEST, wide or shutil.get_terminal_size().columns)


def cut(text: str, most: int) -> str:
    """The text in at most so many columns, its end left out."""
    while width(text) > most:
        text = text[: most - (width(text) > most) - 3] if len(text) > most else text[:-4]
        text = text.rstrip(" .") + "..."
    return text


def wrapped(text: str, most: int | None, indent: int = 2) -> str:
    """The text with its lines broken between words where they are too long, set in by ``indent`` from then on.

    A word that alone is too long stays whole: it is a path or a command that somebody may want to copy.
    """
    if most is None:
        return text
    lines = list[str]()
    for line in text.split("\n"):
        if width(line) <= most:
            lines.append(line)
            continue
        lead = len(line) - len(line.lstrip(" "))
        hang, now = " " * (lead + indent), " " * lead
        for word in line.strip(" ").split(" "):
            joined = f"{now} {word}" if now.strip() else now + word
            if width(joined) > most and now.strip():
                lines.append(now)
                joined = (hang if width(hang + word) <= most else " " * lead + "  ") + word
            now = joined
        lines.append(now)
    return "\n".join(lines)


def say(text: str, file: Any = None, indent: int = 2) -> None:
    """Print it, broken between words where the terminal ends."""
    file = file or sys.stdout
    print(wrapped(text, columns(file), indent), file=file, flush=True)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    names: Sequence[str] = (),
    beneath: Sequence[str] = ("NOTE",),
) -> str:
    """Columns under their heads, those in ``right`` set right; the last column is ragged.

    On a terminal that is too narrow the columns ``beneath`` become lines of their own under each row, and the columns
    ``names`` are shortened; a name that looks like another row's then is repeated whole under its row.
    """
    # Whatever a cell says, a row is one line: a name with a line break would look like two rows.
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    most = columns()
    if most is None or _wide(head, rows) <= most:
        return "\n".join(_lined(head, rows, right))
    low = [place for place, name in enumerate(head) if name in beneath]
    kept = [place for place in range(len(head)) if place not in low]
    upper = [head[place] for place in kept]
    whole = [[row[place] for place in kept] for row in rows]
    short = shorten_names(upper, [list(row) for row in whole], names, most)
    meant: dict[tuple[int, str], set[str]] = {}  # the whole names behind each shortened one
    name_places = [place for place, name in enumerate(upper) if name in names]
    for full, cells in zip(whole, short, strict=True):
        for place in name_places:
            meant.setdefault((place, cells[place]), set()).add(full[place])
    lines = _lined(upper, short, right, gap=2 if _wide(upper, short) <= most else 1)
    shown = lines[:1]
    for line, row, full, cells in zip(lines[1:], rows, whole, short, strict=True):
        shown.append(line)
        for place in name_places:
            if len(meant[place, cells[place]]) > 1:
                shown.append(wrapped(f"{' ' * BENEATH}{full[place]}", most, 2))
        for place in low:
            if row[place] != EMPTY and row[place][:1] not in ("", "("):
                label = "" if head[place] == "NOTE" else f"{head[place].lower()}: "
                shown.append(wrapped(f"{' ' * BENEATH}{label}{row[place]}", most, 2))
    return "\n".join(shown)


def _wide(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(_widths(head, rows)) + 2 * (len(head) - 1)


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(width(cell) for cell in column) for column in zip(head, *rows, strict=True)]


def shorten_names(head: Sequence[str], rows: list[list[str]], names: Sequence[str], most: int) -> list[list[str]]:
    """Shorten the columns ``names`` in place, the widest first, as far as the table must become narrower."""
    places = [place for place, name in enumerate(head) if name in names]
    while places and (over := _wide(head, rows) - most) > 0:
        widths = _widths(head, rows)
        widest = max(places, key=lambda place: widths[place])
        target = max(SHORTEST, widths[widest] - over)
        if target == widths[widest]:
            break
        for row in rows:
            row[widest] = shortened(row[widest], target)
    return rows


def _lined(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], gap: int = 2) -> list[str]:
    widths, lines = _widths(head, rows), []
    for row in (head, *rows):
        cells = [
            " " * (size_ - width(cell)) + cell if name in right else cell + " " * (size_ - width(cell))
            for name, cell, size_ in zip(head, row, widths, strict=True)
        ]
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def pairs(entries: Mapping[str, object]) -> str:
    """Names and values in two columns, wrapped to the terminal."""
    longest = max(map(len, entries), default=0)
    lines = [f"{name + ':':{longest + 1}} {value}" for name, value in entries.items()]
    return "\n".join(wrapped(line, columns(), longest + 2) for line in lines)


Render = Callable[[float], str]  # seconds since it was said -> the line


class StatusLine:
    """A line on the terminal that is written over, or one line per change where there is no terminal.

    A thread draws the line anew, so that the seconds in it go on while nothing else happens.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.live, self.last = quiet, sys.stderr.isatty(), ""
        self._render: Render = lambda _: ""
        self._since = 0.0
        self._drawn = False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, render: Render, key: str) -> None:
        """Show what ``render`` returns; without a terminal only when ``key`` is not that of the last call."""
        if self.quiet:
            return
        if not self.live:
            if key != self.last and (text := render(0.0)):
                print(text, file=sys.stderr, flush=True)
            self.last = key
            return
        with self._lock:
            self._render, self._since = render, time.monotonic()
        self._draw()
        if self._thread is None:

            def redraw(ended: threading.Event) -> None:
                while not ended.wait(REDRAW):
                    self._draw()

            self._thread = threading.Thread(target=redraw, args=(self._ended,), daemon=True)
            self._thread.start()

    def clear(self) -> None:
        """Take the line off the terminal, and end its clock."""
        self._ended.set()
        if self._thread:
            self._thread.join()
        self._thread, self._ended, self.last = None, threading.Event(), ""
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._drawn = False

    def _draw(self) -> None:
        with self._lock:
            text = self._render(time.monotonic() - self._since)
            if text:
                most = (columns(sys.stderr) or 80) - 1  # a full line would wrap with the cursor
                print(f"\r\033[K{cut(text, most)}", end="", file=sys.stderr, flush=True)
                self._drawn = True


class Working:
    """A line on the terminal that says what is waited for, and for how long, once that takes longer than a moment.

    Within another ``Working`` it shows nothing: there is one such line at a time.
    """

    _under_way = False

    def __init__(self, what: str, quiet: bool = False) -> None:
        self.what = what
        self._quiet = quiet
        self._line = StatusLine(quiet=True)
        self._began = 0.0

    def __enter__(self) -> Working:
        if not (self._quiet or Working._under_way) and sys.stderr.isatty():
            Working._under_way = True
            self._began, self._line = time.monotonic(), StatusLine()

            def text(_: float) -> str:
                seconds = time.monotonic() - self._began
                return f"{self.what}, {seconds:.0f}s" if seconds >= PATIENCE else ""

            self._line.say(text, "")
        return self

    def say(self, what: str) -> None:
        """Wait for something else from now on."""
        self.what = what or self.what

    def clear(self) -> None:
        """The waiting is over: remove the line."""
        if not self._line.quiet:
            self._line.clear()
            self._line, Working._under_way = StatusLine(quiet=True), False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
