"""Which replicas would have to leave for one that does not fit: sets of victims, by price or by age.

Pure functions of a policy's view. On one device the cheapest set is a knapsack turned round: free at least ``short``
bytes at the lowest sum of prices. It is searched exactly for sets of up to four, which is as many as are ever worth it
on one device (a model that needs five others gone waits long whatever is chosen), depth first in order of price with
the best sum so far as the bound; a larger set is found greedily, by price per byte. For a replica over several devices
one device is chosen after the other, each time the one that costs least on top of what leaves already: the exact answer
would be a search over all combinations, and models of that size share their devices with few others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from vllmd.core.fit import after_sleeps, distance, enough, unclaimed
from vllmd.core.policy import DeviceSupply, OffloadOption, PolicyInput, Resident, Victim, Waiting

Price = Callable[[Resident, OffloadOption], float]  # what it costs to have a resident leave that way, in any one unit


class Candidate(NamedTuple):
    """A resident that could leave, and how."""

    price: float
    resident: Resident
    option: OffloadOption

    @property
    def victim(self) -> Victim:
        """As a plan names it."""
        return Victim(self.resident.model, self.option)


class EvictionSet(NamedTuple):
    """Devices, and who must leave for the newcomer to fit there."""

    devices: tuple[int, ...]
    members: tuple[Candidate, ...]

    @property
    def victims(self) -> tuple[Victim, ...]:
        """As a plan names them."""
        return tuple(candidate.victim for candidate in self.members)


# -- the cheapest


def cheapest(s: PolicyInput, w: Waiting, residents: Sequence[Resident], price: Price) -> EvictionSet | None:
    """The devices and leavers with the lowest sum of prices after which ``w`` fits; None: not even all are enough."""
    supplies = unclaimed(s, w)
    if not supplies:
        return None
    here = [r for r in residents if r.model != w.model]
    for group in groups(w, supplies, here, price):
        eviction = _jointly(w, supplies, group, s.knobs.victims)
        if eviction:
            return eviction
    return None


def cheapest_of(s: PolicyInput, w: Waiting, residents: Sequence[Resident], price: Price) -> EvictionSet | None:
    """The cheapest of just these, asleep or not, each leaving in its preferred way; None: not even all are enough."""
    supplies = unclaimed(s, w)
    group = [Candidate(price(r, r.options[0]), r, r.options[0]) for r in residents]
    return _jointly(w, supplies, group, s.knobs.victims) if supplies else None


def groups(
    w: Waiting, supplies: Sequence[DeviceSupply], residents: Sequence[Resident], price: Price
) -> Iterator[list[Candidate]]:
    """The groups that may leave, the gentlest first: the awake fall asleep, then sleepers stop too, then all stop.

    No sleeper has to stop only because the others are not ready to leave just now: sleepers hold little and are dear
    to have back.
    """
    here = {supply.device for supply in supplies}
    residents = [r for r in residents if not here.isdisjoint(r.devices)]
    yield [Candidate(price(r, r.options[0]), r, r.options[0]) for r in residents if not r.asleep]
    if len(after_sleeps(supplies, w)) >= w.span:
        return
    yield [Candidate(price(r, r.options[0]), r, r.options[0]) for r in residents]
    yield [Candidate(price(r, r.options[-1]), r, r.options[-1]) for r in residents]


def _jointly(w: Waiting, supplies: Sequence[DeviceSupply], group: Sequence[Candidate], most: int) -> EvictionSet | None:
    """One device after the other: always that which costs least on top of those who leave already, the nearest of such.

    How near is to those that are chosen already: the model will exchange data among them.
    """
    leaving: dict[str, Candidate] = {}
    chosen: list[DeviceSupply] = []
    for _ in range(w.span):
        options = []
        for supply in supplies:
            if supply in chosen:
                continue
            here = [candidate for candidate in group if supply.device in candidate.resident.devices]
            coming = sum([candidate.option.frees for candidate in here if candidate.resident.model in leaving])
            short = w.need_on(supply.device) - supply.free - coming
            extra = cover([candidate for candidate in here if candidate.resident.model not in leaving], short, most)
            if extra is not None:
                price = sum([candidate.price for candidate in extra])
                options.append((price, distance(supply, chosen), -supply.free, supply.device, extra))
        if not options:
            return None
        *_, device, extra = min(options, key=lambda option: option[:4])
        chosen.append(next(supply for supply in supplies if supply.device == device))
        leaving.update((candidate.resident.model, candidate) for candidate in extra)
    return EvictionSet(tuple(sorted(supply.device for supply in chosen)), tuple(leaving.values()))


def cover(group: Sequence[Candidate], short: int, most: int) -> tuple[Candidate, ...] | None:
    """The cheapest of the group that free ``short`` bytes: the best set of up to ``most``, else a good larger one."""
    if short <= 0:
        return ()
    useful = sorted([candidate for candidate in group if candidate.option.frees > 0], key=attrgetter("price"))
    if sum([candidate.option.frees for candidate in useful]) < short:
        return None
    return _search(useful, short, most) or _greedy(useful, short)


def _search(ordered: Sequence[Candidate], short: int, most: int) -> tuple[Candidate, ...]:
    """Depth first in order of price: a branch ends when it costs as much as the best set found so far."""
    best: tuple[Candidate, ...] = ()
    lowest = math.inf

    def visit(first: int, short: int, cost: float, chosen: tuple[Candidate, ...]) -> None:
        nonlocal best, lowest
        for index in range(first, len(ordered)):
            candidate = ordered[index]
            if cost + candidate.price >= lowest:
                return
            if candidate.option.frees >= short:
                best, lowest = (*chosen, candidate), cost + candidate.price
                return
            if len(chosen) + 1 < most:
                visit(index + 1, short - candidate.option.frees, cost + candidate.price, (*chosen, candidate))

    visit(0, short, 0.0, ())
    return best


def _greedy(group: Sequence[Candidate], short: int) -> tuple[Candidate, ...]:
    """The cheapest per byte until it is enough, then without those that were not needed after all."""
    chosen: list[Candidate] = []
    for candidate in sorted(group, key=lambda candidate: candidate.price / candidate.option.frees):
        if short <= 0:
            break
        chosen.append(candidate)
        short -= candidate.option.frees
    for candidate in sorted(chosen, key=lambda candidate: -candidate.price):
        if short + candidate.option.frees <= 0:
            chosen.remove(candidate)
            short += candidate.option.frees
    return tuple(chosen)


# -- the oldest


def oldest_first(s: PolicyInput, w: Waiting, residents: Sequence[Resident]) -> EvictionSet | None:
    """The fewest of the least recently used after whose leaving ``w`` fits; None: not even all are enough."""
    supplies = unclaimed(s, w)
    here = [r for r in residents if r.model != w.model]
    for group in groups(w, supplies, here, lambda r, option: r.used) if supplies else ():
        free = {supply.device: supply.free for supply in supplies}
        leaving: list[Candidate] = []
        for candidate in sorted(group, key=_recency):
            if enough(w, free):
                break
            leaving.append(candidate)
            for device in candidate.resident.devices:
                if device in free:
                    free[device] += candidate.option.frees
        if good := enough(w, free):  # those of other devices need not leave after all
            return EvictionSet(good, tuple(c for c in leaving if not set(good).isdisjoint(c.resident.devices)))
    return None


def _recency(candidate: Candidate) -> tuple[bool, bool, float, str]:
    """Sleepers last; of the others the least recently used first, where a request in it is use at this very moment."""
    r = candidate.resident
    return r.asleep, bool(r.running), r.used, r.model
