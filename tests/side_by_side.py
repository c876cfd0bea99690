"""How the tests are shared out when they run side by side (pytest-xdist's ``-n``): by file, the longest first."""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Files with these marks begin before all others, in this order.
LONGEST = ("vllm", "machine")


@functools.cache
def rank(file: Path) -> int:
    """Its place among LONGEST. Read from its text: who shares out knows tests by name only."""
    text = file.read_text()
    return next((place for place, mark in enumerate(LONGEST) if f"mark.{mark}" in text), len(LONGEST))


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share a worker, so that what its fixtures boot or start is booted or started once.

    All files with a real vLLM share one, too: a vLLM takes 3 GB, and starting it two processors for half a minute.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "vllm" if rank(self.config.rootpath / file) == LONGEST.index("vllm") else file

    def remove_node(self, node: WorkerController) -> str | None:
        """The test during which a worker died has failed; xdist would have worker after worker die of it."""
        given = self.assigned_work[node]
        fatal = next((test for tests in given.values() for test, done in tests.items() if not done), None)
        if fatal is not None:
            given[self._split_scope(fatal)][fatal] = True
        super().remove_node(node)
        return fatal
