"""The pretended GPU: exact, shared between processes, and never holding for the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.simengine import device
from vllmd.simengine.cuda import CudaMemory, NoCuda
from vllmd.simengine.device import FakeGpu, OutOfDeviceMemory, device_usage, make_device

HOLD_AND_WAIT = """
import sys
from vllmd.simengine.device import FakeGpu
FakeGpu(sys.argv[1]).hold(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def _holder(path: Path, size: int) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_WAIT, str(path), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_what_one_holds_another_cannot_have(tmp_path: Path) -> None:
    """The error says how much was free, and nothing has changed."""
    path = make_device(tmp_path / "gpu", 100)
    FakeGpu(path).hold(60)
    other = FakeGpu(path, pid=1)
    with pytest.raises(OutOfDeviceMemory) as error:
        other.hold(41)
    assert (error.value.wanted, error.value.free, error.value.memory) == (41, 40, 100)
    assert device_usage(path).used == 60
    other.hold(40)
    assert device_usage(path).free == 0


def test_making_a_device_again_leaves_what_is_held(tmp_path: Path) -> None:
    """Two engines that start at once both make sure that it is there."""
    path = make_device(tmp_path / "gpu", 100)
    FakeGpu(path).hold(60)
    assert device_usage(make_device(path, 100)).used == 60


def test_a_hold_replaces_the_one_before(tmp_path: Path) -> None:
    """An engine says what it holds, not what it adds."""
    gpu = FakeGpu(make_device(tmp_path / "gpu", 100))
    gpu.hold(90)
    gpu.hold(95)
    gpu.check(100)
    assert device_usage(gpu.path).processes == {gpu.pid: 95}
    gpu.hold(0)
    assert device_usage(gpu.path).processes == {}


def test_the_dead_hold_nothing(tmp_path: Path) -> None:
    """Killed, not even reaped: its memory is free, as the driver would have it."""
    path = make_device(tmp_path / "gpu", 100)
    holder = _holder(path, 80)
    assert device_usage(path).processes == {holder.pid: 80}
    holder.kill()
    holder.communicate()
    assert device_usage(path).free == 100
    FakeGpu(path).hold(100)


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    """The start time tells two processes of one number apart."""
    path = tmp_path / "gpu"
    path.write_text('{"memory": 100, "held": [{"pid": 1, "start": 999999999, "bytes": 50}]}')
    assert device_usage(path).free == 100


def test_what_is_lost_nobody_can_have_until_it_is_back(tmp_path: Path) -> None:
    """A driver that does not take a dead process's memory back, for rehearsals."""
    gpu = FakeGpu(make_device(tmp_path / "gpu", 100))
    gpu.lose(30)
    with pytest.raises(OutOfDeviceMemory):
        gpu.hold(71)
    gpu.hold(70)
    assert (device_usage(gpu.path).used, device_usage(gpu.path).processes) == (100, {gpu.pid: 70})
    gpu.lose(0)
    gpu.hold(100)


def test_a_process_that_proc_does_not_show_holds_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon runs with ProtectProc=invisible: engines, of another user, are alive all the same."""
    path = make_device(tmp_path / "gpu", 100)
    holder = _holder(path, 80)
    monkeypatch.setattr(device, "PROC", tmp_path / "proc")
    assert device_usage(path).processes == {holder.pid: 80}
    holder.kill()
    holder.communicate()
    assert device_usage(path).processes == {}


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    """Rather than read as an empty GPU."""
    (tmp_path / "other").write_text("[]")
    with pytest.raises(ValueError, match="not a pretended GPU"):
        device_usage(tmp_path / "other")


@given(holds=st.lists(st.tuples(st.sampled_from([os.getpid(), os.getppid()]), st.integers(0, 120)), max_size=20))
def test_never_more_is_held_than_there_is(
    tmp_path_factory: pytest.TempPathFactory, holds: list[tuple[int, int]]
) -> None:
    """Whatever is tried in whatever order."""
    path = make_device(tmp_path_factory.mktemp("gpu") / "0", 100)
    for pid, size in holds:
        try:
            FakeGpu(path, pid=pid).hold(size)
        except OutOfDeviceMemory:
            continue
        assert device_usage(path).processes.get(pid, 0) == size
        assert device_usage(path).used <= 100


def test_without_torch_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--cuda`` on a machine without it ends with a sentence, not a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NoCuda, match="needs torch"):
        CudaMemory(0)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"{}", b"x"])
def test_a_device_file_that_is_none_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    """Engines of another user write it, and the daemon reads it."""
    (tmp_path / "gpu0").write_bytes(content)
    with pytest.raises(ValueError, match=r"pretended GPU|Expecting"):
        device_usage(tmp_path / "gpu0")


def test_a_fifo_in_a_device_files_place_makes_nobody_wait(tmp_path: Path) -> None:
    """Nor is a directory or a device taken for one."""
    os.mkfifo(tmp_path / "gpu0")
    with pytest.raises(ValueError, match="no regular file"):
        device_usage(tmp_path / "gpu0")
    with pytest.raises(ValueError, match="no regular file"):
        device_usage("/dev/null")


def test_holders_with_absurd_pids_are_nobody(tmp_path: Path) -> None:
    """A pid that no process can have is a process that is gone."""
    (tmp_path / "gpu0").write_text(
        '{"memory": 100, "held": [{"pid": 1e30, "start": 1, "bytes": 5}]}'.replace("1e30", "9" * 30)
    )
    assert device_usage(tmp_path / "gpu0").used == 0
