"""What it costs to have models leave: the regret of their clients, in request-seconds. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllmd.core.eviction import Leaver
from vllmd.core.policy import INFINITY, Knobs, Resident, Situation, Waiting, Way, drain_time

SURELY = 1 - 1e-9  # a bound that is worked out in another order than what it bounds leaves room for rounding
SHORT, LONG = 60.0, 900.0  # seconds in which the two arrival rates fall by e


def longest_drain(leavers: Sequence[Leaver], budget: float = INFINITY) -> float:
    """Expected seconds until all have drained, or ``budget`` has passed."""
    drain = max([drain_time(r.service, r.running) for _, r, _ in leavers], default=0.0)
    return min(budget, drain)


def budgets(knobs: Knobs, leavers: Sequence[Leaver], urgent: bool) -> tuple[float, ...]:
    """How long the victims' requests may be waited for before they are frozen; those who cannot be are waited for."""
    busy = [leaver for leaver in leavers if leaver.resident.running]
    if not busy or not all(leaver.resident.freezable and leaver.way.level for leaver in busy):
        return (INFINITY,)
    if urgent:
        return knobs.budgets
    if any(leaver.resident.refrozen for leaver in busy):
        return (INFINITY,)
    return (*knobs.budgets, INFINITY)


class Known(NamedTuple):
    """What of a drained resident's price does not depend on whom it leaves for."""

    weight: float  # its priority, times the patience where it is busy
    rate: float  # arrivals per second
    drain: float  # seconds
    fixed: float  # request-seconds: the drain of those who run, and the return if that is certain
    back: float  # request-seconds: the return if that is not certain


class Prices:
    """The prices of one look."""

    def __init__(self, s: Situation) -> None:
        self.s = s
        self.total = sum([w.waiters for w in s.waiting])  # all of whom a victim's return would hold up
        self._meanwhile = min([w.load + w.service + w.sleep for w in s.waiting], default=0.0)
        self._known: dict[tuple[str, int], Known] = {}
        self._least: dict[str, float] = {}

    def alone(self, w: Waiting, urgent: bool, r: Resident, way: Way) -> float:
        """What it would cost if it were the only one to leave: the sum over a set is near what the set costs."""
        if r.running and r.freezable:
            one = (Leaver(0.0, r, way),)
            return min(self.together(w, one, budget)[0] for budget in budgets(self.s.knobs, one, urgent))
        return self._drained(r, way, w.load + w.service + w.sleep)

    def floor(self, residents: Iterable[Resident]) -> float:
        """No set of them is cheaper, for whomever they leave, if all are busy; else 0."""
        lowest = INFINITY
        for r in residents:
            if r.freezable or not (r.running or r.queued):
                return 0.0
            known = self._know(r, r.ways[0])
            lowest = min(lowest, known.weight * known.fixed)
        return lowest if lowest < INFINITY else 0.0

    def least(self, r: Resident) -> float:
        """No set with this one in it is cheaper, for whomever of the waiting they leave."""
        least = self._least.get(r.model)
        if least is None:
            freezes = r.running and r.freezable
            least = 0.0 if freezes else self._drained(r, r.ways[0], self._meanwhile) * SURELY
            self._least[r.model] = least
        return least

    def _drained(self, r: Resident, way: Way, meanwhile: float) -> float:
        """The price of one that leaves alone; ``meanwhile``: seconds that the other one needs."""
        known = self._know(r, way)
        away = way.takes + meanwhile + way.back
        regret = known.rate * (away + known.drain) ** 2 / 2 + r.queued * away + known.fixed
        if known.back:
            regret += known.back * (1.0 - math.exp(-known.rate * away))
        return known.weight * regret

    def together(self, w: Waiting, leavers: Sequence[Leaver], budget: float) -> tuple[float, float]:
        """The price of a set (regret times the patience), and the cost: seconds until ``w`` serves."""
        drain = longest_drain(leavers, budget)
        away = sum([way.takes for _, _, way in leavers]) + w.load
        regret, busy = 0.0, False
        for _, r, way in leavers:
            gone = away + w.service + w.sleep + way.back
            regret += r.priority * self._regret(r, way, drain, gone, budget)
            busy = busy or bool(r.running or r.queued)
        if busy:
            regret *= self.s.knobs.patience if budget == INFINITY else self.s.knobs.frozen_patience
        return regret, drain + away

    def _regret(self, r: Resident, way: Way, drain: float, away: float, budget: float) -> float:
        """What the clients of ``r`` lose if it drains for ``drain`` and is then gone for ``away``."""
        rate = rate_of(r, self.s.now)
        left = r.running * math.exp(-drain / r.service) if budget < INFINITY and r.running else 0.0
        back = 1.0 if r.running or r.queued else 1.0 - math.exp(-rate * away)
        return (
            rate * (away + drain) ** 2 / 2  # those who will come
            + r.queued * away
            + left * (away + 0.5)  # those who will be frozen
            + 0.3 * (r.running - left) * drain  # those who have the engine to themselves meanwhile
            + back * self.total * (way.takes + way.back)  # everybody who waits, if it has to come back
        )

    def _know(self, r: Resident, way: Way) -> Known:
        known = self._known.get((r.model, way.level))
        if known is None:
            known = self._known[r.model, way.level] = self._work_out(r, way)
        return known

    def _work_out(self, r: Resident, way: Way) -> Known:
        drain = drain_time(r.service, r.running)
        back = self.total * (way.takes + way.back)
        if not r.running and not r.queued:
            return Known(r.priority, rate_of(r, self.s.now), 0.0, 0.0, back)
        fixed = 0.3 * r.running * drain + back
        return Known(r.priority * self.s.knobs.patience, rate_of(r, self.s.now), drain, fixed, 0.0)


def rate_of(r: Resident, now: float) -> float:
    """Arrivals per second, by the longer or the shorter memory: neither a burst nor a habit is missed."""
    since = min(0.0, r.rate_at - now)
    return max(r.rate * math.exp(since / SHORT), r.rate_long * math.exp(since / LONG))
