"""The policies that ship: ``adaptive``, the default, and plain ``lru``. Pure functions of a Situation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from vllmd.core.eviction import Choice, cheapest, cheapest_there, enough_there, fits, oldest_first, unclaimed
from vllmd.core.policy import (
    INFINITY,
    HostClaim,
    Plan,
    Policy,
    Resident,
    Room,
    Situation,
    Waiting,
    drain_time,
    greedy_fill,
)
from vllmd.core.pricing import Prices, budgets, longest_drain

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
    return [room.device for room in unclaimed(s, w) if room.sleepable >= w.need_on(room.device)]


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
    6. A busy model that has just been loaded stays for ``residency`` times what
       the exchange costs, deadline or not, so that every exchange serves somebody.
    """

    name = "adaptive"
    in_order = False

    def choose(self, s: Situation) -> Plan | None:
        """The first whose exchange is due."""
        if not s.waiting:
            return None
        turns = _Turns(s)
        for w in [w for w in s.waiting if w.impatient] + [w for w in s.waiting if not w.impatient]:
            plan = None if turns.closed(w) else turns.next(w)
            if plan:
                return plan
        return None

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """The greedy fill."""
        return greedy_fill(claims, budget)


class _Turns:
    """One look of the adaptive policy: waiters come to :meth:`next` in order, and may hold devices against later ones.

    Most waiters on a crowded machine are passed over, so what decides that is worked out once for all, and asked
    before victims are priced. These shortcuts only ever skip a search whose end is known: no decision is another.
    """

    def __init__(self, s: Situation) -> None:
        self.deadline = max(s.knobs.deadline, s.knobs.rounds * sum([w.load + w.sleep for w in s.waiting]))
        self.dear = self.deadline > s.knobs.deadline
        self.prices = Prices(s)
        self.awake = _by_device([r for r in s.residents if not r.asleep])
        self.rooms = {i: room for i, room in s.rooms.items() if room.busy <= 1.0 or not self._outlasts(room)}
        self.s = s._replace(rooms=self.rooms)  # without those that are held against whoever comes later
        self.roomiest = max([room.free for room in self.rooms.values() if not room.busy], default=0)
        self.begin = {room.device for room in self.rooms.values() if not room.claimed}  # where an exchange may begin
        self._floors: dict[int, float] = {}

    def _outlasts(self, room: Room) -> bool:
        """The transfer under way there makes any exchange too early."""
        return room.busy > _longest(self.awake.get(room.device, ()))

    def closed(self, w: Waiting) -> bool:
        """No room is large enough as it is, and none of its devices free to begin an exchange on."""
        return w.need > self.roomiest and w.span > 0 and self.begin.isdisjoint(w.devices)

    def next(self, w: Waiting) -> Plan | None:
        """Its plan, if its exchange is due."""
        devices = fits(self.s, w) if w.need <= self.roomiest or not w.span else None
        if devices is not None:
            return Plan(w.model, devices, why="it fits", numbers=_waited(self.s, w))
        if self.begin.isdisjoint(w.devices):
            return None
        urgent = w.impatient or self.s.now - w.oldest > self.deadline
        if len(w.devices) == w.span == 1:
            return self._there(w, self.rooms[w.devices[0]], urgent)
        if not unclaimed(self.s, w):
            return None
        return self._anywhere(w, urgent)

    def _anywhere(self, w: Waiting, urgent: bool) -> Plan | None:
        """One that may choose its devices."""
        residents = _may_leave(self.s, w, self.s.residents)
        choice = cheapest(self.s, w, residents, partial(self.prices.alone, w, urgent))
        return self._bargain(w, choice, urgent)

    def _there(self, w: Waiting, room: Room, urgent: bool) -> Plan | None:
        """One that can only be on this device: a sleeper, mostly."""
        if room.sleepable < w.need:  # sleepers may have to stop for it as well
            return self._anywhere(w, urgent)
        awake = self.awake.get(room.device, ())
        paid = INFINITY if urgent else waited_by(w, self.s.now) / self.s.knobs.kappa
        if paid < self._floor(room.device, awake):
            return None  # all are busy, and it could not pay for draining any: its turn has not come
        residents = _may_leave(self.s, w, awake)
        if not enough_there(w, room, residents):
            return self._bargain(w, None, urgent)
        if room.free < w.need and paid < min([self.prices.least(r) for r in residents]):
            return None
        choice = cheapest_there(w, room, residents, partial(self.prices.alone, w, urgent), self.s.knobs.victims)
        return self._bargain(w, choice, urgent)

    def _floor(self, device: int, awake: Iterable[Resident]) -> float:
        floor = self._floors.get(device)
        if floor is None:
            floor = self._floors[device] = self.prices.floor(awake)
        return floor

    def _bargain(self, w: Waiting, choice: Choice | None, urgent: bool) -> Plan | None:
        if choice is None:
            held = due_there(self.s, w) if urgent or self.dear else []
        else:
            offer = _offer(self.s, self.prices, w, choice, urgent)
            if not urgent and offer.waited < self.s.knobs.kappa * offer.price:
                return None
            if not too_early(self.s, choice, offer.cost - w.load - takes(choice)):
                why = "its deadline has passed" if urgent else "the wait is worth the exchange"
                numbers = _numbers(w, offer, self.deadline)
                return Plan(w.model, choice.devices, choice.victims, offer.budget, why, numbers)
            held = list(choice.devices)
        if urgent or self.dear:
            self._hold(held)
        return None

    def _hold(self, devices: Iterable[int]) -> None:
        for device in devices:
            del self.rooms[device]
            self.begin.discard(device)


def _by_device(residents: Iterable[Resident]) -> dict[int, list[Resident]]:
    here: dict[int, list[Resident]] = {}
    for r in residents:
        for device in r.devices:
            here.setdefault(device, []).append(r)
    return here


def _longest(residents: Sequence[Resident]) -> float:
    """Seconds before the end of a transfer from which on an exchange there can be due at all: see too_early."""
    drain = max([drain_time(r.service, r.running) for r in residents], default=0.0)
    return 1.0 + drain + sum([r.ways[0].takes for r in residents])


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


def _offer(s: Situation, prices: Prices, w: Waiting, choice: Choice, urgent: bool) -> Offer:
    """With the drain budget that suits these victims best."""
    waited = waited_by(w, s.now)
    offers = []
    for budget in budgets(s.knobs, choice.leavers, urgent):
        price, cost = prices.together(w, choice.leavers, budget)
        offers.append(Offer(choice, budget, price, cost, waited))
    return min(offers, key=lambda offer: offer.price + w.waiters * w.priority * offer.cost)


def waited_by(w: Waiting, now: float) -> float:
    """The request-seconds that its queue has waited: the rent paid."""
    return (w.waiters * now - w.arrived) * w.priority


def _may_leave(s: Situation, w: Waiting, residents: Iterable[Resident]) -> list[Resident]:
    """Those that have served their time, or serve nobody."""
    q, now, load = s.knobs.residency, s.now, w.load
    return [
        r
        for r in residents
        if r.asleep or not (r.running or r.queued) or now - r.since >= q * (r.ways[0].takes + load + r.ways[0].back)
    ]


POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (Adaptive(), Lru())}
