"""Which models fit together, and where: one place for each of them, with few moves. Pure functions.

Swaps without end beside memory that would do for all come of models that are
in the wrong places, and each swap alone looks right. So the places of all
models that are being used are sought together: a depth-first search, the
largest first, each first where it is already, then where it leaves the least
over. That is exact as long as it ends within its budget, which it does on small
machines; on large ones it is a heuristic: ``tests/core/test_assignment.py``
shows how often it finds what is known to exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

STEPS = 1500  # places tried in one search; some five milliseconds

Places = Mapping[str, tuple[int, ...]]


class Item(NamedTuple):
    """A model that is to have a place."""

    name: str
    need: int  # bytes on each of its devices
    devices: tuple[int, ...]  # where it may be
    span: int  # how many of them it takes
    at: tuple[int, ...]  # where it is; empty: nowhere


@lru_cache(maxsize=64)
def assign(items: tuple[Item, ...], sizes: tuple[tuple[int, int], ...]) -> Places | None:
    """Devices for each of the items, none of them over its size (bytes by device); None: not found, or there is none.

    Assignments with few moves are looked for first: nobody moves, one does, two do. Of those as large, the ones
    that come first keep their places first.
    """
    if sum(item.need * item.span for item in items) > sum(size for _, size in sizes):
        return None
    ordered = sorted(items, key=lambda item: -item.need * item.span)
    for most in (0, 1, 2, len(items)):
        found = _Search(ordered, dict(sizes), most).run()
        if found is not None or most >= len(items):
            return found
    return None


class _Search:
    def __init__(self, items: list[Item], free: dict[int, int], most: int) -> None:
        self._items, self._free, self._most = items, free, most
        self._steps = STEPS
        self._places: dict[str, tuple[int, ...]] = {}
        self._free_choice = len({item.devices for item in items}) == 1

    def run(self) -> Places | None:
        return dict(self._places) if self._place(0, 0) else None

    def _place(self, index: int, moves: int) -> bool:
        if index == len(self._items):
            return True
        item = self._items[index]
        for place in self._options(item):
            moved = moves + (bool(item.at) and place != item.at)
            if moved > self._most:
                continue
            self._steps -= 1
            if self._steps < 0:
                return False
            for device in place:
                self._free[device] -= item.need
            self._places[item.name] = place
            if self._place(index + 1, moved):
                return True
            for device in place:
                self._free[device] += item.need
        return False

    def _options(self, item: Item) -> Iterator[tuple[int, ...]]:
        """Where it is, then the fullest that have room; of those with as much left one is as good as the other."""
        free = self._free
        if item.at and all(free.get(device, -1) >= item.need for device in item.at):
            yield item.at
        good = sorted((free[d], d) for d in item.devices if free.get(d, -1) >= item.need)
        seen = set()
        for group in combinations(good, item.span):
            place = tuple(sorted(device for _, device in group))
            alike = tuple(left for left, _ in group) if self._free_choice else place
            if alike not in seen and place != item.at:
                seen.add(alike)
                yield place
