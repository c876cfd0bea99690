"""What it costs to have models leave: the regret of their clients, in request-seconds. Pure arithmetic.

One formula, :meth:`Prices.of`. The price of a set is the sum of its members'
prices, so that the cheapest set can be searched for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllmd.core.eviction import Leaver
from vllmd.core.policy import INFINITY, Knobs, Resident, Situation, Waiting, Way, drain_time

SHORT, LONG = 60.0, 900.0  # seconds in which the two arrival rates fall by e


def longest_drain(leavers: Sequence[Leaver], budget: float = INFINITY) -> float:
    """Expected seconds until all have drained, or ``budget`` or their own drain limits have passed."""
    return max([min(budget, drain_of(r)) for _, r, _ in leavers], default=0.0)


def drain_of(r: Resident) -> float:
    """Expected seconds until its requests have ended, or are cut."""
    return min(r.drain_limit, drain_time(r.service, r.running)) if r.running else 0.0


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


class Prices:
    """The prices of one look."""

    def __init__(self, s: Situation) -> None:
        self._knobs, self._now = s.knobs, s.now
        self._waiters = sum([w.waiters for w in s.waiting])  # all of whom a victim's return would hold up

    def alone(self, w: Waiting, urgent: bool, r: Resident, way: Way) -> float:
        """What ``r`` costs if it leaves that way for ``w``, with the drain budget that suits it best."""
        if not (r.running and r.freezable):
            return self.of(w, r, way, INFINITY)
        one = (Leaver(0.0, r, way),)
        return min([self.of(w, r, way, budget) for budget in budgets(self._knobs, one, urgent)])

    def together(self, w: Waiting, leavers: Sequence[Leaver], budget: float) -> tuple[float, float]:
        """The price of a set, and the cost: seconds until ``w`` serves."""
        price = sum([self.of(w, r, way, budget) for _, r, way in leavers])
        return price, longest_drain(leavers, budget) + sum([way.takes for _, _, way in leavers]) + w.load

    def of(self, w: Waiting, r: Resident, way: Way, budget: float) -> float:
        """What the clients of ``r`` lose if its requests get ``budget`` seconds, and it then leaves that way for ``w``.

        An idle one costs the wait of those who will come while it is away, and
        the time of everybody who waits if it must come back meanwhile. A busy
        one also costs what runs in it, and it must come back; that counts
        ``patience`` times and by its priority: whoever works is not disturbed
        for a little. Idleness has no priority.
        """
        rate = rate_of(r, self._now)
        away = way.takes + w.load + w.service + w.sleep + way.back
        back = self._waiters * (way.takes + way.back)
        if not r.running and not r.queued:
            return rate * away * away / 2 + back * (1.0 - math.exp(-rate * away))
        drain = min(budget, drain_of(r))
        left = r.running * math.exp(-drain / r.service) if budget < INFINITY and r.running else 0.0
        regret = (
            rate * (away + drain) ** 2 / 2  # those who will come
            + r.queued * away
            + left * (away + 0.5)  # those who will be frozen
            + 0.3 * (r.running - left) * drain  # those who have the engine to themselves meanwhile
            + back
        )
        return r.priority * regret * (self._knobs.patience if budget == INFINITY else self._knobs.frozen_patience)


def rate_of(r: Resident, now: float) -> float:
    """Arrivals per second, by the longer or the shorter memory: neither a burst nor a habit is missed."""
    since = min(0.0, r.rate_at - now)
    return max(r.rate * math.exp(since / SHORT), r.rate_long * math.exp(since / LONG))
