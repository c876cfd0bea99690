"""The requests that wait for one model: round robin over API keys, oldest first within a key."""

from __future__ import annotations

from collections.abc import Iterator


class Queue:
    """Waiting requests. Taking, removing and asking for the oldest cost the same however many there are."""

    __slots__ = ("_all", "_keys", "arrived")

    def __init__(self) -> None:
        self._all: dict[str, tuple[str, float]] = {}  # request -> key, time; in order of arrival
        self._keys: dict[str, dict[str, None]] = {}  # key -> its requests in order; the key to serve next is first
        self.arrived = 0.0  # sum of the times of arrival

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, request: str) -> bool:
        return request in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    @property
    def oldest(self) -> float | None:
        """When the oldest waiting request came."""
        for _, arrived in self._all.values():
            return arrived
        return None

    def add(self, request: str, key: str, now: float) -> None:
        """``request`` of API key ``key`` waits from ``now`` on."""
        self._all[request] = (key, now)
        self._keys.setdefault(key, {})[request] = None
        self.arrived += now

    def absorb(self, other: Queue) -> None:
        """Everybody who waits in ``other`` waits here from now on, each since he came."""
        waiting = sorted([*self._all.items(), *other._all.items()], key=lambda entry: entry[1][1])
        for queue in (self, other):
            queue._all, queue._keys, queue.arrived = {}, {}, 0.0
        for request, (key, arrived) in waiting:
            self.add(request, key, arrived)

    def remove(self, request: str) -> None:
        """``request`` waits no longer. Raises KeyError if it did not wait."""
        key, arrived = self._all.pop(request)
        mine = self._keys[key]
        del mine[request]
        if not mine:
            del self._keys[key]
        self.arrived = self.arrived - arrived if self._all else 0.0

    def take(self) -> tuple[str, str]:
        """The next request and its key: the keys take turns, so that one caller's flood delays only itself."""
        key = next(iter(self._keys))
        mine = self._keys.pop(key)
        request = next(iter(mine))
        self._keys[key] = mine
        self.remove(request)
        return request, key

    def late(self, timeout: float, now: float) -> list[str]:
        """Those whose ``timeout`` has passed, oldest first."""
        late = []
        for request, (_, arrived) in self._all.items():
            if arrived + timeout > now:
                break
            late.append(request)
        return late
