"""A picture of reports, where matplotlib is installed: it is no dependency of vllmd."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vllmd.errors import VllmdError
from vllmd.simulate.report import Report

HOW = "apt install python3-matplotlib, or pip install matplotlib"
GB = 1e9
PARTS = ("mean", "p50", "p95", "p99", "longest")  # of the waits


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
        # Devices on top of each other: lines that cross all the time would hide one another.
        sizes = [[sample.promised.get(index, 0) / GB for sample in report.samples] for index in report.busy]
        if sizes:
            labels = [f"device {index}" for index in report.busy]
            axes[number].stackplot(_minutes(report), sizes, labels=labels, step="post", alpha=0.6)
            axes[number].legend(fontsize="small", loc="lower right", ncols=min(8, len(sizes)))
        axes[number].set(xlabel="minutes", ylabel="GB promised", title=f"Device memory, {report.policy}")
    queues, waits = axes[-2], axes[-1]
    width = 0.8 / max(1, len(reports))
    for number, report in enumerate(reports):
        queues.step(_minutes(report), [sample.queued for sample in report.samples], where="post", label=report.policy)
        places = [place + number * width for place in range(len(PARTS))]
        waits.bar(places, [getattr(report.all.wait, part) for part in PARTS], width, label=report.policy)
    queues.set(xlabel="minutes", ylabel="requests", title="Waiting for a model")
    waits.set_xticks([place + 0.4 - width / 2 for place in range(len(PARTS))], PARTS)
    waits.set(ylabel="seconds", title="Waits")
    for each in (queues, waits):
        each.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise VllmdError(f"cannot write the picture to {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _minutes(report: Report) -> list[float]:
    return [sample.at / 60 for sample in report.samples]
