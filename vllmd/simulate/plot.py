"""A picture of reports, where matplotlib is installed: it is no dependency of vllmd."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from vllmd.errors import VllmdError
from vllmd.simulate.report import Report

HOW = "apt install python3-matplotlib, or pip install matplotlib"
GB = 1e9


def plot(reports: Sequence[Report], path: str) -> None:
    """Memory over time for each policy, then waiting requests over time and waits, side by side. Raises VllmdError."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise VllmdError(f"--plot needs matplotlib, which is not installed: {HOW}") from None
    rows = len(reports) + 2
    figure, axes = pyplot.subplots(rows, 1, figsize=(11, 2.2 * rows + 2), constrained_layout=True)
    for number, report in enumerate(reports):
        _memory(axes[number], report)
    _queues(axes[-2], reports)
    _waits(axes[-1], reports)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise VllmdError(f"cannot write the picture to {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _memory(axes: Any, report: Report) -> None:
    """Devices on top of each other: lines that cross all the time would hide one another."""
    sizes = [[sample.promised.get(index, 0) / GB for sample in report.samples] for index in report.busy]
    labels = [f"device {index}" for index in report.busy]
    if sizes:
        axes.stackplot(_times(report), sizes, labels=labels, step="post", alpha=0.6)
        axes.legend(fontsize="small", loc="lower right", ncols=min(8, len(sizes)))
    axes.set(xlabel="minutes", ylabel="GB promised", title=f"Device memory, {report.policy}")


def _queues(axes: Any, reports: Sequence[Report]) -> None:
    for report in reports:
        axes.step(_times(report), [sample.queued for sample in report.samples], where="post", label=report.policy)
    axes.set(xlabel="minutes", ylabel="requests", title="Waiting for a model")
    axes.legend(fontsize="small")


def _times(report: Report) -> list[float]:
    return [sample.at / 60 for sample in report.samples]


def _waits(axes: Any, reports: Sequence[Report]) -> None:
    parts = ("mean", "p50", "p95", "p99", "longest")
    width = 0.8 / max(1, len(reports))
    for number, report in enumerate(reports):
        places = [place + number * width for place in range(len(parts))]
        axes.bar(places, [getattr(report.all.wait, part) for part in parts], width, label=report.policy)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(parts))], parts)
    axes.set(ylabel="seconds", title="Waits")
    axes.legend(fontsize="small")
