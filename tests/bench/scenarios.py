"""The arrival patterns of ``make bench-schedule``, made from fixed seeds.

Public traces cannot be shipped with a package, so their shapes are drawn anew:
popularity is Zipf's law, lengths are log-normal fits to a public conversation
trace (prompt median 930 tokens, answer median 129, mean about 210), and the two
``replayed`` scenarios follow minute-rate patterns such as public multi-model
traces show: one smooth with slow swings, one of rare tall spikes with periodic
jobs. ``scenarios`` has these six for one device, ``fleet`` three of them for a
machine of several, ``batch`` a hundred questions at once, ``days`` a day with its
night. Nothing here looks at a policy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

HOUR = 3600.0
SIZES_GB = (4, 6, 8, 8, 14, 14, 16, 16, 24, 28, 40)


@dataclass(frozen=True, slots=True)
class Row:
    """One request: ``time`` in seconds from the start, lengths in tokens."""

    time: float
    model: str
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """Models by the size of their weights (GB, over all their devices), and who asks for them when."""

    name: str
    weights: dict[str, int]
    rows: tuple[Row, ...]
    spans: dict[str, int] = field(default_factory=dict)  # how many devices a model takes, where it is not one


def scenarios(seed: int, rate: float = 0.5, duration: float = HOUR) -> Iterator[Scenario]:
    """All six, ``rate`` being requests per second over all models."""
    for name, (count, pattern) in PATTERNS.items():
        rng = random.Random(f"{name}/{seed}")
        weights = _models(count, rng)
        arrivals = pattern(list(weights), rate, duration, rng)
        yield Scenario(name, weights, tuple(Row(t, model, *_lengths(rng)) for t, model in sorted(arrivals)))


def fleet(seed: int, devices: Sequence[int], rate: float, duration: float, wide: bool) -> Iterator[Scenario]:
    """Three patterns over seven models per 80 GB; none is larger than the largest device. ``wide``: some take two."""
    for name in FLEET_PATTERNS:
        rng = random.Random(f"{name}/{seed}/{devices}")
        largest, places = max(devices), sum(devices) / 80
        sizes = [size for size in SIZES_GB if 1.05 * size + 2 <= largest]
        weights = {f"m{n}-{size}g": size for n, size in enumerate(rng.choices(sizes, k=max(4, round(7 * places))))}
        spans = {}
        if wide:  # each fourth one is too large for one device, and takes two alike
            names = [f"wide{n}-60g" for n in range(max(1, len(weights) // 4))]
            spans = dict.fromkeys(names, 2)
            weights = {**weights, **dict.fromkeys(names, 60)}
        names = list(weights)
        rng.shuffle(names)
        arrivals = PATTERNS[name][1](names, rate * places, duration, rng)
        yield Scenario(name, weights, tuple(Row(t, model, *_lengths(rng)) for t, model in sorted(arrivals)), spans)


def batch(seed: int, busy: bool = False) -> Scenario:
    """Two hundred requests to twenty models within a second, three of which fit; ``busy``: one is never idle."""
    rng = random.Random(f"batch/{seed}")
    weights = {f"b{n}-24g": 24 for n in range(20)}
    rows = [Row(rng.random(), model, 100, 30) for model in weights for _ in range(10)]
    if busy:  # a stream of long answers from before, to one that leaves no room beside it
        weights["busy-76g"] = 76
        rows += [Row(0.5 * n, "busy-76g", 100, 400) for n in range(240)]
        rows = [Row(row.time + 10 * (row.model != "busy-76g"), row.model, row.prompt, row.output) for row in rows]
    return Scenario("batch behind a busy model" if busy else "batch", weights, tuple(sorted(rows, key=_time)))


def days(seed: int, rate: float) -> Scenario:
    """A day: ``rate`` at noon, a fiftieth of it at night, and each model has its own hours."""
    rng = random.Random(f"days/{seed}")
    weights = _models(9, rng)
    steps, rates = 288, []
    for share in _zipf(len(weights), 0.7):
        late = rng.gauss(0, 2)
        hours = [(step / 12 - 13 - late) / 24 * 2 * math.pi for step in range(steps)]
        rates.append([share * max(0.02, (math.cos(hour) + 0.4) / 1.4) for hour in hours])
    arrivals = _thinned(list(weights), rates, 300.0, rate / 2, 24 * HOUR, rng)
    return Scenario("a day", weights, tuple(Row(t, model, *_lengths(rng)) for t, model in sorted(arrivals)))


def _time(row: Row) -> float:
    return row.time


Arrivals = list[tuple[float, str]]
Pattern = Callable[[list[str], float, float, random.Random], Arrivals]


def _models(count: int, rng: random.Random) -> dict[str, int]:
    """``count`` models of 4 to 40 GB, at least one of them a giant of 40 GB."""
    sizes = [40, 4] + [rng.choice(SIZES_GB) for _ in range(count - 2)]
    rng.shuffle(sizes)
    return {f"m{n}-{size}g": size for n, size in enumerate(sizes)}


def _lengths(rng: random.Random) -> tuple[int, int]:
    """Prompt and answer in tokens."""
    prompt = rng.lognormvariate(math.log(930), 0.75)
    output = rng.lognormvariate(math.log(129), 1.0)
    return min(8000, max(8, int(prompt))), min(1500, max(2, int(output)))


def _zipf(count: int, exponent: float) -> list[float]:
    raw = [1 / (rank + 1) ** exponent for rank in range(count)]
    return [share / sum(raw) for share in raw]


def _poisson(exponent: float) -> Pattern:
    """Independent arrivals whose popularity follows Zipf's law."""

    def pattern(models: list[str], rate: float, duration: float, rng: random.Random) -> Arrivals:
        shares = _zipf(len(models), exponent)
        arrivals: Arrivals = []
        now = rng.expovariate(rate)
        while now < duration:
            arrivals.append((now, rng.choices(models, shares)[0]))
            now += rng.expovariate(rate)
        return arrivals

    return pattern


