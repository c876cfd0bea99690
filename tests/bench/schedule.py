"""``make bench-schedule``: our policy and the peers' rules over six arrival patterns, in one table.

Everything is deterministic: traces from fixed seeds, the production Scheduler
under a virtual clock, and the same luck (noise on every transfer) for all
policies. One 80 GB device, 6 to 12 models of 4 to 40 GB, an hour at 0.5
requests per second; every policy is given the same sleep mechanism. At first
all engines sleep (those that cannot: nothing runs). Idle rules are switched
off: what is compared is who makes room for whom.

    python -m tests.bench.schedule [--seeds 1-5] [--variant 0] [--write]

``--write`` keeps the tables in ``tests/bench/schedule.md``.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.bench.scenarios import HOUR, SIZES_GB, Scenario, scenarios
from vllmd.core.baselines import ALL
from vllmd.core.commands import Command
from vllmd.core.events import Event
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, Footprint, IdleRules, ModelSpec, Settings, single
from vllmd.simulate.physics import Physics
from vllmd.simulate.report import Figures
from vllmd.simulate.trace import Row
from vllmd.simulate.world import Machine, Warm, freezing, simulate

GB = 10**9
DEVICE = 80 * GB
FOR_EVER = IdleRules(sleep_after=None, deepen_after=None, stop_after=None)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the machine is like, and how busy."""

    name: str
    rate: float = 0.5  # requests per second
    host: int = 256  # GB of host memory for level-1 sleepers
    sleeps: bool = True


VARIANTS = (
    Variant("0.5 requests/s, 256 GB of host memory"),
    Variant("0.1 requests/s", rate=0.1),
    Variant("1.0 requests/s", rate=1.0),
    Variant("96 GB of host memory", host=96),
    Variant("engines without sleep, 0.2 requests/s", rate=0.2, sleeps=False),
)
TABLE = Path(__file__).with_name("schedule.md")
NOTES = "## How to read it\n"
CONTENDERS = ("adaptive", "adaptive+freeze", "llama-swap", "ollama")
METRICS = ("swaps", "mean", "p95", "p99", "longest", "lat mean", "lat p95", "lat p99")


def specs(weights: dict[str, int], sleeps: bool = True) -> list[ModelSpec]:
    """Models by gigabytes of weights; 5 % and 2 GB more on the device, 1 GB of it kept by a sleeper."""
    return [
        single(
            name=name,
            footprint=_footprint(size, sleeps),
            weights=size * GB,
            sleep_levels=frozenset({1, 2}) if sleeps else frozenset(),
            idle=FOR_EVER,
            queue_timeout=None,
            queue_limit=10**9,
        )
        for name, size in weights.items()
    ]


def _footprint(size: int, sleeps: bool) -> Footprint:
    awake = int(1.05 * size * GB) + 2 * GB
    return Footprint(awake, awake, GB if sleeps else 0, size * GB)


def run(scenario: Scenario, variant: Variant, policy: str, seed: int) -> Figures:
    """One policy over one trace."""
    models = specs(scenario.weights, variant.sleeps)
    name, _, freeze = policy.partition("+")
    machine = Machine(
        freezing(models) if freeze else models,
        [Device(0, "0", DEVICE)],
        Settings(host_memory=variant.host * GB, queue_limit=10**9),
        Physics(seed=seed),
        Warm.ASLEEP if variant.sleeps else Warm.STOPPED,
    )
    trace = [Row(row.time, row.model, row.prompt, row.output) for row in scenario.rows]
    return simulate(machine, trace, ALL[name], policy).all


def metrics(f: Figures) -> tuple[float, ...]:
    """What is compared, in the order of METRICS."""
    waits = (f.wait.mean, f.wait.p95, f.wait.p99, f.wait.longest)
    return (float(f.swaps), *waits, f.latency.mean, f.latency.p95, f.latency.p99)


@dataclass(frozen=True, slots=True)
class Line:
    """One policy in one variant: geometric means relative to draining LRU, and its worst scenario."""

    policy: str
    ratios: tuple[float, ...]
    worst: float  # the largest ratio of the longest wait, over scenarios
    where: str
    failed: int

    def __getitem__(self, metric: str) -> float:
        return self.ratios[METRICS.index(metric)]


