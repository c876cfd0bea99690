"""The policies that ship: ``adaptive``, the default, and plain ``lru``. Pure functions of a Situation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vllmd.core.eviction import Choice, Leaver, cheapest, fits, oldest_first, unclaimed
from vllmd.core.policy import (
    INFINITY,
    HostClaim,
    Knobs,
    Plan,
    Policy,
    Resident,
    Situation,
    Waiting,
    Way,
    drain_time,
    greedy_fill,
)

NUMBERS = dict[str, float | int | str]


def plain(s: Situation) -> Plan | None:
    """The oldest waiter that fits without anybody leaving."""
    for w in s.waiting:
        devices = fits(s, w)
        if devices is not None:
            return Plan(w.model, devices, why="it fits", numbers=_waited(s, w))
    return None


def too_early(s: Situation, choice: Choice, drain: float) -> bool:
    """A transfer still under way there outlasts the victims' drain and sleep: closing gates now would idle them."""
    busy = max((s.rooms[index].busy for index in choice.devices), default=0.0)
    return busy > 0 and drain + takes(choice) + 1.0 < busy


def takes(choice: Choice) -> float:
    """Seconds to put all to sleep, one after the other."""
    return sum(leaver.way.takes for leaver in choice.leavers)


def without(s: Situation, devices: Iterable[int]) -> Situation:
    """The same, but for these devices: an older waiter is next there, and nobody may overtake it."""
    held = frozenset(devices)
    return s._replace(rooms={index: room for index, room in s.rooms.items() if index not in held}) if held else s


def due_there(s: Situation, w: Waiting) -> list[int]:
    """Devices where ``w`` cannot have its turn just now, but will once others have come to rest."""
    return [room.device for room in unclaimed(s, w) if room.sleepable >= w.need]


def longest_drain(leavers: Sequence[Leaver], budget: float = INFINITY) -> float:
    """Expected seconds until all have drained, or ``budget`` has passed."""
    drains = (drain_time(leaver.resident.service, leaver.resident.running) for leaver in leavers)
    return min(budget, max(drains, default=0.0))


class Lru:
    """The least recently used leave first, drained, for the waiter that came first; nobody overtakes it."""

    name = "lru"
    in_order = False

    def choose(self, s: Situation) -> Plan | None:
        """The oldest waiter gets its place; who waits longest can so never be overtaken for ever."""
        for w in s.waiting:
            numbers = _waited(s, w)
            devices = fits(s, w)
            if devices is not None:
                return Plan(w.model, devices, why="it fits", numbers=numbers)
            choice = oldest_first(s, w, s.residents)
            if choice and not too_early(s, choice, longest_drain(choice.leavers)):
                why = "the least recently used make room"
                return Plan(w.model, choice.devices, choice.victims, INFINITY, why, numbers)
            s = without(s, choice.devices if choice else due_there(s, w))
        return None

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """As the adaptive one does: where sleepers are kept is not this policy's difference."""
        return greedy_fill(claims, budget)


class Offer(NamedTuple):
    """The best exchange found for a waiter, and what it is worth."""

    choice: Choice
    budget: float  # seconds that running requests get before they are frozen
    price: float  # request-seconds: what the victims' clients lose, times the patience
    cost: float  # seconds until the waiter serves
    waited: float  # request-seconds that its queue has waited


class Adaptive:
    """LRU that drains, with rent or buy, patience, order, minimum residency and a deadline (the default).

    The models that are waited for are looked at in the order of their oldest request:

    1. What fits is loaded at once.
    2. Otherwise the victims with the lowest price are sought. A victim's price
       is its clients' regret, the request-seconds that they will lose; where
       requests are running it counts ``patience`` times. A drain leaves a whole
       engine idle until the longest of its answers has ended, and a moment at
       which another model, or the same one, is idle is mostly near.
    3. A queue that has waited ``kappa`` of the price gets its exchange: rent
       has been paid for long enough, now it is bought.
    4. Who has waited past the deadline asks for no price any more.
    5. Nobody overtakes one who has waited past the deadline but must wait yet,
       for a transfer to end or a victim to have served its time: else small
       models would take what a large one waits for. Where exchanges are dear
       (all who wait need longer than the shortest deadline: scarce host memory,
       cold starts) the same holds from the beginning, for there it is what
       makes the longest waits.
    6. A busy model that has just been loaded stays for as long as the exchange
       costs, deadline or not, so that every exchange serves somebody.
    """

    name = "adaptive"
    in_order = False

    def choose(self, s: Situation) -> Plan | None:
        """The first whose exchange is due."""
        if not s.waiting:
            return None
        deadline = max(s.knobs.deadline, s.knobs.rounds * sum(w.load + w.sleep for w in s.waiting))
        dear = deadline > s.knobs.deadline
        total = sum(w.waiters for w in s.waiting)
        here = _by_device(s.residents)
        for w in sorted(s.waiting, key=lambda w: not w.impatient) if len(s.waiting) > 1 else s.waiting:
            devices = fits(s, w)
            if devices is not None:
                return Plan(w.model, devices, why="it fits", numbers=_waited(s, w))
            if not unclaimed(s, w):
                continue
            urgent = w.impatient or s.now - w.oldest > deadline
            residents = here.get(w.devices[0], ()) if len(w.devices) == 1 else s.residents
            offer = _offer(s, w, residents, total, urgent)
            if offer is None:
                held = due_there(s, w)
            elif not urgent and offer.waited < s.knobs.kappa * offer.price:
                continue
            elif too_early(s, offer.choice, offer.cost - w.load - takes(offer.choice)):
                held = list(offer.choice.devices)
            else:
                return _bought(w, offer, deadline, urgent)
            if urgent or dear:
                s = without(s, held)
        return None

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """The greedy fill."""
        return greedy_fill(claims, budget)


