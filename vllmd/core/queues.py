"""The requests that wait for one model: round robin over API keys, oldest first within a key."""

from __future__ import annotations


class Queue(dict[str, tuple[str, float]]):
    """Waiting requests, in order of arrival, each with its key and when it came.

    Taking, removing and asking for the oldest cost the same however many there are. Only the methods here change it.
    """

    __slots__ = ("_keys", "arrived")

    def __init__(self) -> None:
        self._keys: dict[str, dict[str, None]] = {}  # key -> its requests in order; the key to serve next is first
        self.arrived = 0.0  # sum of the times of arrival

    @property
    def oldest(self) -> float | None:
        """When the oldest waiting request came."""
        for _, arrived in self.values():
            return arrived
        return None

    def add(self, request: str, key: str, now: float) -> None:
        """``request`` of API key ``key`` waits from ``now`` on."""
        self[request] = (key, now)
        self._keys.setdefault(key, {})[request] = None
        self.arrived += now

    def remove(self, request: str) -> None:
        """``request`` waits no longer. Raises KeyError if it did not wait."""
        key, arrived = self.pop(request)
        mine = self._keys[key]
        del mine[request]
        if not mine:
            del self._keys[key]
        self.arrived = self.arrived - arrived if self else 0.0

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
        for request, (_, arrived) in self.items():
            if arrived + timeout > now:
                break
            late.append(request)
        return late
