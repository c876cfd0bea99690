"""The six arrival patterns of ``make bench-schedule``, made from fixed seeds.

Public traces cannot be shipped with a package, so their shapes are drawn anew:
popularity is Zipf's law, lengths are log-normal fits to a public conversation
trace (prompt median 930 tokens, answer median 129, mean about 210), and the two
``replayed`` scenarios follow minute-rate patterns such as public multi-model
traces show: one smooth with slow swings, one of rare tall spikes with periodic
jobs. Nothing here looks at a policy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    """Models by the size of their weights (GB), and who asks for them when."""

    name: str
    weights: dict[str, int]
    rows: tuple[Row, ...]


def scenarios(seed: int, rate: float = 0.5, duration: float = HOUR) -> Iterator[Scenario]:
    """All six, ``rate`` being requests per second over all models."""
    for name, (count, pattern) in PATTERNS.items():
        rng = random.Random(f"{name}/{seed}")
        weights = _models(count, rng)
        arrivals = pattern(list(weights), rate, duration, rng)
        yield Scenario(name, weights, tuple(Row(t, model, *_lengths(rng)) for t, model in sorted(arrivals)))


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
