"""The interface of all policies, and the two that ship: ``adaptive`` and ``lru``.

A policy is a pure function of a :class:`Situation`. It never sees the
scheduler's state, only this frozen view of it, and answers with at most one
:class:`Plan`; the scheduler asks again, with the view changed by the plan,
until the answer is None. All times are seconds on the core's clock, all
sizes bytes per device. The views are named tuples, not dataclasses, because
they are made anew for every change of a model and a policy must cost
microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol

INFINITY = math.inf


class Way(NamedTuple):
    """One way to take a model off its devices, and what it costs to have it back."""

    level: int  # 1 or 2: sleep at that level; 0: stop
    frees: int  # bytes that come free on each of its devices
    takes: float  # seconds until they are free
    back: float  # seconds to have it serve again afterwards


class Resident(NamedTuple):
    """A model that holds device memory and may be made to give it up (so: not pinned, not leased, not moving)."""

    model: str
    devices: tuple[int, ...]
    asleep: bool  # it sleeps, and holds only a sleeper's remainder; its one way is to stop
    ways: tuple[Way, ...]  # the preferred one first, stopping last
    since: float  # when it became ready
    used: float  # when a request last came or ended
    running: int  # requests in its engine
    queued: int  # requests that wait for a place in it
    service: float  # learnt seconds per request
    rate: float  # arrivals per second, as of rate_at; falls by e in 60 s without one
    rate_at: float
    freezable: bool  # its running requests may be frozen
    refrozen: bool  # one of them was frozen twice already
    priority: float


class Waiting(NamedTuple):
    """A model that is wanted and not on. A load that an operator asked for counts as one request."""

    model: str
    waiters: int  # requests that wait for it, those frozen in its sleeping engine included
    arrived: float  # sum of their times of queueing: the sum of their ages is waiters * now - arrived
    oldest: float  # when the oldest of them came
    load: float  # seconds to have it serve: a wake or a cold start
    sleep: float  # seconds to put it to sleep again
    service: float  # learnt seconds per request
    need: int  # bytes it needs on each device beyond what it holds there
    devices: tuple[int, ...]  # where it may go; for a sleeper, where it is
    span: int  # how many of them it takes; 0: none at all
    priority: float
    impatient: bool  # on_busy: evict


class Room(NamedTuple):
    """A device that can be used. Wedged ones are not shown."""

    device: int  # its index
    free: int  # bytes free for a newcomer, reserve, strangers and claims subtracted; may be negative
    busy: float  # expected seconds until the start, wake, sleep or stop under way on it ends; 0 if none is
    claimed: bool  # an exchange is draining or queued there
    drain: float  # where claimed: expected seconds until that exchange can use the device


class Situation(NamedTuple):
    """All that a policy may know."""

    now: float
    waiting: Sequence[Waiting]  # oldest first
    residents: Sequence[Resident]
    rooms: Mapping[int, Room]  # by index
    knobs: Knobs


class Knobs(NamedTuple):
    """The numbers of the policy; `scheduling.md` of the design tells how they were found."""

    deadline: float = 30.0  # D0: a waiter older than this, or than the time all need, goes first
    kappa: float = 0.25  # the share of a plan's regret that must have been waited
    residency: float = 3.0  # q: a loaded model stays for so many times what the exchange costs
    budgets: tuple[float, ...] = (0.0, 2.0, 5.0)  # drain budgets tried where requests can be frozen
    victims: int = 4  # at most so many models leave for one


class Victim(NamedTuple):
    """A model that leaves, and how."""

    model: str
    way: Way


class Plan(NamedTuple):
    """Bring ``target`` onto ``devices`` after ``victims`` have left.

    ``drain``: seconds that the victims' running requests get before they are
    frozen; infinite: they finish. ``numbers`` and ``why`` are for the record.
    """

    target: str
    devices: tuple[int, ...]
    victims: tuple[Victim, ...] = ()
    drain: float = INFINITY
    why: str = ""
    numbers: Mapping[str, float | int | str] = {}


class HostClaim(NamedTuple):
    """A model that could sleep at level 1, for the choice of who may."""

    model: str
    host: int  # bytes of host memory that it takes
    gain: float  # seconds that a wake from 1 is shorter than one from 2 (or than a start where 2 is not supported)
    rate: float  # arrivals per second over a long time (900 s)


class Policy(Protocol):
    """What the scheduler asks of a policy."""

    name: str
    in_order: bool  # requests are admitted strictly in order of arrival over all models (a baseline's vice)

    def choose(self, s: Situation) -> Plan | None:
        """The next exchange to begin (one without victims is a plain start or wake), or None: not yet."""

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """The models that sleep at level 1 when they must sleep; the others sleep at 2 or stop."""


def greedy_fill(claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
    """Host memory goes to those who save the most waiting per byte: arrival rate times the gain of a shallow sleep."""
    chosen = set()
    for claim in sorted(claims, key=lambda c: (-c.rate * c.gain / max(c.host, 1), c.model)):
        if claim.host <= budget:
            chosen.add(claim.model)
            budget -= claim.host
    return frozenset(chosen)


# -- what fits, and who would have to leave

Choice = tuple[tuple[int, ...], tuple[Victim, ...]]  # devices, and who must leave for the newcomer to fit there


def fits(s: Situation, w: Waiting) -> tuple[int, ...] | None:
    """The devices on which ``w`` can be started or woken at once, the emptiest first; None: it does not fit."""
    if not w.span:
        return ()
    good = [room for room in _rooms(s, w) if room.free >= w.need and _usable_at_once(room, w)]
    if len(good) < w.span:
        return None
    good.sort(key=lambda room: (-room.free, room.device))
    return tuple(sorted(room.device for room in good[: w.span]))


def _usable_at_once(room: Room, w: Waiting) -> bool:
    return not room.busy and (not room.claimed or w.load <= room.drain)


def _rooms(s: Situation, w: Waiting) -> list[Room]:
    return [s.rooms[index] for index in w.devices if index in s.rooms]


def choices(s: Situation, w: Waiting, residents: Sequence[Resident], most: int) -> Iterator[Choice]:
    """Ways to make ``w`` fit by having up to ``most`` of ``residents`` leave, on devices that no exchange claims.

    Each resident leaves in its preferred way if that is enough, else sleepers
    are stopped, else whoever leaves is stopped. Sets that hold a smaller
    sufficient one are not tried.
    """
    rooms = [room for room in _rooms(s, w) if not room.claimed]
    if not w.span or len(rooms) < w.span:
        return
    awake = [Victim(r.model, r.ways[0]) for r in residents if not r.asleep]
    stops = [Victim(r.model, r.ways[-1]) for r in residents]
    where = {r.model: r.devices for r in residents}
    for candidates in (awake, awake + [v for v, r in zip(stops, residents, strict=True) if r.asleep], stops):
        found = False
        for choice in _choices(w, rooms, candidates, where, most):
            found = True
            yield choice
        if found:
            return


def _choices(
    w: Waiting, rooms: Sequence[Room], candidates: Sequence[Victim], where: Mapping[str, tuple[int, ...]], most: int
) -> Iterator[Choice]:
    if w.span == 1:
        for room in rooms:
            here = [v for v in candidates if room.device in where[v.model]]
            for victims in smallest_sets(here, w.need - room.free, most):
                yield (room.device,), victims
        return
    joint = _jointly(w, rooms, candidates, where, most)
    if joint is not None:
        yield joint


def smallest_sets(victims: Sequence[Victim], short: int, most: int) -> Iterator[tuple[Victim, ...]]:
    """Sets of up to ``most`` that free at least ``short``, without those that contain another such set."""
    if short <= 0:
        yield ()
        return
    enough: list[frozenset[str]] = []
    for size in range(1, min(most, len(victims)) + 1):
        for group in combinations(victims, size):
            if sum(v.way.frees for v in group) < short:
                continue
            names = frozenset(v.model for v in group)
            if not any(known <= names for known in enough):
                enough.append(names)
                yield group


def _jointly(
    w: Waiting, rooms: Sequence[Room], candidates: Sequence[Victim], where: Mapping[str, tuple[int, ...]], most: int
) -> Choice | None:
    """Devices for a model that spans several, one after the other: the one that costs least on top of those chosen."""
    chosen: dict[str, Victim] = {}
    devices: list[int] = []
    for _ in range(w.span):
        options = []
        for room in rooms:
            if room.device in devices:
                continue
            extra = _cheapest_extra(w, room, candidates, where, chosen)
            if extra is not None and len(chosen) + len(extra) <= most * w.span:
                price = sum(v.way.takes + v.way.back for v in extra)
                options.append((price, -room.free, room.device, extra))
        if not options:
            return None
        _, _, index, extra = min(options, key=lambda option: option[:3])
        devices.append(index)
        chosen.update((v.model, v) for v in extra)
    return tuple(sorted(devices)), tuple(chosen.values())


def _cheapest_extra(
    w: Waiting,
    room: Room,
    candidates: Sequence[Victim],
    where: Mapping[str, tuple[int, ...]],
    chosen: Mapping[str, Victim],
) -> tuple[Victim, ...] | None:
    here = [v for v in candidates if room.device in where[v.model]]
    short = w.need - room.free - sum(v.way.frees for v in here if v.model in chosen)
    sets = smallest_sets([v for v in here if v.model not in chosen], short, 4)
    return min(sets, key=lambda group: sum(v.way.takes + v.way.back for v in group), default=None)


def plain(s: Situation) -> Plan | None:
    """The oldest waiter that fits without anybody leaving."""
    for w in s.waiting:
        devices = fits(s, w)
        if devices is not None:
            waited = s.now - w.oldest
            return Plan(w.model, devices, why="it fits", numbers={"waiting": w.waiters, "waited": round(waited, 3)})
    return None


def drain_time(service: float, running: int) -> float:
    """Expected seconds until ``running`` requests have ended: the longest of so many exponential ones, nearly."""
    return service * (1 + math.log(running) / 2) if running else 0.0


# -- the policies that ship


class Lru:
    """The least recently used leave first, drained, for the waiter that came first."""

    name = "lru"
    in_order = False

    def choose(self, s: Situation) -> Plan | None:
        """The oldest waiter gets its place; who waits longest can so never be overtaken for ever."""
        return plain(s) or next((plan for w in s.waiting if (plan := self._plan(s, w))), None)

    def _plan(self, s: Situation, w: Waiting) -> Plan | None:
        choice = oldest_first(s, w, s.residents)
        if choice is None or _too_early(s, *choice):
            return None
        numbers: dict[str, float | int | str] = {"waiting": w.waiters, "waited": round(s.now - w.oldest, 3)}
        return Plan(w.model, *choice, why="the least recently used make room", numbers=numbers)

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """As the adaptive one does: where sleepers are kept is not this policy's difference."""
        return greedy_fill(claims, budget)


