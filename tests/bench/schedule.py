"""``make bench-schedule``: our policy and the peers' rules in many worlds, in one table.

Everything is deterministic: traces from fixed seeds, the production Scheduler
under a virtual clock, and the same luck (noise on every transfer) for all
policies. Every rule is given the same mechanism: sleep, the memory ledger, one
command per device at a time. Idle rules are switched off, but for the day with
its night: what is compared is which model makes room for which. A world is run
over several traces and seeds; what is shown are geometric means of the ratios
to draining LRU, which is the only bounded one of the peers' rules.

    python -m tests.bench.schedule [--quick] [--seeds 1-5] [--share 1] [--world NAME] [--jobs 2] [--write]

``--quick`` takes one seed and a third of the length. ``--write`` keeps the tables in
``tests/bench/schedule.md``, and a line of each run in its history.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

from tests.bench.oracle import EXACT, Oracle, Small, small_cases
from tests.bench.scenarios import HOUR, SIZES_GB, Scenario, batch, days, fleet, scenarios
from vllmd.core.commands import Command
from vllmd.core.costs import CostBook
from vllmd.core.events import EngineReady, Event, RequestArrived, RequestFinished
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, Footprint, IdleRules, ModelSpec, Settings, single
from vllmd.simulate.baselines import ALL
from vllmd.simulate.physics import Physics
from vllmd.simulate.report import Figures
from vllmd.simulate.trace import Row
from vllmd.simulate.world import Machine, Warm, freezing, simulate

GB = 10**9
DEVICE = 80 * GB
FOR_EVER = IdleRules(sleep_after=None, deepen_after=None, stop_after=None)
KINDS = ("start", "stop", "wake1", "wake2", "sleep1", "sleep2")


@dataclass(frozen=True, slots=True)
class Variant:
    """A world: what the machine is like, and who asks how often."""

    name: str
    rate: float = 0.5  # requests per second; for each 80 GB where there are several devices
    host: int = 256  # GB of host memory for level-1 sleepers
    sleeps: bool = True
    devices: tuple[int, ...] = (80,)  # GB
    wide: bool = False  # some models take two devices
    quick: bool = False  # engines start in 4 s, ten times faster than the priors have it
    learnt: bool = False  # every time was seen before
    kind: str = "patterns"  # patterns | batch | busy batch | day
    duration: float = HOUR

    def scenarios(self, seed: int, share: float = 1.0) -> Iterator[Scenario]:
        """Its traces; ``share`` of their full length."""
        if self.kind == "day":
            yield days(seed, self.rate)
        elif self.kind != "patterns":
            yield batch(seed, busy=self.kind == "busy batch")
        elif len(self.devices) == 1:
            yield from scenarios(seed, self.rate, self.duration * share)
        else:
            yield from fleet(seed, self.devices, self.rate, self.duration * share, self.wide)

    def physics(self, seed: int, models: Sequence[ModelSpec]) -> Physics:
        """The priors' own machine, one that is ten times faster, or stand-in engines for the batch."""
        physics = Physics(seed=seed)
        if self.quick:
            table = {r.id: {k: physics.mean(r, k) / 10 for k in KINDS} for m in models for r in m.replicas}
            return replace(physics, measured=table)
        if "batch" in self.kind:
            fast = {"start": 0.25, "stop": 0.1, "wake1": 0.06, "wake2": 0.12, "sleep1": 0.06, "sleep2": 0.06}
            return replace(physics, measured=dict.fromkeys([m.name for m in models], fast))
        return physics


