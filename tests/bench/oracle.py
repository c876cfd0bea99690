"""The least total wait that is possible in a small case, known to one who knows all that will come.

It may do what a policy may, and nothing else: at any event begin a swap for a model that somebody waits for, with any
victims. It is exact because nothing is gained by beginning a swap between two events: gates matter when somebody
arrives, and a device when a transfer or an answer ends. The search tries every swap and "not yet" at each event, and
remembers what it found for a state.

The machine is the simulator's without noise and without the cost of large batches, so that an answer takes the same
time beside others. One device, models that sleep at level 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from tests.bench.scenarios import Row
from vllmd.simulate.physics import GB, Physics

EXACT = Physics(noise=0.0, step_per_request=0.0)


class Small(NamedTuple):
    """Equal models, of which ``places`` fit on the device, and who asks when (seconds) for an answer of what length."""

    size: int  # GB of weights of each model
    models: int
    places: int
    rows: tuple[Row, ...]

    @property
    def device(self) -> int:
        """Bytes: room for so many awake, and a sleeper's remainder of 1 GB for each of the others."""
        return self.places * (int(1.05 * self.size * GB) + 2 * int(GB)) + (self.models - self.places) * int(GB)


def small_cases(seed: int, count: int, requests: int = 11) -> Iterator[Small]:
    """Three models that share one place, or four that share two; half a minute to a minute and a half."""
    rng = random.Random(f"small/{seed}")
    for n in range(count):
        models, places = ((3, 1), (4, 2))[n % 2]
        size, gap = rng.choice((8, 14, 28)), rng.choice((2.0, 4.0, 7.0))
        now, rows = 0.0, []
        for _ in range(requests):
            now += rng.expovariate(1 / gap)
            model = min(int(rng.expovariate(1.0)), models - 1)
            rows.append(Row(now, f"m{model}", 8, rng.randint(20, 600)))
        yield Small(size, models, places, tuple(rows))


class _State(NamedTuple):
    now: float
    coming: int  # the first arrival that is yet to come
    open: tuple[tuple[float, float] | None, ...]  # of each model that is on: serves from, works until
    queues: tuple[tuple[int, ...], ...]  # arrivals that wait, by model
    claimed: float  # a swap drains or sleeps its victims until then
    moving: float  # the last transfer that is under way or certain ends then


class Oracle:
    """The search in one case. ``transfer``: seconds of a wake and of a sleep of any of its models."""

    def __init__(self, case: Small, wake: float, sleep: float, seconds: Sequence[float]) -> None:
        self._case, self._wake, self._sleep = case, wake, sleep
        self._seconds = seconds  # of each answer
        self._at = [row.time for row in case.rows]
        self._who = [int(row.model[1:]) for row in case.rows]
        self._found: dict[_State, float] = {}

    def best(self) -> float:
        """The least sum of waits, seconds."""
        nobody: tuple[tuple[float, float] | None, ...] = (None,) * self._case.models
        return self._least(_State(0.0, 0, nobody, ((),) * self._case.models, 0.0, 0.0))

    def _least(self, s: _State) -> float:
        known = self._found.get(s)
        if known is None:
            known = self._found[s] = min((paid + self._least(after) for paid, after in self._moves(s)), default=0.0)
        return known

    def _moves(self, s: _State) -> Iterator[tuple[float, _State]]:
        """Every swap that may begin now, and waiting for the next event; with the waits that are then certain."""
        if s.now >= s.claimed:
            for target, queue in enumerate(s.queues):
                if queue and s.open[target] is None:
                    for victims in self._victims(s):
                        yield self._swap(s, target, victims)
        later = self._next(s)
        if later < math.inf:
            yield self._pass(s, later)

    def _victims(self, s: _State) -> Iterator[tuple[int, ...]]:
        on = [model for model, times in enumerate(s.open) if times]
        leave = max(0, len(on) + 1 - self._case.places)
        yield from combinations([model for model in on if _serves(s, model)], leave)

    def _swap(self, s: _State, target: int, victims: Sequence[int]) -> tuple[float, _State]:
        done = s.moving
        for drained in sorted(_busy_until(s, victim) for victim in victims):
            done = max(done, drained, s.now) + self._sleep
        begins = max(done, s.now)
        ready = begins + self._wake
        queue, are_open, queues = s.queues[target], list(s.open), list(s.queues)
        for victim in victims:
            are_open[victim] = None
        are_open[target] = (ready, max(ready + self._seconds[n] for n in queue))
        queues[target] = ()
        paid = sum(ready - self._at[n] for n in queue)
        return paid, s._replace(open=tuple(are_open), queues=tuple(queues), claimed=begins, moving=ready)

    def _next(self, s: _State) -> float:
        """When something happens next: somebody comes, an engine serves or is idle, a device is claimed no more."""
        times = [t for on in s.open if on for t in on]
        times += [s.claimed, s.moving, *self._at[s.coming : s.coming + 1]]
        if s.coming >= len(self._at) and not any(s.queues):
            return math.inf  # nobody waits any more, or will
        if s.coming < len(self._at) and self._at[s.coming] <= s.now:
            return s.now
        return min((t for t in times if t > s.now), default=math.inf)

    def _pass(self, s: _State, now: float) -> tuple[float, _State]:
        if s.coming >= len(self._at) or self._at[s.coming] > now:
            return 0.0, s._replace(now=now)
        n, model = s.coming, self._who[s.coming]
        on = s.open[model]
        if on is None:
            queues = (*s.queues[:model], (*s.queues[model], n), *s.queues[model + 1 :])
            return 0.0, s._replace(now=now, coming=n + 1, queues=queues)
        begins = max(on[0], now)
        works = (on[0], max(on[1], begins + self._seconds[n]))
        return begins - now, s._replace(now=now, coming=n + 1, open=(*s.open[:model], works, *s.open[model + 1 :]))


def _serves(s: _State, model: int) -> bool:
    on = s.open[model]
    return on is not None and on[0] <= s.now


def _busy_until(s: _State, model: int) -> float:
    on = s.open[model]
    return on[1] if on else s.now