def compare(variant: Variant, policies: Sequence[str], seeds: Iterable[int], duration: float = HOUR) -> list[Line]:
    """All policies over all scenarios and seeds of a variant."""
    found: dict[str, list[tuple[str, tuple[float, ...], int]]] = {policy: [] for policy in policies}
    for seed in seeds:
        for scenario in scenarios(seed, variant.rate, duration):
            base = metrics(run(scenario, variant, "lru", seed))
            for policy in policies:
                figures = run(scenario, variant, policy, seed)
                ratios = tuple(max(a, 0.01) / max(b, 0.01) for a, b in zip(metrics(figures), base, strict=True))
                found[policy].append((scenario.name, ratios, figures.failed))
    return [_line(policy, runs) for policy, runs in found.items()]


def _line(policy: str, runs: Sequence[tuple[str, tuple[float, ...], int]]) -> Line:
    means = tuple(geometric_mean([ratios[i] for _, ratios, _ in runs]) for i in range(len(METRICS)))
    longest: dict[str, list[float]] = {}
    for name, ratios, _ in runs:
        longest.setdefault(name, []).append(ratios[METRICS.index("longest")])
    worst, where = max((geometric_mean(each), name) for name, each in longest.items())
    return Line(policy, means, worst, where, sum(failed for *_, failed in runs))


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios: halving and doubling cancel out."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def table(title: str, lines: Sequence[Line]) -> Iterator[str]:
    """As text."""
    yield title
    yield f"  {'':<16}" + "".join(f"{name:>9}" for name in METRICS) + "   worst longest wait, by scenario"
    for line in lines:
        cells = "".join(f"{ratio:9.2f}" for ratio in line.ratios)
        yield f"  {line.policy:<16}{cells}   {line.worst:.2f} ({line.where})" + _failures(line)


def _failures(line: Line) -> str:
    return f"; {line.failed} never served" if line.failed else ""


class Timed(Scheduler):
    """Notes what each decision takes, in seconds of this process's CPU time: an event handled, and the next timer."""

    taken: ClassVar[list[float]] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        begun = time.process_time()
        commands = super().handle(event, now)
        super().next_timer()
        self.taken.append(time.process_time() - begun)
        return commands


def decision_cost() -> str:
    """What a decision costs at 100 models and 8 devices, 4 requests per second for a quarter of an hour."""
    rng = random.Random(1)
    weights = {f"m{n}": rng.choice(SIZES_GB) for n in range(100)}
    names, shares = list(weights), [1 / (n + 1) ** 0.8 for n in range(100)]
    rows = [Row(n / 4, rng.choices(names, shares)[0], 900, 150) for n in range(3600)]
    devices = [Device(index, str(index), DEVICE) for index in range(8)]
    machine = Machine(specs(weights), devices, Settings(host_memory=1000 * GB), warm=Warm.ASLEEP)
    Timed.taken.clear()
    simulate(machine, rows, ALL["adaptive"], scheduler=Timed)
    taken = sorted(1e6 * seconds for seconds in Timed.taken)
    mean, p99 = sum(taken) / len(taken), taken[len(taken) * 99 // 100]
    return (
        f"{mean:.0f} us in the mean, {taken[len(taken) // 2]:.0f} us median, {p99:.0f} us p99, {len(taken)} decisions"
    )


def main(argv: Sequence[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="bench-schedule", description="The scheduling policies over traces.")
    parser.add_argument("--seeds", default="1-3", help="a range of seeds, such as 1-5 (default: 1-3)")
    parser.add_argument("--variant", type=int, help="only one, by number from 0")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {TABLE.name}")
    args = parser.parse_args(argv)
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    begun, shown = time.process_time(), []

    def show(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        shown.extend(lines)

    show("geometric means relative to draining LRU (lower is better); waits are from arrival to an engine")
    chosen = VARIANTS if args.variant is None else VARIANTS[args.variant : args.variant + 1]
    for variant in chosen:
        policies = CONTENDERS if variant.sleeps else [p for p in CONTENDERS if "+" not in p]
        show(*table(variant.name, compare(variant, policies, seeds)))
    show(f"a decision at 100 models and 8 devices: {decision_cost()}")
    show(f"seeds {args.seeds}; {time.process_time() - begun:.0f} s of CPU time")
    if args.write:
        write(shown)
    return 0


def write(lines: Sequence[str]) -> None:
    """Keep them, with the day and the machine; what stands below the tables is by hand, and stays."""
    _, _, notes = TABLE.read_text().partition(NOTES) if TABLE.exists() else ("", "", "")
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    head = f"## {datetime.date.today()} · {os.cpu_count()} CPUs, Python {platform.python_version()}, {load}"
    TABLE.write_text("\n".join([head, "", "```", *lines, "```", "", NOTES]) + notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