HALF = HOUR / 2
VARIANTS = (
    Variant("0.5 requests/s, 256 GB of host memory"),
    Variant("0.1 requests/s", rate=0.1),
    Variant("1.0 requests/s", rate=1.0),
    Variant("96 GB of host memory", host=96),
    Variant("engines without sleep, 0.2 requests/s", rate=0.2, sleeps=False),
    Variant("2.0 requests/s", rate=2.0, duration=HALF),
    Variant("fast engines, nothing learnt", quick=True, duration=HALF),
    Variant("fast engines, all learnt", quick=True, learnt=True, duration=HALF),
    Variant("2 equal devices", devices=(80, 80), host=512, duration=HALF),
    Variant("2 unequal devices", devices=(80, 40), host=384, duration=HALF),
    Variant("2 devices, TP 1 and 2", devices=(80, 80), host=512, wide=True, duration=HALF),
    Variant("2 devices, fast, nothing learnt", devices=(80, 80), host=512, quick=True, duration=HALF),
    Variant("4 equal devices", devices=(80,) * 4, host=1024, rate=0.3, duration=HALF),
    Variant("4 unequal devices", devices=(80, 80, 48, 24), host=768, rate=0.3, duration=HALF),
    Variant("4 devices, TP 1 and 2", devices=(80,) * 4, host=1024, rate=0.3, wide=True, duration=HALF),
    Variant("8 devices, TP 1 and 2", devices=(80,) * 8, host=2048, rate=0.25, wide=True, duration=HALF / 2),
    Variant("8 unequal devices", devices=(80,) * 4 + (40,) * 4, host=1500, rate=0.25, duration=HALF / 2),
    Variant("4 devices, engines without sleep", devices=(80,) * 4, rate=0.1, sleeps=False, duration=HALF),
    Variant("200 cold requests to 20 models, 3 places", kind="batch", devices=(90,)),
    Variant("the same behind a busy model, drain_limit 2 s", kind="busy batch", devices=(90,)),
    Variant("a day with its night", kind="day", rate=0.1),
)
TABLE = Path(__file__).with_name("schedule.md")
NOTES = "## How to read it\n"
HISTORY = "## History\n"
PEERS = ("lru", "llama-swap", "ollama")
BOUNDED = ("lru",)  # of the peers' rules; under the others a model can wait for ever
CONTENDERS = ("adaptive", "adaptive+freeze", "llama-swap", "ollama")
METRICS = ("swaps", "mean", "p95", "p99", "longest", "lat mean", "lat p95", "lat p99")
CASES = 8  # small cases of a seed
LEAST = 0.01  # seconds; a wait below it is none, and no ratio to it means anything


def specs(weights: Mapping[str, int], sleeps: bool = True, spans: Mapping[str, int] | None = None) -> list[ModelSpec]:
    """Models by gigabytes of weights; 5 % and 2 GB more on the device, 1 GB of it kept by a sleeper."""
    spans = spans or {}
    return [
        single(
            name=name,
            footprint=_footprint(size, spans.get(name, 1), sleeps),
            weights=size * GB,
            device_count=spans.get(name, 1),
            sleep_levels=frozenset({1, 2}) if sleeps else frozenset(),
            idle=FOR_EVER,
            queue_timeout=None,
            queue_limit=10**9,
        )
        for name, size in weights.items()
    ]


def _footprint(size: int, span: int, sleeps: bool) -> Footprint:
    awake = int(1.05 * size * GB / span) + 2 * GB
    return Footprint(awake, awake, GB if sleeps else 0, size * GB)


def run(scenario: Scenario, variant: Variant, policy: str, seed: int) -> Figures:
    """One policy over one trace."""
    models = specs(scenario.weights, variant.sleeps, scenario.spans)
    if variant.kind == "busy batch":
        models = [replace(m, replicas=(replace(m.replicas[0], drain_limit=2.0),)) for m in models]
    if variant.kind == "day":
        models = [replace(m, replicas=(replace(m.replicas[0], idle=IdleRules()),)) for m in models]
    name, _, freeze = policy.partition("+")
    physics = variant.physics(seed, models)
    cold = not variant.sleeps or "batch" in variant.kind
    machine = Machine(
        freezing(models) if freeze else models,
        [Device(index, str(index), size * GB) for index, size in enumerate(variant.devices)],
        Settings(host_memory=variant.host * GB, queue_limit=10**9),
        physics,
        Warm.STOPPED if cold else Warm.ASLEEP,
        costs=learnt(models, physics) if variant.learnt else None,
        samples=0,
    )
    trace = [Row(row.time, row.model, row.prompt, row.output) for row in scenario.rows]
    return simulate(machine, trace, ALL[name], policy).all


def learnt(models: Iterable[ModelSpec], physics: Physics) -> CostBook:
    """What a daemon knows that has run here for long."""
    book = CostBook()
    for r in [r for m in models for r in m.replicas]:
        costs = book.open(r)
        for kind in KINDS:
            costs.observe(kind, physics.mean(r, kind))
    return book


def metrics(f: Figures) -> tuple[float, ...]:
    """What is compared, in the order of METRICS."""
    waits = (f.wait.mean, f.wait.p95, f.wait.p99, f.wait.longest)
    return (float(f.swaps), *waits, f.latency.mean, f.latency.p95, f.latency.p99)


class Run(NamedTuple):
    """What came of one policy over one trace."""

    scenario: str
    seed: int
    figures: tuple[float, ...]
    failed: int


