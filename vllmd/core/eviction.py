"""What fits, and who would have to leave: sets of victims, by price or by age. Pure functions of a Situation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vllmd.core.policy import Resident, Room, Situation, Victim, Waiting, Way

Price = Callable[[Resident, Way], float]  # what it costs to have a resident leave that way, in any one unit


class Leaver(NamedTuple):
    """A resident that could leave, and how."""

    price: float
    resident: Resident
    way: Way

    @property
    def victim(self) -> Victim:
        """As a plan names it."""
        return Victim(self.resident.model, self.way)


class Choice(NamedTuple):
    """Devices, and who must leave for the newcomer to fit there."""

    devices: tuple[int, ...]
    leavers: tuple[Leaver, ...]

    @property
    def victims(self) -> tuple[Victim, ...]:
        """As a plan names them."""
        return tuple(leaver.victim for leaver in self.leavers)


def fits(s: Situation, w: Waiting) -> tuple[int, ...] | None:
    """The devices on which ``w`` can be started or woken at once; None: it does not fit.

    First the smallest that nobody uses, which leaves the large ones to large
    models; else that with most room. Of several, where there is a choice, those
    that are joined directly, else those of one NUMA node: layers that are split
    over them exchange data all the time.
    """
    if not w.span:
        return ()
    if len(w.devices) == 1:
        room = s.rooms.get(w.devices[0])
        return w.devices if room and room.free >= w.need and _usable_at_once(room, w) else None
    good = [room for room in _rooms(s, w) if room.free >= w.need_on(room.device) and _usable_at_once(room, w)]
    if len(good) < w.span:
        return None
    good.sort(key=_spread)
    return tuple(sorted(room.device for room in _near(good, w.span)))


def _near(good: Sequence[Room], span: int) -> Sequence[Room]:
    """The first ``span`` of them, or better ones: the nearest kind of which there are enough together."""
    if 1 < span < len(good):
        for near in (_linked, _same_node):
            for first in good:
                together = [first]
                for room in good:
                    if room is not first and all(near(room, other) for other in together):
                        together.append(room)
                if len(together) >= span:
                    return together[:span]
    return good[:span]


def _linked(one: Room, other: Room) -> bool:
    return other.device in one.links


def _same_node(one: Room, other: Room) -> bool:
    return one.node is not None and one.node == other.node


def _spread(room: Room) -> tuple[bool, int, int]:
    shared = room.free < room.sleepable
    return shared, -room.free if shared else room.free, room.device


def _usable_at_once(room: Room, w: Waiting) -> bool:
    return not room.busy and (not room.claimed or w.load <= room.drain)


def _rooms(s: Situation, w: Waiting) -> list[Room]:
    return [s.rooms[index] for index in w.devices if index in s.rooms]


def unclaimed(s: Situation, w: Waiting) -> list[Room]:
    """Where an exchange for ``w`` may begin: no other one is draining or queued there. Empty if they are too few."""
    rooms = [room for room in _rooms(s, w) if not room.claimed] if w.span else []
    return rooms if len(rooms) >= w.span else []


# -- the cheapest


def cheapest(s: Situation, w: Waiting, residents: Sequence[Resident], price: Price) -> Choice | None:
    """The devices and leavers with the lowest sum of prices after which ``w`` fits; None: not even all are enough."""
    rooms = unclaimed(s, w)
    if not rooms:
        return None
    here = [r for r in residents if r.model != w.model]
    for group in groups(w, rooms, here, price):
        choice = _jointly(w, rooms, group, s.knobs.victims)
        if choice:
            return choice
    return None


def groups(w: Waiting, rooms: Sequence[Room], residents: Sequence[Resident], price: Price) -> Iterator[list[Leaver]]:
    """Who may leave, from the gentlest on: the awake fall asleep, then sleepers stop as well, then all stop.

    Nobody has to stop who only would because the others are not ready to
    leave just now: sleepers hold little and are dear to have back.
    """
    here = {room.device for room in rooms}
    residents = [r for r in residents if not here.isdisjoint(r.devices)]
    yield [Leaver(price(r, r.ways[0]), r, r.ways[0]) for r in residents if not r.asleep]
    if sum(room.sleepable >= w.need_on(room.device) for room in rooms) >= w.span:
        return
    yield [Leaver(price(r, r.ways[0]), r, r.ways[0]) for r in residents]
    yield [Leaver(price(r, r.ways[-1]), r, r.ways[-1]) for r in residents]


def _jointly(w: Waiting, rooms: Sequence[Room], group: Sequence[Leaver], most: int) -> Choice | None:
    """One device after the other: always that which costs least on top of those who leave already."""
    leaving: dict[str, Leaver] = {}
    devices: list[int] = []
    for _ in range(w.span):
        options = [
            (sum(leaver.price for leaver in extra), -room.free, room.device, extra)
            for room in rooms
            if room.device not in devices and (extra := _extra(w, room, group, leaving, most)) is not None
        ]
        if not options:
            return None
        _, _, device, extra = min(options, key=lambda option: option[:3])
        devices.append(device)
        leaving.update((leaver.resident.model, leaver) for leaver in extra)
    return Choice(tuple(sorted(devices)), tuple(leaving.values()))


def _extra(
    w: Waiting, room: Room, group: Sequence[Leaver], leaving: Mapping[str, Leaver], most: int
) -> tuple[Leaver, ...] | None:
    """Who must leave the device besides those that leave anyway."""
    here = [leaver for leaver in group if room.device in leaver.resident.devices]
    coming = sum(leaver.way.frees for leaver in here if leaver.resident.model in leaving)
    short = w.need_on(room.device) - room.free - coming
    return cover([leaver for leaver in here if leaver.resident.model not in leaving], short, most)


def cover(group: Sequence[Leaver], short: int, most: int) -> tuple[Leaver, ...] | None:
    """The cheapest of the group that free ``short`` bytes: the best set of up to ``most``, else a good larger one."""
    if short <= 0:
        return ()
    useful = sorted((leaver for leaver in group if leaver.way.frees > 0), key=lambda leaver: leaver.price)
    if sum(leaver.way.frees for leaver in useful) < short:
        return None
    best = _search(useful, short, most)
    return best or _greedy(useful, short)


def _search(ordered: Sequence[Leaver], short: int, most: int) -> tuple[Leaver, ...]:
    """Depth first in order of price: a branch ends when it costs as much as the best set found so far."""
    best: tuple[Leaver, ...] = ()
    lowest = math.inf

    def visit(first: int, short: int, cost: float, chosen: tuple[Leaver, ...]) -> None:
        nonlocal best, lowest
        for index in range(first, len(ordered)):
            leaver = ordered[index]
            if cost + leaver.price >= lowest:
                return
            if leaver.way.frees >= short:
                best, lowest = (*chosen, leaver), cost + leaver.price
                return
            if len(chosen) + 1 < most:
                visit(index + 1, short - leaver.way.frees, cost + leaver.price, (*chosen, leaver))

    visit(0, short, 0.0, ())
    return best


def _greedy(group: Sequence[Leaver], short: int) -> tuple[Leaver, ...]:
    """The cheapest per byte until it is enough, then without those that were not needed after all."""
    chosen: list[Leaver] = []
    for leaver in sorted(group, key=lambda leaver: leaver.price / leaver.way.frees):
        if short <= 0:
            break
        chosen.append(leaver)
        short -= leaver.way.frees
    for leaver in sorted(chosen, key=lambda leaver: -leaver.price):
        if short + leaver.way.frees <= 0:
            chosen.remove(leaver)
            short += leaver.way.frees
    return tuple(chosen)


# -- the oldest


def oldest_first(s: Situation, w: Waiting, residents: Sequence[Resident]) -> Choice | None:
    """The fewest of the least recently used after whose leaving ``w`` fits; None: not even all are enough."""
    rooms = unclaimed(s, w)
    here = [r for r in residents if r.model != w.model]
    for group in groups(w, rooms, here, _age) if rooms else ():
        choice = _in_order(w, rooms, sorted(group, key=_recency))
        if choice:
            return choice
    return None


def _age(r: Resident, way: Way) -> float:
    return r.used


def _recency(leaver: Leaver) -> tuple[bool, bool, float, str]:
    """Asleep longest ago last; one with a request in it is in use this very moment."""
    r = leaver.resident
    return r.asleep, bool(r.running), r.used, r.model


def _in_order(w: Waiting, rooms: Sequence[Room], ordered: Sequence[Leaver]) -> Choice | None:
    free = {room.device: room.free for room in rooms}
    leaving: list[Leaver] = []
    for leaver in ordered:
        good = _enough(w, free)
        if good:
            break
        leaving.append(leaver)
        for device in leaver.resident.devices:
            if device in free:
                free[device] += leaver.way.frees
    good = _enough(w, free)
    if not good:
        return None
    return Choice(good, tuple(leaver for leaver in leaving if not set(good).isdisjoint(leaver.resident.devices)))


def _enough(w: Waiting, free: Mapping[int, int]) -> tuple[int, ...]:
    enough = [device for device in free if free[device] >= w.need_on(device)]
    good = sorted(enough, key=lambda device: (-free[device], device))
    return tuple(sorted(good[: w.span])) if len(good) >= w.span else ()
