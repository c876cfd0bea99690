"""How sizes, times and states are written; ``terminal`` makes them fit."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vllmd.api.answers import ModelLine, Progress
from vllmd.api.codec import plain
from vllmd.cli.terminal import EMPTY as EMPTY
from vllmd.cli.terminal import StatusLine as StatusLine
from vllmd.cli.terminal import Working as Working
from vllmd.cli.terminal import coloured as coloured
from vllmd.cli.terminal import columns as columns
from vllmd.cli.terminal import paint as paint
from vllmd.cli.terminal import pairs as pairs
from vllmd.cli.terminal import say as say
from vllmd.cli.terminal import table as table
from vllmd.sizes import in_words
from vllmd.text import shortened as shortened
from vllmd.text import width as width

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
MOMENT = 0.05  # seconds that a phase must take to be shown
PHASE = 60  # characters that a phase may take: it stands in one line with others


def state(name: str) -> str:
    """A state in its colour."""
    return paint(name, STATES.get(name, ""))


def first_line(text: str | None) -> str:
    """The sentence of a failure, without the engine's last log lines below it."""
    return (text or "").partition("\n")[0].removesuffix("; its last log lines:")


def phase(line: ModelLine | Progress) -> str:
    """The phase of a start, and as much of the engine's own detail as fits ``PHASE`` characters."""
    text = f"{line.phase or ''} {line.detail or ''}".strip()
    return text if len(text) <= PHASE else text[: PHASE - 3].rstrip(" .") + "..."


def phases(line: ModelLine) -> str:
    """The phases of the start under way, else of the last one: ``imports 8.2s, weights 3.1s (LOADER)``."""
    by = {"weights": f" ({line.loader})"} if line.loader else {}
    return ", ".join(f"{phase} {age(seconds)}{by.get(phase, '')}" for phase, seconds in line.start_phases.items()
                     if seconds >= MOMENT)  # fmt: skip


def size(number: float | None) -> str:
    """An amount in bytes as tables show it: ``1.5GiB``."""
    return in_words(number, gap="", digits=".4g") if number else EMPTY


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


def counted(number: int, what: str) -> str:
    """A number with its noun: ``1 request``, ``2 requests``."""
    return f"{number} {what}{'s' * (number != 1)}"


def numbers(of: Sequence[int]) -> str:
    """Device numbers in ranges, such as ``0-3,6``."""
    groups: list[list[int]] = []
    for number in sorted(of):
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    parts = (f"{group[0]}-{group[-1]}" if len(group) > 2 else ",".join(map(str, group)) for group in groups)
    return ",".join(parts) or EMPTY


def as_json(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=plain)
