"""Memory as control groups leave it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.trees import write
from vllmd.core.types import GiB
from vllmd.daemon.host import host_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2 * GiB}\n"}, 2 * GiB),  # in a container
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.high": f"{3 * GiB}\n"}, 3 * GiB),  # of one above
        ({"sys/fs/cgroup/vllmd.slice/memory.max": f"{GiB}\n"}, GiB),  # an administrator's limit on all engines
        ({"proc/self/cgroup": "4:cpu:/x\n5:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1024"}, 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{1 << 60}\n"}, MACHINE),  # more than there is
    ],
)
def test_the_least_of_all_limits_counts(tmp_path: Path, files: dict[str, str], least: int) -> None:
    """Half of a big machine's memory, promised to sleepers in a small container, ends with the OOM killer."""
    write(tmp_path, **files)
    assert host_memory(tmp_path) == least