@dataclass(frozen=True, slots=True)
class Line:
    """One policy in one variant: geometric means relative to draining LRU, and its worst scenario."""

    policy: str
    ratios: tuple[float, ...]
    worst: float  # the largest ratio of the longest wait, over scenarios
    where: str
    failed: int
    logs: tuple[tuple[float, ...], ...]  # of each run, the logarithms of its ratios

    def __getitem__(self, metric: str) -> float:
        return self.ratios[METRICS.index(metric)]

    def against(self, other: Line, metric: str) -> tuple[float, float]:
        """The ratio to another one, and the factor by which its 95 % confidence interval reaches up and down."""
        at = METRICS.index(metric)
        gaps = [a[at] - b[at] for a, b in zip(self.logs, other.logs, strict=True)]
        if len(gaps) < 2:
            return math.exp(gaps[0]), math.inf
        return math.exp(statistics.fmean(gaps)), math.exp(2.0 * statistics.stdev(gaps) / math.sqrt(len(gaps)))


def compare(
    variant: Variant, policies: Sequence[str], seeds: Iterable[int], share: float = 1.0, jobs: int = 1
) -> list[Line]:
    """All policies over all scenarios and seeds of a variant."""
    todo = [(scenario, seed) for seed in seeds for scenario in variant.scenarios(seed, share)]
    each = partial(_runs, variant, ("lru", *policies))
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(each, todo))
    else:
        found = [each(one) for one in todo]
    base = [runs["lru"] for runs in found]
    return [_line(policy, [runs[policy] for runs in found], base) for policy in policies]


def _runs(variant: Variant, policies: Sequence[str], todo: tuple[Scenario, int]) -> dict[str, Run]:
    scenario, seed = todo
    runs = {}
    for policy in dict.fromkeys(policies):
        figures = run(scenario, variant, policy, seed)
        runs[policy] = Run(scenario.name, seed, metrics(figures), figures.failed)
    return runs


def _line(policy: str, runs: Sequence[Run], base: Sequence[Run]) -> Line:
    logs = [
        tuple(math.log(max(a, LEAST) / max(b, LEAST)) for a, b in zip(one.figures, other.figures, strict=True))
        for one, other in zip(runs, base, strict=True)
    ]
    means = tuple(math.exp(statistics.fmean(column)) for column in zip(*logs, strict=True))
    longest: dict[str, list[float]] = {}
    for one, ratios in zip(runs, logs, strict=True):
        longest.setdefault(one.scenario, []).append(ratios[METRICS.index("longest")])
    worst, where = max((math.exp(statistics.fmean(each)), name) for name, each in longest.items())
    return Line(policy, means, worst, where, sum(one.failed for one in runs), tuple(logs))


def table(title: str, lines: Sequence[Line]) -> Iterator[str]:
    """As text."""
    yield title
    yield f"  {'':<16}" + "".join(f"{name:>9}" for name in METRICS) + "   worst longest wait, by scenario"
    for line in lines:
        cells = "".join(f"{ratio:9.2f}" for ratio in line.ratios)
        yield f"  {line.policy:<16}{cells}   {line.worst:.2f} ({line.where})" + _failures(line)


def _failures(line: Line) -> str:
    return f"; {line.failed} never served" if line.failed else ""


# -- the aims


class Aim(NamedTuple):
    """What was to be reached, and what was."""

    name: str
    reached: float
    aim: float
    spread: str = ""  # the confidence interval
    kept: bool = False  # it stands in the history

    @property
    def missed(self) -> bool:
        """Whether it was not."""
        return self.reached > self.aim + 0.0049

    def __str__(self) -> str:
        verdict = "MISSED" if self.missed else "ok"
        return f"  {verdict:<7}{self.reached:8.2f} <= {self.aim:.2f}  {self.name}{self.spread}"


def cell_aims(variant: Variant, lines: Mapping[str, Line]) -> Iterator[Aim]:
    """Draining only: nowhere worse than the best of the peers' rules."""
    ours = lines["adaptive"]
    for metric, aim, peers in (("mean", 1.02, PEERS), ("p95", 1.02, PEERS), ("longest", 1.0, BOUNDED)):
        best = min((lines[peer] for peer in peers), key=lambda line: line[metric])
        ratio, factor = ours.against(best, metric)
        spread = f" [{ratio / factor:.2f}-{ratio * factor:.2f}]"
        yield Aim(f"{variant.name}: {metric} / that of {best.policy}", ratio, aim, spread)


