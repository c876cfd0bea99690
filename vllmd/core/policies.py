"""The policies that ship: ``adaptive``, the default, and plain ``lru``. Pure functions of a PolicyInput.

A policy is asked for one plan at a time: of those that wait, which is the first whose swap is due, and which replicas
leave for it? It goes through the waiters in turn. For each one it asks, from the cheapest question to the dearest: does
it fit as it is (``fit.py``); must it wait whatever a search would find; can it serve sooner elsewhere; which set of
victims is the cheapest (``eviction.py``, ``pricing.py``), and is it time for that? The first plan ends the look. A
waiter that is next on a device but has to wait yet may *hold* that device against those that come later in the turn.

Why the rules are as they are, with the measurements: "The policy" in ``design.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from vllmd.core.assignment import Item, assign
from vllmd.core.eviction import Candidate, EvictionSet, cheapest, cheapest_of, oldest_first
from vllmd.core.fit import (
    after_sleeps,
    can_move,
    fits,
    if_all_slept,
    if_the_idle_slept,
    if_the_light_left,
    may_fit,
    room_for_these,
    roomiest,
    spare,
    unclaimed,
)
from vllmd.core.policy import (
    INFINITY,
    NOBODY,
    Outlook,
    Plan,
    Policy,
    PolicyInput,
    Resident,
    Victim,
    Waiting,
    drain_time,
    light,
    running_there,
)
from vllmd.core.pricing import Prices, budgets, longest_drain, rate_of

NUMBERS = dict[str, float | int | str]
HEADSTART = 1.0  # seconds added to each waiter's age, so that priority orders those that come together
AHEAD = 1.0  # seconds that a device may stand idle between a transfer's end and that of the victims' leaving
LEAST_LOAD = 0.01  # seconds; to load faster earns no better turn


def plain(s: PolicyInput) -> Plan | None:
    """The oldest waiter that fits without anybody leaving."""
    for w in s.waiting:
        devices = fits(s, w)
        if devices is not None:
            return Plan(w.model, devices, why="it fits", numbers=_waited(s, w))
    return None


def too_early(s: PolicyInput, eviction: EvictionSet, drain: float) -> bool:
    """A transfer still under way there outlasts the victims' drain and sleep: closing gates now would idle them."""
    return drain + takes(eviction) + AHEAD < max([s.supplies[index].until for index in eviction.devices]) - s.now


def takes(eviction: EvictionSet) -> float:
    """Seconds to put all to sleep, one after the other."""
    return sum(candidate.option.takes for candidate in eviction.members)


def without(s: PolicyInput, devices: Iterable[int]) -> PolicyInput:
    """The same, but for these devices: an older waiter is next there, and nobody may overtake it."""
    held = frozenset(devices)
    return (
        s._replace(supplies={index: supply for index, supply in s.supplies.items() if index not in held}) if held else s
    )


def due_there(s: PolicyInput, w: Waiting) -> list[int]:
    """Devices where ``w`` cannot have its turn just now, but will once others have come to rest."""
    return after_sleeps(unclaimed(s, w), w)


# -- sleepers that serve elsewhere


def elsewhere(s: PolicyInput, w: Waiting) -> tuple[int, ...] | None:
    """Devices that have room for a sleeper beside all that are being used there, asleep or not; None: there are none.

    On any others it would only swap with those.
    """
    if w.move is None:
        return None
    there = w.move.there
    devices = fits(s, there)
    beside = devices and all(spare(s, index, w.model) >= there.need_on(index) for index in devices)
    return devices if beside else None


def moved(s: PolicyInput, w: Waiting, eviction: EvictionSet | None, devices: tuple[int, ...] | None) -> Plan | None:
    """The plan to stop a sleeper and start it on these ``devices``, if it serves sooner there; else None.

    ``eviction``: who would have to leave for it to wake where it sleeps; None: that cannot be just now.
    """
    if w.move is None or devices is None:
        return None
    waited = s.now - w.oldest
    members = eviction.members if eviction else ()
    busy = [r for _, r, _ in members if r.running or r.queued]
    # Expected seconds until it would serve where it sleeps. Where that cannot be said (a transfer is under way, another
    # swap claims the device) it is expected to take as long again as it took so far.
    if eviction is None:
        wakes_in = waited + w.load
    elif busy:
        wakes_in = max(waited, *[_until_idle(s, r) for r in busy]) + takes(eviction) + w.load
    else:
        # One that is being used must come back: that is part of what the swap costs.
        used = [(r, option) for _, r, option in members if not r.asleep and s.now - r.used < s.knobs.used]
        wakes_in = takes(eviction) + w.load + max([option.back + w.sleep for _, option in used], default=0.0)
    if w.move.there.load >= wakes_in:
        return None
    where = ", ".join(map(str, devices))
    why = f"it serves sooner on device {where}, which has room, than where it sleeps"
    return Plan(w.model, devices, (Victim(w.model, w.move.stop),), why=why, numbers=_waited(s, w))