def _bursty(on: float, off: float, exponent: float) -> Pattern:
    """Each model alternates between silence and bursts of ``on`` seconds in the mean."""

    def pattern(models: list[str], rate: float, duration: float, rng: random.Random) -> Arrivals:
        minutes = int(duration / 5) + 1
        rates = []
        for share in _zipf(len(models), exponent):
            active = _on_off(on, off, duration, rng)
            rates.append([share if active(step * 5.0) else 0.0 for step in range(minutes)])
        return _thinned(models, rates, 5.0, rate, duration, rng)

    return pattern


def _on_off(on: float, off: float, duration: float, rng: random.Random) -> Callable[[float], bool]:
    """When a model is in a burst; both phases are exponential."""
    edges: list[float] = []
    now = rng.expovariate(1 / off)
    while now < duration:
        edges.append(now)
        edges.append(now := now + rng.expovariate(1 / on))
        now += rng.expovariate(1 / off)
    return lambda t: sum(edge <= t for edge in edges) % 2 == 1


def _swings(models: list[str], rate: float, duration: float, rng: random.Random) -> Arrivals:
    """Minute rates that wander slowly: log-normal AR(1) around each model's share, with a common tide."""
    minutes = int(duration / 60) + 1
    rates = []
    for share in _zipf(len(models), 0.9):
        level, phase, row = 0.0, rng.uniform(0, 2 * math.pi), []
        for minute in range(minutes):
            level = 0.9 * level + rng.gauss(0, 0.45)
            row.append(share * math.exp(level) * (1 + 0.5 * math.sin(phase + minute / 20 * math.pi)))
        rates.append(row)
    return _thinned(models, rates, 60.0, rate, duration, rng)


def _spikes(models: list[str], rate: float, duration: float, rng: random.Random) -> Arrivals:
    """Minute rates of functions on a cloud: most minutes empty, tall spikes, some jobs by the clock."""
    minutes = int(duration / 60) + 1
    rates = []
    for rank, share in enumerate(_zipf(len(models), 1.0)):
        if rank % 3 == 2:
            period, offset = rng.choice((5, 10, 15)), rng.randrange(5)
            row = [share * period if minute % period == offset else 0.0 for minute in range(minutes)]
        else:
            row = [share * rng.paretovariate(1.3) if rng.random() < 0.4 else 0.05 * share for _ in range(minutes)]
        rates.append(row)
    return _thinned(models, rates, 60.0, rate, duration, rng)


def _thinned(
    models: list[str], rates: list[list[float]], step: float, rate: float, duration: float, rng: random.Random
) -> Arrivals:
    """Poisson arrivals that follow ``rates`` (per model, per ``step`` seconds), scaled to ``rate`` in the mean."""
    total = sum(sum(row) for row in rates)
    wanted = rate * duration
    arrivals: Arrivals = []
    for model, row in zip(models, rates, strict=True):
        for index, weight in enumerate(row):
            expected = wanted * weight / total
            now = rng.expovariate(1.0)
            while now < expected:
                at = (index + now / expected) * step
                if at < duration:
                    arrivals.append((at, model))
                now += rng.expovariate(1.0)
    return arrivals


PATTERNS: dict[str, tuple[int, Pattern]] = {
    "poisson, mild Zipf": (8, _poisson(0.6)),
    "poisson, steep Zipf": (12, _poisson(1.2)),
    "bursts of a minute": (9, _bursty(60.0, 180.0, 0.5)),
    "bursts of seconds": (10, _bursty(20.0, 100.0, 0.8)),
    "replayed swings": (6, _swings),
    "replayed spikes": (12, _spikes),
}
FLEET_PATTERNS = ("poisson, mild Zipf", "bursts of a minute", "replayed spikes")
