"""The requests that wait for one model: round robin over API keys, oldest first within a key.

A key may have a rank: those of the highest priority come first, always; among keys of one priority each has as many
turns in a row as its share says.
"""

from __future__ import annotations

from typing import Any

Rank = tuple[int, int]  # priority and share
USUAL: Rank = (0, 1)
_NOTHING: dict[str, Any] = {}  # what a queue that was never used has; it stays empty


class Queue(dict[str, tuple[str, float]]):
    """Waiting requests, in order of arrival, each with its key and when it came.

    Taking, removing and asking for the oldest cost the same however many there are. Only the methods here change it.
    """

    __slots__ = ("_keys", "_ranks", "_turns", "arrived")

    def __init__(self) -> None:
        self._begin(_NOTHING, _NOTHING, _NOTHING)  # of ten thousand models hardly any has a queue
        self.arrived = 0.0  # sum of the times of arrival

    def _begin(self, keys: dict[str, dict[str, None]], ranks: dict[str, Rank], turns: dict[str, int]) -> None:
        self._keys = keys  # key -> its requests in order; the key to serve next is first
        self._ranks = ranks  # of the keys that wait, where they are not as usual
        self._turns = turns  # that a key has had of its share, this time round

    @property
    def oldest(self) -> float | None:
        """When the oldest waiting request came."""
        for _, arrived in self.values():
            return arrived
        return None

    def add(self, request: str, key: str, now: float, rank: Rank = USUAL) -> None:
        """``request`` of API key ``key`` waits from ``now`` on. ``rank``: the key's, as it is now."""
        if self._keys is _NOTHING:
            self._begin({}, {}, {})
        self[request] = (key, now)
        if rank != USUAL or self._ranks:
            self._ranks[key] = rank
        self._keys.setdefault(key, {})[request] = None
        self.arrived += now

    def remove(self, request: str) -> None:
        """``request`` waits no longer. Raises KeyError if it did not wait."""
        key, arrived = self.pop(request)
        mine = self._keys[key]
        del mine[request]
        if not mine:
            del self._keys[key]
            self._ranks.pop(key, None)
            self._turns.pop(key, None)
        self.arrived = self.arrived - arrived if self else 0.0

    def take(self) -> tuple[str, str]:
        """The next request and its key: the keys take turns, so that one caller's flood delays only itself."""
        key, share = next(iter(self._keys)), 1
        if self._ranks:
            ranks = self._ranks
            highest = max([ranks.get(each, USUAL)[0] for each in self._keys])
            key = next(each for each in self._keys if ranks.get(each, USUAL)[0] == highest)
            share = ranks.get(key, USUAL)[1]
        mine = self._keys[key]
        request = next(iter(mine))
        turns = self._turns.get(key, 0) + 1 if share > 1 else 1
        if turns >= share:
            self._turns.pop(key, None)
            self._keys[key] = self._keys.pop(key)  # behind the others
        else:
            self._turns[key] = turns
        self.remove(request)
        return request, key

    def late(self, timeout: float, now: float) -> list[str]:
        """Requests whose ``timeout`` has passed, oldest first."""
        late = []
        for request, (_, arrived) in self.items():
            if arrived + timeout > now:
                break
            late.append(request)
        return late
