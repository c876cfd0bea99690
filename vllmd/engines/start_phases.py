"""Where the time of a start goes: seconds by phase, in the order in which the phases began.

A start passes through phases that only its log tells of (``Engine.progress``). Two come before the first line: the
launcher's work until the process runs, and what the program does until it says anything, nearly all of it imports
where it is Python. Two come after the last: our own looking whether it answers, which belongs to the last phase, and
our warm-up request. A phase that comes back, as the imports do in each of vLLM's processes, has one sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllmd.engines.base import Progress

PROCESS = "process"  # from the order to the launcher until the program runs
WEIGHTS = "weights"  # reading them
WARM_UP = "first request"  # vllmd's own, after the engine has answered its probe


class StartPhases:
    """The clock of one start. Times by ``time.monotonic``."""

    def __init__(self, began: float | None = None) -> None:
        self.now = Progress(PROCESS)
        self.whole = True  # whether the start was watched from its beginning
        self._since = time.monotonic() if began is None else began
        self._spent: dict[str, float] = {}

    def enter(self, progress: Progress, at: float | None = None) -> bool:
        """The start is there now; returns whether that is another phase than before."""
        at = time.monotonic() if at is None else at
        before, self.now = self.now, progress
        if progress.phase == before.phase:
            return False
        self._count(before.phase, at)
        return True

    def end(self, at: float | None = None) -> Mapping[str, float]:
        """The start is over: seconds by phase; nothing where its beginning was not seen."""
        self._count(self.now.phase, time.monotonic() if at is None else at)
        return self.spent() if self.whole else {}

    def spent(self, at: float | None = None) -> dict[str, float]:
        """Seconds by phase so far; with ``at`` the present phase's as well."""
        spent = dict(self._spent)
        if at is not None:
            spent[self.now.phase] = spent.get(self.now.phase, 0.0) + max(0.0, at - self._since)
        return spent

    def _count(self, phase: str, at: float) -> None:
        self._spent[phase] = self._spent.get(phase, 0.0) + max(0.0, at - self._since)
        self._since = at


def fields(spent: Mapping[str, float], loader: str = "") -> dict[str, str]:
    """The journal fields of a start that has ended: ``VLLMD_START_IMPORTS=8.214``, in seconds; and the loader."""
    names = {phase: "".join(letter if letter.isalnum() else "_" for letter in phase.upper()) for phase in spent}
    by = {"VLLMD_LOADER": loader} if loader else {}
    return {f"VLLMD_START_{names[phase]}": f"{seconds:.3f}" for phase, seconds in spent.items()} | by