def _until_idle(s: PolicyInput, r: Resident) -> float:
    """Expected seconds until a busy one has a moment without requests.

    What has run for long will run for long. And while requests come faster than
    they end, moments without any are rare (the busy period of a queue with room
    for everybody).
    """
    ended = max(s.now - r.began, drain_time(r.service, r.running))
    rate, service = rate_of(r, s.now), max(r.service, s.now - r.began)
    period = math.expm1(min(rate * service, 8.0)) / rate if rate > 0.0 else 0.0
    return max(ended, period)


def tidy(s: PolicyInput) -> Plan | None:
    """A move towards places in which all models that are being used fit together; None: there are none, or they do.

    It begins when one of them had to leave for another, and each model is moved
    once: then there are no more swaps among them.
    """
    used = [r for r in s.residents if r.allowed and s.now - r.used < s.knobs.used]
    if not any(r.displaced for r in used):
        return None
    sizes = room_for_these(s, {r.model for r in used})
    used.sort(key=lambda r: (r.asleep, r.model))  # one that serves rather stays than one that sleeps
    items = [Item(r.model, r.need, r.allowed, len(r.devices), r.devices) for r in used]
    places = assign(tuple(items), tuple(sorted(sizes.items())))
    if places is None:
        return None
    for r in sorted(used, key=lambda r: (not r.displaced, r.model)):
        place = places[r.model]
        again = r.moved + s.knobs.again * r.options[-1].back
        if place != r.devices and not r.running and not r.queued and s.now >= again and can_move(s, r, place):
            why = f"all that are being used fit if it is on {', '.join(map(str, place))}"
            return Plan(r.model, place, (Victim(r.model, r.options[-1]),), why=why, unasked=True)
    return None


class Lru:
    """The least recently used leave first, drained, for the waiter whose turn it is; nobody overtakes it."""

    name = "lru"
    moves = True

    def choose(self, s: PolicyInput) -> Plan | None:
        """The first in turn gets its place; who waits longest can so never be overtaken for ever."""
        for w in in_turn(s):
            numbers = _waited(s, w)
            devices = fits(s, w)
            if devices is not None:
                return Plan(w.model, devices, why="it fits", numbers=numbers)
            eviction = oldest_first(s, w, s.on(w.devices))
            move = moved(s, w, eviction, elsewhere(s, w))
            if move:
                return move
            if eviction and not too_early(s, eviction, longest_drain(eviction.members)):
                why = "the least recently used make room"
                return Plan(w.model, eviction.devices, eviction.victims, INFINITY, why, numbers)
            s = without(s, eviction.devices if eviction else due_there(s, w))
        return None

    def outlook(self, s: PolicyInput, model: str) -> Outlook | None:
        """The least recently used: they are drained as soon as the device is at rest."""
        w = _waiter(s, model)
        return w and outlook(s, w, oldest_first(s, w, s.on(w.devices)), 0.0, 0.0)


def outlook(s: PolicyInput, w: Waiting, eviction: EvictionSet | None, patience: float, spared: float) -> Outlook | None:
    """What ``w`` waits for: its victims to be idle, or a swap with them.

    ``patience``: seconds after which busy victims are drained; ``spared``: for how long idle ones are.
    """
    if eviction is None:
        return None
    busy = [r for _, r, _ in eviction.members if r.running or r.queued]
    names = ", ".join(candidate.resident.model for candidate in eviction.members) or "nobody"
    ends = [s.supplies[index].until for index in eviction.devices if index in s.supplies]
    moving = max(0.0, max(ends, default=0.0) - s.now)
    swap = takes(eviction) + w.load
    if busy:
        left = max(moving, patience)
        why = f"{names} to be idle{running_there(sum([r.running for r in busy]))}"
        why += f"; its requests are no longer let in from {left:.0f} s on" if left >= 0.5 else ""
        return Outlook(left + longest_drain(eviction.members) + swap, why)
    left = max(moving, spared)
    cause = "the device is at rest then" if moving >= spared else f"{names} may be asked for again sooner"
    why = f"a swap with {names} in {left:.1f} s" + (f": {cause}" if left > 0.0 else "")
    return Outlook(left + swap, why)