def oldest_first(s: Situation, w: Waiting, residents: Iterable[Resident]) -> Choice | None:
    """The fewest of the least recently used after whose leaving ``w`` fits; None: not even all are enough."""
    rooms = [room for room in _rooms(s, w) if not room.claimed]
    free = {room.device: room.free for room in rooms}
    leaving: list[tuple[Resident, Victim]] = []
    for r in sorted(residents, key=lambda r: (r.used, r.model)):
        if r.model == w.model or not any(index in free for index in r.devices):
            continue
        victim = Victim(r.model, r.ways[0])
        leaving.append((r, victim))
        for index in r.devices:
            if index in free:
                free[index] += victim.way.frees
        good = sorted((i for i in free if free[i] >= w.need), key=lambda i: (-free[i], i))[: w.span]
        if len(good) == w.span:
            return tuple(sorted(good)), tuple(v for r, v in leaving if not set(good).isdisjoint(r.devices))
    return None


def _too_early(s: Situation, devices: Sequence[int], victims: Sequence[Victim]) -> bool:
    """A transfer still under way there outlasts the victims' drain and sleep: closing gates now would idle them."""
    busy = max((s.rooms[index].busy for index in devices), default=0.0)
    if not busy:
        return False
    leaving = {v.model for v in victims}
    drain = max((drain_time(r.service, r.running) for r in s.residents if r.model in leaving), default=0.0)
    return drain + sum(v.way.takes for v in victims) + 1.0 < busy


