"""Configurations over one trace, in a process of its own: what the daemon's page plans with.

``python -m vllmd.simulate.what_if`` reads a pickled ``Question`` from its parent, and writes JSON. It is nice, or
where it may not be so rests half of the time: requests go first.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllmd.config.types import Config
from vllmd.core.costs import CostBook
from vllmd.errors import ConfigError
from vllmd.frozen import frozen
from vllmd.simulate.baselines import ALL
from vllmd.simulate.physics import Physics
from vllmd.simulate.planned import machine_of, names_of
from vllmd.simulate.report import Figures, Report
from vllmd.simulate.trace import Row, of_these
from vllmd.simulate.world import Warm, simulate

NICE = 19
SLICE = 0.05  # seconds


@frozen
class Question:
    """``cases``: names and what is to be simulated, its devices declared. ``cache``: of the engines, for estimates."""

    cases: Sequence[tuple[str, Config]]
    rows: Sequence[Row]
    cache: Path


def answer(question: Question) -> dict[str, Any]:
    """``runs``, one for each case that can be; ``left_out``: models, and why they are in none. Raises ConfigError."""
    requested = {row.model for row in question.rows}
    cases, left_out = [(name, _concerned(config, requested)) for name, config in question.cases], dict[str, str]()
    for _, config in cases:
        left_out |= misfits(config, question.cache)
    cases = [
        (case, replace(config, models={name: each for name, each in config.models.items() if name not in left_out}))
        for case, config in cases
    ]
    rows, gone = of_these(question.rows, names_of(cases[0][1]))
    left_out |= {name: "it is not configured any more" for name in gone if name not in left_out}
    runs = []
    for name, config in cases if rows else ():
        machine = machine_of(config, Physics(seed=0), Warm.STOPPED, cache=question.cache)
        report = simulate(replace(machine, costs=CostBook()), rows, ALL[config.policy], config.policy)
        runs.append({"name": name, "devices": [device.memory for device in machine.devices], **_drawn(report)})
    return {"requests": len(rows), "left_out": left_out, "runs": runs}


def misfits(config: Config, cache: Path) -> dict[str, str]:
    """The models that could never be on these devices, and why: nothing can be planned with them."""
    found = {}
    for name, model in config.models.items():
        try:
            machine_of(replace(config, models={name: model}), Physics(), Warm.STOPPED, cache=cache)
        except ConfigError as error:
            found[name] = error.message
    return found


def _drawn(report: Report) -> dict[str, Any]:
    """A report as the page draws it."""
    return {
        "policy": report.policy,
        "length": report.length,
        **_figures(report.all),
        "models": {name: _figures(figures) for name, figures in report.models.items() if figures.requests},
        "busy": {str(index): share for index, share in report.busy.items()},
        "memory": {str(index): share for index, share in report.memory.items()},
        "errors": dict(report.errors),
        "samples": [
            {"at": each.at, "queued": each.queued, "promised": list(each.promised.values())} for each in report.samples
        ],
    }


def _figures(figures: Figures) -> dict[str, Any]:
    plain = asdict(figures)
    return {name: plain[name] for name in ("requests", "served", "failed", "swaps", "wait", "latency")}


def _concerned(config: Config, requested: set[str]) -> Config:
    """The configuration with those models only that were requested, or that hold memory in any case."""
    names = {name for called, name in names_of(config).items() if called in requested}
    kept = {n: model for n, model in config.models.items() if n in names or model.pin or model.preload}
    return replace(config, models=kept)


def rest_half_of_the_time() -> None:
    """Sleep as long as was computed, again and again: half a core is left to whatever else there is to do.

    By a timer of CPU time, not by sleeps in the simulation, which has no loop of its own to put them into.
    """
    signal.signal(signal.SIGPROF, lambda *_: time.sleep(SLICE))
    signal.setitimer(signal.ITIMER_PROF, SLICE, SLICE)


def main() -> int:
    """Answer the question on stdin."""
    try:
        os.nice(NICE)
    except OSError:  # the unit's sandbox does not let us
        rest_half_of_the_time()
    question = pickle.load(sys.stdin.buffer)  # from our parent, over a pipe that nobody else has
    try:
        print(json.dumps(answer(question)))
    except ConfigError as error:
        print(json.dumps({"error": error.message}))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)  # the interpreter ends without the handler, and would die of the signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
