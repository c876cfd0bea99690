"""Whose memory it is: every byte in use is a model's or a stranger's, and never both."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu.fake_nvml import GiB
from vllmd.gpu import DeviceSample, Sample, attribute, pids_of

MiB = 1 << 20


def sample(used: int, processes: dict[int, int], unsized: tuple[int, ...] = (), hides: bool = False) -> Sample:
    total = 80 * GiB
    return Sample({0: DeviceSample(total, used, total - used, processes, frozenset(unsized), hides)})


def test_models_get_their_processes_and_strangers_the_rest() -> None:
    """An engine is several processes; the driver's own memory is nobody's to give away."""
    taken = sample(40 * GiB, {1: 10 * GiB, 2: 5 * GiB, 3: 20 * GiB, 9: 4 * GiB})
    external, models = attribute(taken, {"a": [1, 2], "b": {3}, "idle": [5]})
    assert models == {("a", 0): 15 * GiB, ("b", 0): 20 * GiB}
    assert external == {0: 5 * GiB}


def test_a_few_ownerless_megabytes_are_rounding() -> None:
    """Otherwise a model that exactly fits would be refused for nothing."""
    assert attribute(sample(10 * GiB + MiB, {1: 10 * GiB}), {"a": [1]})[0] == {0: 0}


def test_memory_left_behind_by_the_dead_is_a_strangers() -> None:
    """A wedged driver keeps what a killed engine held: nobody can be given it."""
    assert attribute(sample(10 * GiB, {}), {"a": [1]}) == ({0: 10 * GiB}, {})


def test_a_device_that_failed_is_not_spoken_of() -> None:
    """No figure is better than a wrong zero."""
    assert attribute(Sample({}, {0: "GPU is lost"}), {"a": [1]}) == ({}, {})


def test_a_model_of_unknown_size_is_not_charged_twice() -> None:
    """Where the driver gives no size, the ledger's figure comes off the rest, and is not passed off as measured."""
    taken = sample(32 * GiB, {9: 2 * GiB}, unsized=(1,))
    external, models = attribute(taken, {"a": [1]}, {("a", 0): 29 * GiB, ("a", 1): 7 * GiB})
    assert (external, models) == ({0: 3 * GiB}, {})


def test_one_process_of_unknown_size_spoils_its_models_sum() -> None:
    """Half a footprint learnt as the whole would let the ledger promise what is not there."""
    external, models = attribute(sample(32 * GiB, {1: 2 * GiB}, unsized=(2,)), {"a": [1, 2]}, {("a", 0): 31 * GiB})
    assert (external, models) == ({0: 1 * GiB}, {})


def test_where_processes_are_hidden_the_ledger_is_believed() -> None:
    """In a container the driver shows no process at all; our own engines are not strangers."""
    taken = sample(32 * GiB, {}, hides=True)
    expected = {("a", 0): 20 * GiB, ("b", 0): 10 * GiB}
    assert attribute(taken, {"a": [1], "b": [2]}, expected) == ({0: 2 * GiB}, {})


def test_expectations_do_not_matter_where_the_driver_tells() -> None:
    """A starting engine that does not hold its promised memory yet must not hide a stranger."""
    taken = sample(12 * GiB, {9: 12 * GiB})
    assert attribute(taken, {"a": [1]}, {("a", 0): 10 * GiB}) == ({0: 12 * GiB}, {})


SIZES = st.dictionaries(st.integers(1, 20), st.integers(0, 20 * GiB), max_size=8)


@given(SIZES, st.integers(0, 5 * GiB), st.lists(st.frozensets(st.integers(1, 20), max_size=4), max_size=3))
def test_nothing_is_counted_twice(processes: dict[int, int], extra: int, owned: list[frozenset[int]]) -> None:
    """Models' and strangers' bytes add up to what is in use, but for a tiny rest."""
    pids = {str(number): its - frozenset().union(*owned[:number]) for number, its in enumerate(owned)}
    used = sum(processes.values()) + extra
    external, models = attribute(sample(used, processes), pids)
    assert 0 <= used - external[0] - sum(models.values()) <= 16 * MiB


def test_pids_come_from_the_cgroup_and_below(tmp_path: Path) -> None:
    """A worker in a child cgroup is the engine's; 0 stands for a process of another pid namespace."""
    (tmp_path / "child").mkdir()
    (tmp_path / "cgroup.procs").write_text("10\n11\n0\n")
    (tmp_path / "child/cgroup.procs").write_text("12\n")
    assert pids_of(tmp_path, 1) == {10, 11, 12}


def test_a_cgroup_that_goes_away_meanwhile_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's cgroup is removed while an engine ends: the processes of the others are still told."""
    (tmp_path / "child").mkdir()
    (tmp_path / "cgroup.procs").write_text("10\n")
    look = os.scandir

    def scandir(path: os.PathLike[str] | str) -> object:
        if str(path).endswith("child"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert pids_of(tmp_path, 1) == {10}


def test_without_a_cgroup_the_family_counts(tmp_path: Path) -> None:
    """Descendants and the session's members, an orphan among them; names with blanks and brackets are no trap."""
    processes = {7: ("main", 1, 7), 8: ("VLLM (x) y", 7, 7), 9: ("own session", 8, 9)}
    processes |= {10: ("orphan", 1, 7), 11: ("a stranger", 1, 11)}
    for pid, (name, parent, session) in processes.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {session} {session} 0")
    (tmp_path / "12").mkdir()  # gone between the listing and the look
    assert pids_of("", 7, tmp_path) == {7, 8, 9, 10}
    assert pids_of(tmp_path / "no-such-cgroup", 7, tmp_path) == {7, 8, 9, 10}
    assert pids_of(None, None, tmp_path) == frozenset()


def test_a_real_child_is_found() -> None:
    """The same against the kernel's own /proc."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert {os.getpid(), child.pid} <= pids_of(None, os.getpid())
        finally:
            child.kill()
