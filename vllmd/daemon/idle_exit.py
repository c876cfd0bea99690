"""When a socket-activated daemon may exit: nothing has been wanted of it for long enough."""

from __future__ import annotations

SHORTEST_LIFE = 1.0  # seconds; faster activations would look like a crash loop to systemd's start limit


class IdleExit:
    """Looked at now and then. All times are monotonic seconds: the clock may be set, and must not matter."""

    def __init__(self, born: float) -> None:
        self._born = self._idle_since = born
        self._accepted = 0  # connections, at the last look

    def due(self, now: float, after: float | None, *, busy: bool, accepted: int) -> bool:
        """Whether to exit. ``after``: seconds of idleness, None for never. ``accepted``: connections so far.

        Connections that came and went between two calls, refused ones too, count as use: each would start it anew.
        """
        used, self._accepted = busy or accepted != self._accepted, accepted
        if used:
            self._idle_since = now
        return after is not None and not used and self.left(now, after) <= 0

    def left(self, now: float, after: float) -> float:
        """Seconds until the exit is due, if nothing comes."""
        return max(self._idle_since + after, self._born + SHORTEST_LIFE) - now