def overall(found: Mapping[Variant, Mapping[str, Line]]) -> Iterator[Aim]:
    """Over all worlds, and of freezing over the first one's six scenarios."""
    ratios = [lines["adaptive"]["mean"] / min(lines[peer]["mean"] for peer in PEERS) for lines in found.values()]
    yield Aim(
        f"{len(ratios)} worlds: mean wait / that of the best peer there",
        statistics.geometric_mean(ratios),
        0.85,
        kept=True,
    )
    frozen = found.get(VARIANTS[0], {}).get("adaptive+freeze")
    for metric, aim in (("mean", 0.36), ("p95", 0.45), ("longest", 0.55)) if frozen else ():
        yield Aim(f"freezing allowed: {metric} / that of draining LRU", frozen[metric], aim, kept=True)


# -- how far it is to what is possible


def least(case: Small) -> float:
    """The least total wait, seconds, by the oracle."""
    spec = specs({"m0": case.size})[0].replicas[0]
    seconds = [EXACT.prompt(spec, row.prompt) + row.output * EXACT.token(spec, 1) for row in case.rows]
    return Oracle(case, EXACT.mean(spec, "wake1"), EXACT.mean(spec, "sleep1"), seconds).best()


def waited(case: Small, policy: str) -> float:
    """The total wait, seconds, under a policy that knows what things take, but not who comes."""
    models = specs({f"m{n}": case.size for n in range(case.models)})
    devices, settings = [Device(0, "0", case.device)], Settings(host_memory=1000 * GB)
    costs = learnt(models, EXACT)
    machine = Machine(models, devices, settings, EXACT, Warm.ASLEEP, costs=costs, samples=0)
    figures = simulate(machine, [Row(*astuple(row)) for row in case.rows], ALL[policy], policy).all
    return figures.wait.mean * figures.requests


def distance(seeds: Iterable[int]) -> Iterator[str]:
    """All policies beside the oracle, over small cases."""
    cases = [case for seed in seeds for case in small_cases(seed, CASES)]
    best = [least(case) for case in cases]
    yield f"beside an oracle that knows the future: total waits of {len(cases)} small cases as multiples of the least"
    for policy in ("adaptive", *PEERS):
        waits = [waited(case, policy) for case in cases]
        exact = sum(wait <= least + 0.01 for wait, least in zip(waits, best, strict=True))
        yield f"  {policy:<16}{sum(waits) / sum(best):9.2f}   the least there is in {exact} of {len(cases)}"


# -- what a decision costs


PIECES = 100  # of the yardstick


class Timed(Scheduler):
    """Notes what each decision takes, in seconds of this process's CPU time: an event handled, and the next timer.

    A piece of the yardstick is measured after each hundred of them: on a busy machine its pace changes by the second.
    """

    taken: ClassVar[list[float]] = []
    pieces: ClassVar[list[float]] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        if len(self.taken) % 100 == 99:
            self.pieces.append(yardstick(1))
        begun = time.process_time()
        commands = super().handle(event, now)
        super().next_timer()
        self.taken.append(time.process_time() - begun)
        return commands