def _by_device(residents: Sequence[Resident]) -> dict[int, list[Resident]]:
    here: dict[int, list[Resident]] = {}
    for r in residents:
        for device in r.devices:
            here.setdefault(device, []).append(r)
    return here


def _bought(w: Waiting, offer: Offer, deadline: float, urgent: bool) -> Plan:
    why = "its deadline has passed" if urgent else "the wait is worth the exchange"
    numbers = _numbers(w, offer, deadline)
    return Plan(w.model, offer.choice.devices, offer.choice.victims, offer.budget, why, numbers)


def _waited(s: Situation, w: Waiting) -> NUMBERS:
    return {"waiting": w.waiters, "waited": round(s.now - w.oldest, 3)}


def _numbers(w: Waiting, offer: Offer, deadline: float) -> NUMBERS:
    return {
        "waiting": w.waiters,
        "waited": round(offer.waited, 3),
        "price": round(offer.price, 3),
        "cost": round(offer.cost, 3),
        "deadline": round(deadline, 3),
    }


def _offer(s: Situation, w: Waiting, residents: Sequence[Resident], total: int, urgent: bool) -> Offer | None:
    """The cheapest victims, and the drain budget that suits them best."""
    may_leave = [r for r in residents if _served_its_time(s, r, w)]

    def alone(r: Resident, way: Way) -> float:
        """What it would cost if it were the only one to leave: the sum over a set is near what the set costs."""
        one = (Leaver(0.0, r, way),)
        if not r.running:
            return _priced(s, w, one, INFINITY, total)[0]
        return min(_priced(s, w, one, budget, total)[0] for budget in budgets(s.knobs, one, urgent))

    choice = cheapest(s, w, may_leave, alone)
    if choice is None:
        return None
    waited = (w.waiters * s.now - w.arrived) * w.priority
    offers = []
    for budget in budgets(s.knobs, choice.leavers, urgent):
        price, cost = _priced(s, w, choice.leavers, budget, total)
        offers.append(Offer(choice, budget, price, cost, waited))
    return min(offers, key=lambda offer: offer.price + w.waiters * w.priority * offer.cost)


def _served_its_time(s: Situation, r: Resident, w: Waiting) -> bool:
    if r.asleep or not (r.running or r.queued):
        return True
    way = r.ways[0]
    return s.now - r.since >= s.knobs.residency * (way.takes + w.load + way.back)


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


def _priced(s: Situation, w: Waiting, leavers: Sequence[Leaver], budget: float, total: int) -> tuple[float, float]:
    """The price (regret in request-seconds, times the patience) and the cost (seconds until ``w`` serves)."""
    drain = longest_drain(leavers, budget)
    away = sum(leaver.way.takes for leaver in leavers) + w.load
    regret = 0.0
    busy = False
    for _, r, way in leavers:
        regret += r.priority * _regret(s.now, r, way, drain, away + w.service + w.sleep + way.back, budget, total)
        busy = busy or bool(r.running or r.queued)
    if busy:
        regret *= s.knobs.patience if budget == INFINITY else s.knobs.frozen_patience
    return regret, drain + away


def _regret(now: float, r: Resident, way: Way, drain: float, away: float, budget: float, total: int) -> float:
    """The request-seconds that the clients of ``r`` lose if it drains for ``drain`` and is then gone for ``away``."""
    since = min(0.0, r.rate_at - now)
    rate = max(r.rate * math.exp(since / 60.0), r.rate_long * math.exp(since / 900.0))
    left = r.running * math.exp(-drain / r.service) if budget < INFINITY and r.running else 0.0
    back = 1.0 if r.running or r.queued else 1.0 - math.exp(-rate * away)
    return (
        rate * (away + drain) ** 2 / 2  # those who will come
        + r.queued * away
        + left * (away + 0.5)  # those who will be frozen
        + 0.3 * (r.running - left) * drain  # those who have the engine to themselves meanwhile
        + back * total * (way.takes + way.back)  # everybody who waits, if it has to come back
    )


POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (Adaptive(), Lru())}
