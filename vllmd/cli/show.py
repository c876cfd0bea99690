"""Tables, sizes, times; colour on terminals only."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "grey": 90, "bold": 1}
STATES = {
    "running": "green",
    "starting": "yellow",
    "waking": "yellow",
    "draining": "yellow",
    "falling_asleep": "yellow",
    "stopping": "yellow",
    "sleeping_l1": "blue",
    "sleeping_l2": "blue",
    "error": "red",
    "stopped": "grey",
}
EMPTY = "-"
PHASE = 60  # characters that a phase may take: it stands in one line with others


def coloured(stream: Any = None) -> bool:
    """Whether to colour: a terminal that can, and no NO_COLOR."""
    stream = stream or sys.stdout
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if colour and coloured() else text


def state(name: str) -> str:
    """A state in its colour."""
    return paint(name, STATES.get(name, ""))


def first_line(text: str | None) -> str:
    """What a failure says, without the engine's last log lines below it."""
    return (text or "").partition("\n")[0].removesuffix("; its last log lines:")


def phase(line: dict[str, Any]) -> str:
    """The phase of a start, and the engine's own words as far as they are short."""
    told = f"{line.get('phase') or ''} {line.get('detail') or ''}".strip()
    return told if len(told) <= PHASE else told[: PHASE - 3] + "..."


def size(number: float | None) -> str:
    """Bytes as 1.5GiB."""
    if not number:
        return EMPTY
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.4g}{unit}"
    return f"{int(number)}B"


def age(seconds: float | None) -> str:
    """Seconds as 4s, 12m, 3h05m, 2d4h."""
    if seconds is None:
        return EMPTY
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 120:
        return f"{whole}s"
    if whole < 7200:
        return f"{whole // 60}m"
    if whole < 172800:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def width(text: str) -> int:
    """Columns that the text takes on a terminal: colours none, wide characters two."""
    columns, hidden = 0, False
    for char in text:
        if char == "\033":
            hidden = True
        elif hidden:
            hidden = char != "m"
        else:
            columns += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return columns


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Columns under their heads; those named in ``right`` are set right; the last column is ragged."""
    widths = [max(width(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            " " * (size_ - width(cell)) + cell if name in right else cell + " " * (size_ - width(cell))
            for name, cell, size_ in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def pairs(entries: Mapping[str, object]) -> str:
    """Names and values, aligned."""
    longest = max(map(len, entries), default=0)
    return "\n".join(f"{name + ':':{longest + 1}} {value}" for name, value in entries.items())


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)


class StatusLine:
    """A line on the terminal that is written over, or one line per change where there is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.live, self.last = quiet, sys.stderr.isatty(), ""

    def say(self, text: str, key: str) -> None:
        """Show ``text``; without a terminal only when ``key`` is another one than before."""
        if self.quiet:
            return
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif key != self.last:
            print(text, file=sys.stderr, flush=True)
        self.last = key

    def clear(self) -> None:
        if self.live and self.last and not self.quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.last = ""