def yardstick(pieces: int = PIECES) -> float:
    """Seconds that a fixed piece of pure Python takes in this process now: counting a million in a dict.

    The mean, not the best: what is measured beside it suffers from a busy machine in the same way. ``pieces``: of the
    hundred, how many are counted.
    """
    begun = time.process_time()
    for _ in range(pieces):
        table: dict[int, int] = {}
        for n in range(1_000_000 // PIECES):
            table[n % 997] = table.get(n % 997, 0) + n
    return time.process_time() - begun


def decisions() -> list[float]:
    """What decisions take at 100 models and 8 devices, 4 requests per second for a quarter of an hour."""
    rng = random.Random(1)
    weights = {f"m{n}": rng.choice(SIZES_GB) for n in range(100)}
    names, shares = list(weights), [1 / (n + 1) ** 0.8 for n in range(100)]
    rows = [Row(n / 4, rng.choices(names, shares)[0], 900, 150) for n in range(3600)]
    devices = [Device(index, str(index), DEVICE) for index in range(8)]
    machine = Machine(specs(weights), devices, Settings(host_memory=1000 * GB), warm=Warm.ASLEEP, samples=0)
    Timed.taken.clear()
    Timed.pieces.clear()
    simulate(machine, rows, ALL["adaptive"], scheduler=Timed)
    return sorted(Timed.taken)


def admission() -> float:
    """Seconds for a request to a model that serves, and for its end: the better of several thousand, on average."""
    scheduler = Scheduler(specs({"m": 10}), [Device(0, "0", DEVICE)])
    scheduler.handle(RequestArrived("first", "m"), 0.0)
    scheduler.handle(EngineReady("m"), 1.0)
    best = math.inf
    for attempt in range(5):
        arrivals = [RequestArrived(f"{attempt}-{n}", "m") for n in range(2000)]
        ends = [RequestFinished(f"{attempt}-{n}") for n in range(2000)]
        begun = time.process_time()
        for event in arrivals:
            scheduler.handle(event, 2.0)
        best = min(best, (time.process_time() - begun) / len(arrivals))
        for end in ends:
            scheduler.handle(end, 2.0)
    return best


def speed() -> Iterator[Aim]:
    """Microseconds, and as parts of the yardstick, so that a busy machine does not matter."""
    taken, before, request, after = decisions(), yardstick(), admission(), yardstick()
    beside, yard = PIECES * statistics.fmean(Timed.pieces), statistics.fmean((before, after))
    mean = statistics.fmean(taken)
    yield Aim(f"a decision at 100 models and 8 devices, us in the mean of {len(taken)}", 1e6 * mean, 100.0)
    yield Aim("a request to a ready model in Scheduler.handle, us", 1e6 * request, 4.0)
    yield Aim("  the decision in thousandths of the yardstick", 1e3 * mean / beside, 1.3, kept=True)
    yield Aim("  the request in thousandths of the yardstick", 1e3 * request / yard, 0.052, kept=True)
    yield Aim("  (the yardstick, ms)", 1e3 * yard, math.inf)


def main(argv: Sequence[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="bench-schedule", description="The scheduling policies over traces.")
    parser.add_argument("--seeds", default="1-5", help="a range of seeds, such as 1-5 (the default)")
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the length, draining only")
    parser.add_argument(
        "--share", type=float, default=1.0, help="how much of their length the traces have (default: 1)"
    )
    parser.add_argument("--world", default="", help="only those whose name contains this, or the numbers so: 0,3")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {TABLE.name}")
    args = parser.parse_args(argv)
    first, _, last = ("1" if args.quick else args.seeds).partition("-")
    seeds = range(int(first), int(last or first) + 1)
    begun, shown = time.time(), []

    def show(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        shown.extend(lines)

    show("geometric means relative to draining LRU (lower is better); waits are from arrival to an engine")
    found, aims = {}, []
    for variant in _chosen(args.world):
        freezes = variant.sleeps and "batch" not in variant.kind and not args.quick
        policies = [p for p in CONTENDERS if freezes or "+" not in p]
        lines = compare(variant, ["lru", *policies], seeds, 1 / 3 if args.quick else args.share, args.jobs)
        show(*table(variant.name, lines[1:]))
        found[variant] = {line.policy: line for line in lines}
        aims += cell_aims(variant, found[variant])
    aims += overall(found)
    if not args.world:
        show(*distance(seeds))
    aims += [] if args.world else speed()
    missed = sorted((aim for aim in aims if aim.missed), key=lambda aim: -aim.reached / aim.aim)
    aims = [*missed, *[aim for aim in aims if not aim.missed]]
    show("", "the aims, those that were missed first (in brackets: 95 % confidence)", *map(str, aims))
    length = f"{1 / 3 if args.quick else args.share:.2f} of the length"
    show(f"{len(missed)} of {len(aims)} missed; seeds {seeds[0]}-{seeds[-1]}, {length}; {time.time() - begun:.0f} s")
    if args.write:
        write(shown, _summary(aims, f"seeds {seeds[0]}-{seeds[-1]}, {length}"))
    return 0


def _summary(aims: Sequence[Aim], run: str) -> str:
    """A run in a line, for the history."""
    told = [f"{aim.name.strip()} {aim.reached:.2f}" for aim in aims if aim.kept]
    return (
        f"- {datetime.date.today()}, {run}: {'; '.join(told)}; {sum(aim.missed for aim in aims)} of {len(aims)} missed"
    )


def _chosen(wanted: str) -> list[Variant]:
    if wanted and all(part.isdigit() for part in wanted.split(",")):
        return [VARIANTS[int(part)] for part in wanted.split(",")]
    return [variant for variant in VARIANTS if wanted in variant.name]


def write(lines: Sequence[str], summary: str) -> None:
    """The newest tables in full, with the day and the machine; what was written by hand stays; a line for the history.

    Older tables are in git.
    """
    _, _, kept = TABLE.read_text().partition(NOTES) if TABLE.exists() else ("", "", "")
    notes, _, history = kept.partition(HISTORY)
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    head = f"## {datetime.date.today()} · {os.cpu_count()} CPUs, Python {platform.python_version()}, {load}"
    tables = "\n".join([head, "", "```", *lines, "```", "", NOTES])
    TABLE.write_text(f"{tables}{notes.rstrip()}\n\n{HISTORY}\n{summary}\n{history.strip()}\n".replace("\n\n\n", "\n\n"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
