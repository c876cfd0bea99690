"""Memory, CPUs, tasks and ports as control groups and sysctls leave them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.trees import write
from vllmd.daemon.ports import PortPool
from vllmd.place import Cpus, PortLimits, cpus, host_memory, port_limits, tasks
from vllmd.sizes import GiB

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2 * GiB}\n"}, 2 * GiB),  # in a container
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.high": f"{3 * GiB}\n"}, 3 * GiB),  # of one above
        ({"proc/self/cgroup": "0::/s/vllmd.service\n", "sys/fs/cgroup/s/vllmd.service/memory.max": "1024\n"}, MACHINE),
        ({"sys/fs/cgroup/vllmd.slice/memory.max": f"{GiB}\n"}, GiB),  # an administrator's limit on all engines
        ({"proc/self/cgroup": "4:cpu:/x\n5:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1024"}, 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{1 << 60}\n"}, MACHINE),  # more than there is
    ],
)
def test_the_least_of_all_limits_counts(tmp_path: Path, files: dict[str, str], least: int) -> None:
    """Half of a big machine's memory, promised to sleepers in a small container, ends with the OOM killer."""
    write(tmp_path, **files)
    assert host_memory(tmp_path) == least


OWN = {"proc/self/cgroup": "0::/\n"}
TOP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "count", "quota"),
    [
        ({}, 8, None),
        ({**OWN, f"{TOP}/cpu.max": "max 100000\n"}, 8, None),
        ({**OWN, f"{TOP}/cpu.max": "250000 100000\n"}, 2, 2.5),  # in a container with --cpus=2.5
        ({**OWN, f"{TOP}/cpu.max": "50000 100000\n"}, 1, 0.5),
        ({**OWN, f"{TOP}/cpuset.cpus.effective": "0-2,7\n"}, 4, None),  # --cpuset-cpus
        ({f"{TOP}/vllmd.slice/cpu.max": "300000 100000\n"}, 3, 3.0),  # an administrator's, for all engines
        ({**OWN, f"{TOP}/cpu.max": "1600000 100000\n"}, 8, 16.0),  # more than there are
    ],
)
def test_cpus_are_what_affinity_sets_and_quotas_leave(
    tmp_path: Path, files: dict[str, str], count: int, quota: float | None
) -> None:
    """A thread for each of 64 CPUs under a quota of two is slower than two threads."""
    write(tmp_path, **files)
    found = cpus(tmp_path, affinity=8)
    assert (found.count, found.quota) == (count, quota)


def test_a_models_own_quota_counts_too() -> None:
    """The least of both."""
    assert Cpus(8, 8).within(None) == Cpus(8, 8)
    assert Cpus(8, 8).within(2.5) == Cpus(2, 8, 2.5)
    assert Cpus(2, 8, 2.5).within(4.0) == Cpus(2, 8, 2.5)


def test_tasks_are_the_least_of_groups_and_kernel(tmp_path: Path) -> None:
    """A container's --pids-limit is often far below the machine's."""
    assert tasks(tmp_path) is None
    write(tmp_path, **{**OWN, f"{TOP}/pids.max": "max\n", "proc/sys/kernel/threads-max": "9000\n"})
    assert tasks(tmp_path) == 9000
    write(tmp_path, **{f"{TOP}/vllmd.slice/pids.max": "512\n"})
    assert tasks(tmp_path) == 512


def test_ports_that_outgoing_connections_take(tmp_path: Path) -> None:
    """Not those that the administrator reserved."""
    assert port_limits(tmp_path) == PortLimits()
    write(tmp_path, **{
        "proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
        "proc/sys/net/ipv4/ip_local_reserved_ports": "33300-33310,40000\n",
        "proc/sys/net/ipv4/ip_unprivileged_port_start": "1024\n",
    })  # fmt: skip
    limits = port_limits(tmp_path)
    assert limits.least == 1024
    assert [limits.taken(port) for port in (32767, 32768, 33300, 33311, 40000, 61000)] == [
        False, True, False, True, False, False]  # fmt: skip


def test_safe_ports_are_given_first_and_closed_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an outgoing connection may take at any moment come last."""
    monkeypatch.setattr("vllmd.daemon.ports._is_free", lambda port: True)
    pool = PortPool(1022, 1026, PortLimits(1024, (1024, 1025), frozenset()))
    assert [pool.reserve() for _ in range(3)] == [1026, 1024, 1025]
    pool.take(1025, 1027)
    assert pool.reserve() == 1027
