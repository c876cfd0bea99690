"""How the tests are shared out when they run side by side (pytest-xdist's ``-n``): by file, the longest first."""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Files with this mark begin before all others, then those that take longest, then those with a container. What says how
# soon something must happen is not listed, however long it takes: it waits until the real vLLMs have gone.
VLLM, CONTAINER = "vllm", "machine"
LONGEST = (
    "admin/test_openapi.py",
    "admin/test_surface.py",
    "client/test_l_server_manager.py",
    "core/test_random.py",
    "installer/test_install.py",
    "simulate/test_aims.py",
    "test_house.py",
    "ui/test_page.py",
)
_TESTS = Path(__file__).parent


@functools.cache
def marks(file: Path) -> frozenset[str]:
    """Those of the two above that a file has. Read from its text: who shares out knows tests by name only."""
    text = file.read_text()
    return frozenset(mark for mark in (VLLM, CONTAINER) if f"mark.{mark}" in text)


def rank(file: Path) -> int:
    """When a file begins, 0 first: none that takes long is left for one worker while the others have nothing to do."""
    if VLLM in marks(file):
        return 0 if CONTAINER in marks(file) else 1
    if file.is_relative_to(_TESTS) and file.relative_to(_TESTS).as_posix() in LONGEST:
        return 2
    return 3 if CONTAINER in marks(file) else 4


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share a worker, so that what its fixtures boot or start is booted or started once.

    So do all files with a real vLLM in a container, for they share that one; and all with a real vLLM outside: it takes
    3 GB, and starting it a processor for half a minute.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        having = marks(self.config.rootpath / file)
        return "-".join(sorted(having)) if VLLM in having else file

    def remove_node(self, node: WorkerController) -> str | None:
        """The test during which a worker died has failed; xdist would have worker after worker die of it."""
        given = self.assigned_work[node]
        fatal = next((test for tests in given.values() for test, done in tests.items() if not done), None)
        if fatal is not None:
            given[self._split_scope(fatal)][fatal] = True
        super().remove_node(node)
        return fatal
