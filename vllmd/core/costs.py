"""What things cost, learnt per engine from what happened, starting from published figures.

Seconds for starts, wakes, sleeps and requests; arrivals per second; measured
footprints. The priors are a fit to vLLM 0.11 on one A100 (W: gigabytes of
weights): cold start 37 + 0.2 W, level 1 wake 0.25 + 0.045 W and sleep
0.05 + 0.0455 W, level 2 wake 0.55 + 0.245 W and sleep 0.5. A start's is by the
engine's kind and size where the daemon knows better (``start_time``). Other
machines differ by an order of magnitude, so

- the first observation replaces the prior, and the later ones are averaged in;
- until then the prior is corrected by what others of the same engine kind took
  on this machine beside theirs (:class:`Calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vllmd.core.types import Footprint, ReplicaSpec, Source

GB = 1e9
STEP = 0.2  # by what the logarithm of a correction must have changed to count
NEWEST = 0.3  # the least weight of a new observation
LEAST = 0.001  # seconds
SHORT, LONG = 60.0, 900.0  # seconds in which the two arrival rates fall by e
EACH_SHORT, EACH_LONG = 1.0 / SHORT, 1.0 / LONG  # what each arrival adds to them
TOGETHER = 0.01  # seconds, in which they fall by less than a five thousandth

_PRIORS: Mapping[str, Callable[[float], float]] = {
    "start": lambda w: 37 + 0.2 * w,
    "wake1": lambda w: 0.25 + 0.045 * w,
    "wake2": lambda w: 0.55 + 0.245 * w,
    "sleep1": lambda w: 0.05 + 0.0455 * w,
    "sleep2": lambda w: 0.5,
    "stop": lambda w: 3.0,
    "service": lambda w: 5.0,
}
KINDS = tuple(_PRIORS)
_BROUGHT_UP, _TAKEN_DOWN = ("start", "wake1", "wake2"), ("stop", "sleep1", "sleep2")  # by level; 0: not loaded


def wake_kind(level: int) -> str:
    """The kind of the command that has an engine serve, from sleep ``level`` or from nothing (0)."""
    return _BROUGHT_UP[level]


def sleep_kind(level: int) -> str:
    """The kind of the command that puts an engine to sleep at ``level``, or stops it (0)."""
    return _TAKEN_DOWN[level]


class Rate:
    """An arrival rate that forgets: each arrival counts 1/tau, and fades by e in tau seconds (``Costs.arrived``)."""

    __slots__ = ("at", "tau", "value")

    def __init__(self, tau: float, value: float = 0.0, at: float = 0.0) -> None:
        self.tau, self.value, self.at = tau, value, at

    def read(self, now: float) -> float:
        """Arrivals per second, as of ``now``."""
        return self.value * math.exp(min(0.0, (self.at - now) / self.tau))


class Calibration:
    """How many times longer things take on this machine than the priors say, for one engine kind.

    The factor follows in steps of a fifth: views that are drawn from priors are kept, and each step has all of them
    drawn anew.
    """

    def __init__(self) -> None:
        self._logs: dict[str, float] = {}  # the logarithms of the ratios, by kind of command
        self._seen: dict[str, int] = {}
        self._in_force: dict[str, float] = {}  # the logarithms that factors are made of; they follow in steps
        self.factors: dict[str, float] = {}  # what to multiply a prior by, where something is known

    def observe(self, kind: str, ratio: float) -> bool:
        """Learn from a command that took ``ratio`` times its prior. Returns whether the factor changed."""
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        known = self._logs.get(kind, 0.0)
        new = self._logs[kind] = known + max(NEWEST, 1.0 / seen) * (math.log(max(ratio, LEAST)) - known)
        if abs(new - self._in_force.get(kind, 0.0)) < STEP:
            return False
        self._in_force[kind], self.factors[kind] = new, math.exp(new)
        return True


class Costs:
    """The figures of one replica."""

    __slots__ = (
        "_calibration",
        "_known",
        "_priors",
        "_seen",
        "_start_time",
        "_weights",
        "footprint",
        "needed",
        "of",
        "rate",
        "rate_long",
    )

    def __init__(
        self, weights: float = 0.0, start_time: float | None = None, calibration: Calibration | None = None
    ) -> None:
        self._weights, self._start_time = weights, start_time
        self._known: dict[str, float] = {}
        self._priors: dict[str, float] = {}  # those that were needed
        self._seen: dict[str, int] = {}
        self._calibration = calibration or Calibration()
        self.rate, self.rate_long = Rate(SHORT), Rate(LONG)
        self.footprint: Footprint | None = None  # as measured
        self.needed = 0  # bytes per device that a start said it needs beyond the configured
        self.of = ""  # the specification whose footprint was measured

    def _prior(self, kind: str) -> float:
        if kind not in self._priors:
            given = self._start_time if kind == "start" else None
            self._priors[kind] = _PRIORS[kind](self._weights) if given is None else given
        return self._priors[kind]

    def seconds(self, kind: str) -> float:
        """The expected time of ``kind``, one of KINDS. It is asked for a dozen times in each look of the policy."""
        known = self._known.get(kind)
        if known is not None:
            return known
        prior = self._priors.get(kind)
        expected = (self._prior(kind) if prior is None else prior) * self._calibration.factors.get(kind, 1.0)
        if kind == "stop":  # an engine that starts in no time is gone in no time
            return min(expected, self._known.get("start", math.inf))
        return expected

    def learnt(self, kind: str) -> float:
        """The expected time of ``kind`` if it was ever measured; else 0."""
        return self._known.get(kind, 0.0)

    def wake(self, level: int) -> float:
        """Seconds to have it serve again from sleep ``level``, or from nothing (0)."""
        return self.seconds(wake_kind(level))

    def sleep(self, level: int) -> float:
        """Seconds to put it to sleep at ``level``, or to stop it (0)."""
        return self.seconds(sleep_kind(level))

    def observe(self, kind: str, seconds: float) -> bool:
        """Learn from one that took ``seconds``. Absurd times (negative, infinite) teach nothing.

        Returns whether that changes what is expected of others of its engine kind.
        """
        if not 0.0 <= seconds < math.inf:
            return False
        if seconds < LEAST:  # nothing takes no time
            seconds = LEAST
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        known = self._known.get(kind, 0.0)
        weight = NEWEST if seen * NEWEST > 1.0 else 1.0 / seen
        self._known[kind] = known + weight * (seconds - known)
        if kind == "service":  # how long answers are is the clients' affair
            return False
        return self._calibration.observe(kind, seconds / self._prior(kind))

    def forget_times(self) -> None:
        """Forget the times of an engine that is of another kind now, or whose model has another size."""
        self._known.clear()
        self._seen.clear()

    def arrived(self, now: float) -> None:
        """Count a request, in the rates of the last minutes and of the last hours.

        Within ``TOGETHER`` of another one it counts as if it had come with it, which saves the fading.
        """
        short, long = self.rate, self.rate_long
        if now - short.at > TOGETHER:
            for rate in (short, long):
                rate.value, rate.at = rate.value * math.exp((rate.at - now) / rate.tau), now
        short.value += EACH_SHORT
        long.value += EACH_LONG

    @property
    def has_learnt(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self._seen or self.footprint or self.needed)

    def to_dict(self) -> dict[str, Any]:
        """Only what was learnt; arrival rates are not kept (the clock is another one next time)."""
        seen = {kind: [self._known[kind], count] for kind, count in self._seen.items()}
        learnt: dict[str, Any] = {"seconds": seen, "of": self.of, "asked": self.needed}
        if self.footprint:
            f = self.footprint
            learnt["footprint"] = [f.starting, f.awake, f.asleep, f.host]
        return learnt

    def restore(self, learnt: Mapping[str, Any]) -> None:
        """Take back what :meth:`to_dict` gave. Raises ValueError, TypeError or KeyError if it is something else."""
        for kind, (seconds, count) in learnt["seconds"].items():
            if kind in _PRIORS and 0 <= float(seconds) < math.inf and int(count) > 0:
                self._known[kind], self._seen[kind] = float(seconds), int(count)
                if kind != "service":
                    self._calibration.observe(kind, float(seconds) / self._prior(kind))
        self.of, self.needed = str(learnt["of"]), int(learnt["asked"])
        if "footprint" in learnt:
            starting, awake, asleep, host = map(int, learnt["footprint"])
            if min(starting, awake, asleep, host) < 0:
                raise ValueError("negative memory")
            self.footprint = Footprint(starting, awake, asleep, host, Source.MEASURED)


class CostBook:
    """The learnt figures of all replicas, by id; the daemon keeps them in its cache between runs."""

    def __init__(self) -> None:
        self._replicas: dict[str, Costs] = {}
        self._calibrations: dict[str, Calibration] = {}  # by engine kind
        self._learnt: dict[str, Mapping[str, Any]] = {}

    def known(self, spec: ReplicaSpec) -> Costs | None:
        """The figures of a replica, as ``open`` gives them; None if it has none yet, and so nothing to keep."""
        return self.open(spec) if spec.id in self._replicas or spec.id in self._learnt else None

    def open(self, spec: ReplicaSpec) -> Costs:
        """The figures of a replica. What was measured of a differently configured one is forgotten."""
        costs = self._replicas.get(spec.id)
        if costs is None:
            weights = (spec.weights or spec.footprint.awake) / GB
            calibration = self._calibrations.setdefault(spec.engine, Calibration())
            costs = Costs(weights, spec.start_time, calibration)
            learnt = self._learnt.pop(spec.id, None)
            try:
                if learnt is not None:
                    costs.restore(learnt)
            except (ValueError, TypeError, KeyError, AttributeError):
                costs = Costs(weights, spec.start_time, calibration)  # a damaged cache is no cache
            self._replicas[spec.id] = costs
        f, engine = spec.footprint, f"{spec.weights}/{spec.device_count}/{spec.engine}"
        of = f"{spec.settings}/{f.starting}/{f.awake}/{f.source.name}/{engine}"
        if costs.of != of:
            if costs.of and _size(costs.of) != _size(of):
                costs.forget_times()
            costs.footprint, costs.needed, costs.of = None, 0, of
        return costs

    def rename(self, name: str, now: str) -> None:
        """The replica has another id."""
        if name in self._replicas:
            self._replicas[now] = self._replicas.pop(name)

    def usual(self, replica: str, kind: str) -> float:
        """The seconds that ``kind`` takes with a replica, as measured; 0 where it never was."""
        return self._replicas[replica].learnt(kind) if replica in self._replicas else 0.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._replicas)

    def to_dict(self) -> dict[str, Any]:
        """For the daemon's cache: plain numbers, strings, lists and dicts."""
        known = {name: costs.to_dict() for name, costs in self._replicas.items() if costs.has_learnt}
        return {**self._learnt, **known}

    @classmethod
    def from_dict(cls, learnt: Mapping[str, Any]) -> CostBook:
        """What :meth:`to_dict` gave. Entries that are damaged are passed over: it is only a cache."""
        book = cls()
        book._learnt = {name: entry for name, entry in learnt.items() if isinstance(entry, Mapping)}
        return book


def _size(of: str) -> str:
    """The part of ``Costs.of`` that decides how long things take: weights, number of devices, engine kind."""
    return "/".join(of.split("/")[-3:])
