"""Reports as text, side by side, and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllmd.simulate.report import Figures, Report
from vllmd.text import shortened

Column = Callable[[Figures], str]


def _spread(name: str, part: str) -> Column:
    """The column of one figure of a time's spread, in seconds."""
    return lambda f: f"{getattr(getattr(f, name), part):.2f}"


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
    lines: list[str] = []
    # The policies in groups that fit beside each other, a column each.
    columns = [[report.policy, *(column(report.all) for column in COLUMNS.values())] for report in reports]
    widest = max((len(cell) for column in columns for cell in column), default=0) + GAP
    many = len(reports) if most is None else max(1, (most - max(map(len, COLUMNS))) // widest)
    for start in range(0, len(reports), many or 1):
        head, *rows = zip(("policy", *COLUMNS), *columns[start : start + many], strict=True)
        lines += _table(head, rows)
    for report in reports if models else ():
        shares = [
            f"device {index} worked {busy:.0%} of the time, {report.memory[index]:.0%} of its memory promised"
            for index, busy in report.busy.items()
        ]
        summary = f"{report.policy}: {'; '.join(shares) or 'no devices'}"
        wrapped = textwrap.wrap(summary, most or len(summary), subsequent_indent="  ", break_long_words=False)
        failures = [f"  {number} requests failed: {error}" for error, number in report.errors.items()]
        model_rows = [[name, *(COLUMNS[key](f) for key in PER_MODEL.values())] for name, f in report.models.items()]
        lines += ["", *wrapped, *failures, UNITS, *_table(["model", *map(str.strip, PER_MODEL)], model_rows, most)]
    return "\n".join(lines)


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
    """The value with text for keys, which is all that JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