def _waiter(s: PolicyInput, model: str) -> Waiting | None:
    return next((w for w in s.waiting if w.model == model), None)


def in_turn(s: PolicyInput) -> Sequence[Waiting]:
    """The order in which waiters are looked at: by age, each second counting as many times as the priority says."""
    if all(w.priority == 1.0 for w in s.waiting):
        return s.waiting
    return sorted(s.waiting, key=lambda w: (-(s.now - w.oldest + HEADSTART) * w.priority, w.oldest, w.model))


class Offer(NamedTuple):
    """The best swap found for a waiter, and what it is worth."""

    eviction: EvictionSet
    budget: float  # seconds that running requests get before they are frozen
    price: float  # request-seconds: see Prices
    cost: float  # seconds until the waiter serves
    waited: float  # request-seconds that its queue has waited


class Adaptive:
    """Draining, with patience for the busy and none for the idle (the default).

    Those that wait are looked at in turn. First comes the one for which the
    product of what all its requests have waited and the age of the oldest, per
    second of its load and times its priority, is largest: a swap goes where it
    ends most waiting, and each one's turn comes, because age adds up twice.

    1. What fits is loaded at once.
    2. Else the set of victims with the lowest price is sought (``pricing.py``).
       A busy one counts ``patience`` times: a drain leaves a whole engine idle
       until the longest of its answers has ended, and a moment at which another
       model, or the same one, is idle is mostly near.
    3. If all of them are idle, they leave at once. Only one that is expected
       back sooner than the swap takes is spared, and only for as long as the
       swap takes: then rent was paid for the price of buying. What nobody has
       measured yet spares nobody. If one is busy, the idle ones and sleepers that
       nobody waits for leave instead, where the sleepers could start anew twice
       before the busy ones will be idle: their remainders, a little each, must not
       keep a whole engine out of its place while a batch waits for it.
    4. A busy one leaves when the queue has waited past the deadline, which is
       the longer the more there is to do for all who wait; or when else its
       configured drain limit could not be kept, which bounds the wait and not
       only the drain; or, where its requests may be frozen so that nothing
       stands idle, as soon as the queue has waited ``kappa`` of the price.
    5. Nobody overtakes one who has waited past the deadline but must wait yet,
       for a transfer to end or a victim to have served its time: else small
       models would take what a large one waits for. Where swaps are ``dear``
       (scarce host memory, cold starts) the same holds from the beginning, for
       there it is what makes the longest waits.
    6. A busy model that has just been loaded stays for ``residency`` times what
       the swap costs, deadline or not, so that every swap serves somebody; but
       no longer than its drain limit.
    """

    name = "adaptive"
    moves = True

    def choose(self, s: PolicyInput) -> Plan | None:
        """The first whose swap is due."""
        if not s.waiting:
            return None
        turns = _Turns(s)
        for w in turns.order():
            plan = None if turns.closed(w) else turns.next(w)
            if plan:
                return plan
        return None

    def outlook(self, s: PolicyInput, model: str) -> Outlook | None:
        """The cheapest victims, and how long patience with them lasts."""
        w, turns = _waiter(s, model), _Turns(s)
        if w is None:
            return None
        eviction = cheapest(s, w, s.on(w.devices), partial(turns.prices.alone, w, False))
        candidates, waited = eviction.members if eviction else (), s.now - w.oldest
        limits = [r.drain_limit - drain_time(r.service, r.running) for _, r, _ in candidates if r.running]
        patience = min(turns.deadline, max(limits, default=INFINITY)) - waited
        return outlook(s, w, eviction, max(0.0, patience), max(0.0, _known(w, candidates) - waited))


