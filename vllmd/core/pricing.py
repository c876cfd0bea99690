"""What it costs to have models leave: the regret of their clients, in request-seconds. Pure arithmetic.

One formula, :meth:`Prices.of`. The price of a set is the sum of its members'
prices, so that the cheapest set can be searched for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllmd.core.costs import LONG, SHORT
from vllmd.core.eviction import Candidate
from vllmd.core.policy import INFINITY, Knobs, OffloadOption, PolicyInput, Resident, Waiting, drain_time


def longest_drain(candidates: Sequence[Candidate], budget: float = INFINITY) -> float:
    """Expected seconds until all have drained, or ``budget`` or their own drain limits have passed."""
    return max([min(budget, drain_of(r)) for _, r, _ in candidates], default=0.0)


def drain_of(r: Resident) -> float:
    """Expected seconds until its requests have ended, or are cut."""
    return min(r.drain_limit, drain_time(r.service, r.running)) if r.running else 0.0


def budgets(knobs: Knobs, candidates: Sequence[Candidate], urgent: bool) -> tuple[float, ...]:
    """How long the victims' requests may be waited for before they are frozen; those who cannot be are waited for."""
    busy = [candidate for candidate in candidates if candidate.resident.running]
    if not busy or not all(candidate.resident.freezable and candidate.option.level for candidate in busy):
        return (INFINITY,)
    if urgent:
        return knobs.budgets
    if any(candidate.resident.refrozen for candidate in busy):
        return (INFINITY,)
    return (*knobs.budgets, INFINITY)


class Prices:
    """The prices of one look."""

    def __init__(self, s: PolicyInput) -> None:
        self._knobs, self._now = s.knobs, s.now
        self._waiters = sum([w.waiters for w in s.waiting])  # all of whom a victim's return would hold up

    def alone(self, w: Waiting, urgent: bool, r: Resident, option: OffloadOption) -> float:
        """What ``r`` costs if it leaves that way for ``w``, with the drain budget that suits it best."""
        if not (r.running and r.freezable):
            return self.of(w, r, option, INFINITY)
        one = (Candidate(0.0, r, option),)
        return min([self.of(w, r, option, budget) for budget in budgets(self._knobs, one, urgent)])

    def together(self, w: Waiting, candidates: Sequence[Candidate], budget: float) -> tuple[float, float]:
        """The price of a set, and the cost: seconds until ``w`` serves."""
        price = sum([self.of(w, r, option, budget) for _, r, option in candidates])
        return price, longest_drain(candidates, budget) + sum([option.takes for _, _, option in candidates]) + w.load

    def of(self, w: Waiting, r: Resident, option: OffloadOption, budget: float) -> float:
        """What the clients of ``r`` lose if its requests get ``budget`` seconds, and it then leaves that way for ``w``.

        An idle one costs the wait of those who will come while it is away, and
        the time of everybody who waits if it must come back meanwhile. A busy
        one also costs what runs in it, and it must come back; that counts
        ``patience`` times and by its priority: whoever works is not disturbed
        for a little. Idleness has no priority.
        """
        rate = rate_of(r, self._now)
        away = option.takes + w.load + w.service + w.sleep + option.back
        back = self._waiters * (option.takes + option.back)
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
        return r.priority * regret * (self._knobs.patience if budget == INFINITY else 1.0)


def rate_of(r: Resident, now: float) -> float:
    """Arrivals per second, by the longer or the shorter memory: neither a burst nor a habit is missed."""
    since = min(0.0, r.rate_at - now)
    return max(r.rate * math.exp(since / SHORT), r.rate_long * math.exp(since / LONG))