class Adaptive:
    """LRU that drains, with minimum residency, rent-or-buy and a deadline (the default)."""

    name = "adaptive"
    in_order = False

    def choose(self, s: Situation) -> Plan | None:
        """The candidate with the largest key; those past the deadline come before all others."""
        if not s.waiting:
            return None
        start = plain(s)
        if start:
            return start
        deadline = max(s.knobs.deadline, sum(w.load + w.sleep for w in s.waiting))
        total = sum(w.waiters for w in s.waiting)
        best: tuple[float, Plan] | None = None
        for w in s.waiting:
            candidate = self._candidate(s, w, deadline, total)
            if candidate and (best is None or candidate[0] > best[0]):
                best = candidate
        return best[1] if best else None

    def shallow(self, claims: Iterable[HostClaim], budget: int) -> frozenset[str]:
        """The greedy fill."""
        return greedy_fill(claims, budget)

    def _candidate(self, s: Situation, w: Waiting, deadline: float, total: int) -> tuple[float, Plan] | None:
        urgent = w.impatient or s.now - w.oldest > deadline
        multiple = 1.0 if urgent else s.knobs.residency
        may_leave = [r for r in s.residents if w.model != r.model and _served_its_time(s.now, r, w, multiple)]
        by_name = {r.model: r for r in may_leave}
        best: tuple[float, float, float, Choice, float] | None = None
        for choice in choices(s, w, may_leave, s.knobs.victims):
            leaving = [(by_name[v.model], v.way) for v in choice[1]]
            for budget in budgets(s.knobs, [r for r, _ in leaving], urgent):
                regret, cost = price(s.now, w, leaving, budget, total)
                value = regret + w.waiters * w.priority * cost
                if best is None or value < best[0]:
                    best = (value, regret, cost, choice, budget)
        return self._rent_or_buy(s, w, deadline, urgent, best) if best else None

    def _rent_or_buy(
        self,
        s: Situation,
        w: Waiting,
        deadline: float,
        urgent: bool,
        best: tuple[float, float, float, Choice, float],
    ) -> tuple[float, Plan] | None:
        _, regret, cost, (devices, victims), budget = best
        busy = max((s.rooms[index].busy for index in devices), default=0.0)
        if busy and cost - w.load + 1.0 < busy:
            return None
        waited = (w.waiters * s.now - w.arrived) * w.priority
        if urgent:
            key, why = 1e12 + s.now - w.oldest, "its deadline has passed"
        elif waited >= s.knobs.kappa * regret:
            key, why = (waited + w.waiters * w.priority * cost) / (regret + cost), "the wait is worth the exchange"
        else:
            return None
        numbers: dict[str, float | int | str] = {
            "waiting": w.waiters,
            "waited": round(waited, 3),
            "regret": round(regret, 3),
            "cost": round(cost, 3),
            "deadline": round(deadline, 3),
        }
        return key, Plan(w.model, devices, victims, budget, why, numbers)


