"""Reports as text, side by side, and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllmd.simulate.report import Figures, Report
from vllmd.text import shortened

Column = Callable[[Figures], str]


def _seconds(value: float) -> str:
    return f"{value:.2f}"


def _spread(name: str, part: str) -> Column:
    return lambda f: _seconds(getattr(getattr(f, name), part))


COLUMNS: dict[str, Column] = {
    "requests": lambda f: str(f.requests),
    "failed": lambda f: str(f.failed),
    "swaps": lambda f: str(f.swaps),
    "frozen": lambda f: str(f.frozen),
    **{f"wait, {part} (s)": _spread("wait", part) for part in ("mean", "p50", "p95", "p99", "longest")},
    **{f"latency, {part} (s)": _spread("latency", part) for part in ("mean", "p95", "p99")},
}
PER_MODEL = {  # what is beneath a heading is told in the line above the table
    "requests": "requests", "failed": "failed", "swaps": "swaps", "wait": "wait, mean (s)", "p95": "wait, p95 (s)",
    "longest": "wait, longest (s)", "latency": "latency, mean (s)", " p95": "latency, p95 (s)",
}  # fmt: skip
UNITS = "wait and latency in seconds, each the mean first"
GAP = 2  # columns between two of a table
SHORTEST = 12  # columns that a name keeps


def text(reports: Sequence[Report], models: bool = True, most: int | None = None) -> str:
    """The policies side by side, then each one's models, devices and errors. ``most``: columns of the terminal."""
    lines = [line for group in _beside(reports, most) for line in _compared(group)]
    for report in reports if models else ():
        lines += ["", *_folded(f"{report.policy}: {_devices(report)}", most), *_failures(report), UNITS]
        rows = [[name, *(COLUMNS[key](f) for key in PER_MODEL.values())] for name, f in report.models.items()]
        lines += _table(["model", *map(str.strip, PER_MODEL)], rows, most)
    return "\n".join(lines)


def _beside(reports: Sequence[Report], most: int | None) -> Iterator[Sequence[Report]]:
    """The policies in groups that fit beside each other, a column each."""
    widest = max((len(cell) for report in reports for cell in (report.policy, *_figures(report))), default=0) + GAP
    many = len(reports) if most is None else max(1, (most - max(map(len, COLUMNS))) // widest)
    for start in range(0, len(reports), many or 1):
        yield reports[start : start + many]


def _figures(report: Report) -> list[str]:
    return [column(report.all) for column in COLUMNS.values()]


def _compared(reports: Sequence[Report]) -> Iterator[str]:
    figures = [_figures(report) for report in reports]
    rows = [[name, *(each[row] for each in figures)] for row, name in enumerate(COLUMNS)]
    yield from _table(["policy", *(report.policy for report in reports)], rows)


def _folded(line: str, most: int | None) -> list[str]:
    return [line] if most is None else textwrap.wrap(line, most, subsequent_indent="  ", break_long_words=False)


def _devices(report: Report) -> str:
    shares = (
        f"device {index} worked {busy:.0%} of the time, {report.memory[index]:.0%} of its memory promised"
        for index, busy in report.busy.items()
    )
    return "; ".join(shares) or "no devices"


def _failures(report: Report) -> Iterator[str]:
    for error, number in report.errors.items():
        yield f"  {number} requests failed: {error}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int | None = None) -> Iterator[str]:
    """Names to the left, numbers to the right; where the terminal is too narrow the names are shortened."""
    numbers = [max(len(row[column]) for row in (head, *rows)) + GAP for column in range(1, len(head))]
    if most is not None:
        rows = [[shortened(row[0], max(SHORTEST, most - sum(numbers))), *row[1:]] for row in rows]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells])


def as_json(reports: Sequence[Report]) -> str:
    """Everything, samples of the memory included; sizes in bytes, times in seconds."""
    return json.dumps([_plain(report.to_dict()) for report in reports], indent=2)


def _plain(value: Any) -> Any:
    """JSON has only text for keys."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
