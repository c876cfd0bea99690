"""Reports as text, side by side, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllmd.simulate.report import Figures, Report

Cell = Callable[[Report], str]
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
    **{f"wait {part}": _spread("wait", part) for part in ("mean", "p50", "p95", "p99", "longest")},
    **{f"latency {part}": _spread("latency", part) for part in ("mean", "p95", "p99")},
}
PER_MODEL = ("requests", "failed", "swaps", "wait mean", "wait p95", "wait longest", "latency mean", "latency p95")


def text(reports: Sequence[Report], models: bool = True) -> str:
    """The policies side by side, then each one's models, devices and errors. Times in seconds."""
    rows = [[report.policy, *(column(report.all) for column in COLUMNS.values())] for report in reports]
    lines = list(_table(["policy", *COLUMNS], rows))
    for report in reports if models else ():
        lines += ["", f"{report.policy}: {_devices(report)}", *_failures(report)]
        rows = [[name, *(COLUMNS[key](f) for key in PER_MODEL)] for name, f in report.models.items()]
        lines += _table(["model", *PER_MODEL], rows)
    return "\n".join(lines)


def _devices(report: Report) -> str:
    shares = (
        f"device {index} worked {busy:.0%} of the time, {report.memory[index]:.0%} of its memory promised"
        for index, busy in report.busy.items()
    )
    return "; ".join(shares) or "no devices"


def _failures(report: Report) -> Iterator[str]:
    for error, number in report.errors.items():
        yield f"  {number} requests failed: {error}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Names to the left, numbers to the right."""
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
