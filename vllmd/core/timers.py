"""When time alone next changes something, kept so that the first moment is known without a look at every replica.

A heap of moments. A replica's moment changes with nearly every request that it gets, and an entry in the middle of a
heap cannot be changed, so entries are left to go stale: one counts only if it says what ``Replica.due`` says. The rule
that keeps this right is that a replica whose moment is finite always has an entry at that moment or before
(``Replica.timer`` is its first one). A stale entry that comes to the top is taken out, and put back at the replica's
present moment. So a request costs the logarithm of the number of replicas at most, and the heap holds few entries more
than there are replicas, however often each becomes idle and busy again.
"""

from __future__ import annotations

import heapq
import itertools

from vllmd.core.model import INFINITY, Replica


class Timers:
    """The moments of all replicas, by the core's clock in seconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Replica]] = []
        self._serial = itertools.count()  # of two entries for one moment the earlier one comes first
        # A moment before which nothing is due, known without a look at what is stale; infinite if nothing ever is.
        self.none_before = INFINITY

    def set(self, r: Replica, due: float) -> None:
        """Time alone changes something for ``r`` at ``due``; infinite for never."""
        r.due = due
        if due < r.timer:
            r.timer = due
            heapq.heappush(self._heap, (due, next(self._serial), r))
            self.none_before = self._heap[0][0]

    def __len__(self) -> int:
        """How many entries there are, stale ones included."""
        return len(self._heap)

    @property
    def due(self) -> float:
        """The first moment of all; infinite if there is none."""
        heap = self._heap
        while heap and heap[0][0] != heap[0][2].due:
            self._drop_first()
        return heap[0][0] if heap else INFINITY

    def expired(self, now: float) -> list[Replica]:
        """The replicas whose moment has come, the first one first; each keeps its moment until it gets another."""
        found = []
        while self.due <= now:
            r = self._heap[0][2]
            found.append(r)
            self._drop_first(again=False)
        for r in found:
            self.set(r, r.due)
        return found

    def _drop_first(self, *, again: bool = True) -> None:
        """Take the first entry out; if it was its replica's first one, another stands for the present moment."""
        at, _, r = heapq.heappop(self._heap)
        self.none_before = self._heap[0][0] if self._heap else INFINITY
        if at == r.timer:
            r.timer = INFINITY
            if again:
                self.set(r, r.due)