class _Turns:
    """One look of the adaptive policy: waiters come to :meth:`next` in turn; some hold devices against later ones."""

    def __init__(self, s: PolicyInput) -> None:
        swaps = sum([w.load + w.sleep for w in s.waiting])
        drains = sum([w.service for w in s.waiting])
        self.deadline = max(s.knobs.deadline, swaps + s.knobs.drains * drains)
        self.dear = swaps > s.knobs.dear
        self.prices = Prices(s)
        self.supplies = dict(s.supplies)
        self.s = s._replace(supplies=self.supplies)  # without those that are held against later ones
        self.roomiest = roomiest(s)
        # Where a swap may begin.
        self.begin = {supply.device for supply in self.supplies.values() if not supply.claimed}

    def order(self) -> Sequence[Waiting]:
        """First those that may not be kept waiting, then those past the deadline by age, then the others by worth."""
        ahead, since = self.s.now + HEADSTART, self.s.now - self.deadline

        def turn(w: Waiting) -> tuple[int, float, float, str]:
            if not w.impatient and w.oldest < since:
                return 1, 0.0, w.oldest, w.model
            # What a swap is worth: what all requests have waited, times the age of the oldest, per second of load.
            waited, age = w.waiters * ahead - w.arrived, ahead - w.oldest
            worth = waited * age * w.priority / max(w.load, LEAST_LOAD)
            return 0 if w.impatient else 2, -worth, w.oldest, w.model

        return sorted(self.s.waiting, key=turn) if len(self.s.waiting) > 1 else self.s.waiting

    def closed(self, w: Waiting) -> bool:
        """Whether a waiter has no plan for certain: it fits nowhere as it is, and no swap may begin on its devices."""
        return w.move is None and not may_fit(w, self.roomiest) and self.begin.isdisjoint(w.devices)

    def next(self, w: Waiting) -> Plan | None:
        """The plan of a waiter, if its swap is due."""
        s = self.s
        devices = fits(s, w) if may_fit(w, self.roomiest) else None
        if devices is not None:
            return Plan(w.model, devices, why="it fits", numbers=_waited(s, w))
        urgent = w.impatient or s.now - w.oldest > self.deadline
        there = w.move and w.move.there
        place = elsewhere(s, w) if there and (there.needs or may_fit(there, self.roomiest)) else None
        if not urgent and place is None and self.must_wait(w):
            if self.dear and self.begin.issuperset(w.devices):
                self._hold(w.devices)
            return None
        if not unclaimed(s, w):
            return moved(s, w, None, place)
        residents = _may_leave(s, w, self._on(w))
        eviction = cheapest(s, w, residents, partial(self.prices.alone, w, urgent))
        move = moved(s, w, eviction, place)
        if move:
            return move
        if eviction is None:
            rested = self._rested(w)
            if rested is None and (urgent or self.dear):
                self._hold(due_there(s, w))
            return rested
        offer = self._offer(w, eviction, urgent)
        why = self._due(w, offer, urgent)
        if why and not too_early(s, eviction, offer.cost - w.load - takes(eviction)):
            figures = {"waited": offer.waited, "price": offer.price, "cost": offer.cost, "deadline": self.deadline}
            numbers = {"waiting": w.waiters, **{name: round(figure, 3) for name, figure in figures.items()}}
            return Plan(w.model, eviction.devices, eviction.victims, offer.budget, why, numbers)
        rested = None if why else self._rested(w)
        if rested is None and (urgent or self.dear):
            self._hold(eviction.devices)
        return rested

    def _rested(self, w: Waiting) -> Plan | None:
        """3: the plan without the busy ones: the idle leave, and sleepers stop that nobody waits for."""
        s, asked = self.s, {each.model for each in self.s.waiting}
        there = s.on(w.devices)
        busy = [r for r in there if not r.asleep and (r.running or r.queued)]
        if not busy or not any(light(r) for r in there):
            return None
        rested = [r for r in there if not (r.running or r.queued or r.model in asked) and (light(r) or not r.asleep)]
        eviction = cheapest_of(s, w, rested, partial(self.prices.alone, w, False))
        if eviction is None or too_early(s, eviction, 0.0):
            return None
        anew = sum([option.takes + 2.0 * option.back for _, r, option in eviction.members if r.asleep])
        if anew >= min([s.knobs.deadline, *[_until_idle(s, r) for r in busy]]):
            return None
        cost = takes(eviction) + w.load
        if not self._due(w, Offer(eviction, INFINITY, 0.0, cost, 0.0), urgent=False):
            return None
        why = "those that sleep there start anew sooner than the busy ones will be idle"
        return Plan(w.model, eviction.devices, eviction.victims, why=why, numbers=_waited(s, w))

    def must_wait(self, w: Waiting) -> bool:
        """Whether its device is another waiter's, or cannot be had without draining a replica that need not drain yet.

        The case of most waiters on a crowded machine, told without a search: whatever set of victims the search would
        find, a busy one would be in it, or it would be too early for it. False: that needs a closer look, also because
        sleepers that start quickly may be stopped instead.
        """
        if len(w.devices) != 1:
            return False
        supply, there = self.supplies.get(w.devices[0]), self.s.tenants.get(w.devices[0], NOBODY)
        if supply is None or supply.claimed:
            return True
        if there.pressed or not if_all_slept(supply, w):
            return False
        if if_the_idle_slept(supply, there, w):
            return there.takes + AHEAD < supply.until - self.s.now
        return not there.light or not if_the_light_left(supply, there, w)

    def _on(self, w: Waiting) -> Iterable[Resident]:
        """Each of the residents of its devices once; not the sleepers where it is enough if all others sleep."""
        if len(w.devices) == 1 and if_all_slept(self.supplies[w.devices[0]], w):
            return self.s.tenants.get(w.devices[0], NOBODY).awake
        return self.s.on(w.devices)

    def _offer(self, w: Waiting, eviction: EvictionSet, urgent: bool) -> Offer:
        """The swap with the drain budget that suits these victims best."""
        waited = (w.waiters * self.s.now - w.arrived) * w.priority  # the rent paid
        offers = []
        for budget in budgets(self.s.knobs, eviction.members, urgent):
            price, cost = self.prices.together(w, eviction.members, budget)
            offers.append(Offer(eviction, budget, price, cost, waited))
        return min(offers, key=lambda offer: offer.price + w.waiters * w.priority * offer.cost)

    def _due(self, w: Waiting, offer: Offer, urgent: bool) -> str:
        """Why the swap begins now; empty: not yet."""
        candidates, waited = offer.eviction.members, self.s.now - w.oldest
        busy = [r for _, r, _ in candidates if r.running or r.queued]
        if urgent and busy:
            if w.urged:
                return "an operator asked for it"
            if w.impatient:
                return "it waits for nobody (on_busy: evict)"
            return "it has waited for as long as anybody does"
        if urgent:
            return "the others there are idle"
        if not busy:
            # 3: one that is expected back before the swap is over is spared, for as long as swaps are known to take.
            spared = any(rate_of(r, self.s.now) * offer.cost >= 1.0 for _, r, _ in candidates)
            return "" if spared and waited < _known(w, candidates) else "the others there are idle"
        if offer.budget < INFINITY and offer.waited >= self.s.knobs.kappa * offer.price:
            return "the wait is worth the swap"
        limit = max([r.drain_limit for r in busy])
        if waited + longest_drain(candidates) >= limit:
            return f"the drain limit of {limit:g} s is to be kept"
        return ""

    def _hold(self, devices: Iterable[int]) -> None:
        for device in devices:
            self.supplies.pop(device, None)
            self.begin.discard(device)


def _known(w: Waiting, candidates: Iterable[Candidate]) -> float:
    """Seconds that the swap takes, as far as that was measured."""
    return w.learnt + sum([option.learnt for _, _, option in candidates])


def _waited(s: PolicyInput, w: Waiting) -> NUMBERS:
    return {"waiting": w.waiters, "waited": round(s.now - w.oldest, 3)}


def _may_leave(s: PolicyInput, w: Waiting, residents: Iterable[Resident]) -> list[Resident]:
    """Residents that have served their time, or serve nobody.

    A load of ``w`` that nobody has measured yet counts as much as the wake of the one that leaves.
    """
    q, now, load = s.knobs.residency, s.now, w.learnt
    return [
        r
        for r in residents
        if r.asleep
        or w.urged
        or not (r.running or r.queued)
        or now - r.since
        >= min(r.drain_limit, q * (r.options[0].takes + (load or r.options[0].back) + r.options[0].back))
    ]


POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (Adaptive(), Lru())}