def _served_its_time(now: float, r: Resident, w: Waiting, multiple: float) -> bool:
    if r.asleep or not (r.running or r.queued):
        return True
    way = r.ways[0]
    return now - r.since >= multiple * (way.takes + w.load + way.back)


def budgets(knobs: Knobs, leaving: Sequence[Resident], urgent: bool) -> tuple[float, ...]:
    """How long the victims' requests may be waited for before they are frozen; those who cannot be are waited for."""
    busy = [r for r in leaving if r.running]
    if not busy or not all(r.freezable for r in busy):
        return (INFINITY,)
    if urgent:
        return knobs.budgets
    if any(r.refrozen for r in busy):
        return (INFINITY,)
    return (*knobs.budgets, INFINITY)


def price(
    now: float, w: Waiting, leaving: Sequence[tuple[Resident, Way]], budget: float, total: int
) -> tuple[float, float]:
    """Regret (request-seconds that the victims' clients lose) and cost (seconds until ``w`` serves)."""
    drain = max((min(budget, drain_time(r.service, r.running)) for r, _ in leaving), default=0.0)
    cost = drain + sum(way.takes for _, way in leaving) + w.load
    regret = sum(r.priority * _regret(now, w, r, way, drain, cost, budget, total) for r, way in leaving)
    return regret, cost


def _regret(
    now: float, w: Waiting, r: Resident, way: Way, drain: float, cost: float, budget: float, total: int
) -> float:
    away = cost - drain + w.service + w.sleep + way.back
    rate = r.rate * math.exp(min(0.0, (r.rate_at - now) / 60.0))
    left = r.running * math.exp(-drain / r.service) if budget < INFINITY and r.running else 0.0
    back = 1.0 if r.running or r.queued else 1.0 - math.exp(-rate * away)
    return (
        rate * (away + drain) ** 2 / 2
        + r.queued * away
        + left * (away + 0.5)
        + 0.3 * (r.running - left) * drain
        + back * total * (way.takes + way.back)
    )


POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (Adaptive(), Lru())}
