"""What engines leave in /dev/shm goes, and what any process of their user still has does not."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest

from vllmd.launcher import shared_memory
from vllmd.launcher.process import Process
from vllmd.launcher.shared_memory import FIRST_IPC_NAMESPACE, FIRST_PID_NAMESPACE, remove_unused
from vllmd.launcher.spawn import User, sweep, tidy

NAMES = ("psm_left", "psm_mapped", "psm_open", "sem.mp-left", "vllm_offload_left.mmap", "nccl-left", "data")


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    (folder := tmp_path / "shm").mkdir()
    for name in NAMES:
        (folder / name).touch()
    return folder


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (own := tmp_path / "proc/self/ns").mkdir(parents=True)
    (own / "pid").symlink_to(FIRST_PID_NAMESPACE)
    (own / "ipc").symlink_to(FIRST_IPC_NAMESPACE)
    return tmp_path / "proc"


def process(folder: Path, pid: int, uid: int, maps: str = "", files: tuple[Path, ...] = ()) -> Path:
    """A process as proc(5) shows it."""
    (own := folder / str(pid)).mkdir(parents=True)
    (own / "status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    (own / "maps").write_text(f"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n{maps}")
    (own / "fd").mkdir()
    for number, file in enumerate(files):
        (own / "fd" / str(number)).symlink_to(file)
    return own


def test_what_no_process_has_is_removed(proc: Path, shm: Path) -> None:
    """Of the names that are given to memory which ends with its processes; others may be meant to stay."""
    uid = os.getuid()
    mapped, left = ((shm / name).stat().st_ino for name in ("psm_mapped", "psm_left"))
    # As of a semaphore, which gets its name after it has been mapped.
    process(proc, 7, uid, f"7f0000001000-7f0000002000 rw-s 00000000 00:1b {mapped} {' ' * 30}{shm}/Ab3dE (deleted)\n")
    process(proc, 8, uid, files=(shm / "psm_open", shm / "gone"))
    process(proc, 9, uid + 1, f"7f0000001000-7f0000002000 rw-s 00000000 00:1b {left} {shm}/psm_left\n")
    (proc / "10").mkdir()  # it has just ended
    remove_unused(str(shm), str(proc))
    assert sorted(os.listdir(shm)) == ["data", "psm_mapped", "psm_open"]


def test_where_a_process_cannot_be_looked_at_all_stays(proc: Path, shm: Path) -> None:
    """It may have any of the files."""
    own = process(proc, 7, os.getuid())
    (own / "maps").unlink()
    (own / "maps").symlink_to("maps")
    with pytest.raises(OSError, match="symbolic links"):
        remove_unused(str(shm), str(proc))
    assert sorted(os.listdir(shm)) == sorted(NAMES)


def test_what_is_mapped_and_closed_while_one_looks_stays(proc: Path, shm: Path) -> None:
    """A process keeps a file open until it has mapped it, so what it has open is looked at first."""
    own = process(proc, 7, os.getuid(), files=(shm / "psm_open",))
    (own / "maps").unlink()
    os.mkfifo(own / "maps")

    def close() -> None:
        with (own / "maps").open("w"):  # somebody looks: nothing is mapped yet, and a moment later it is, and closed
            (own / "fd/0").unlink()

    closing = threading.Thread(target=close)
    closing.start()
    remove_unused(str(shm), str(proc))
    closing.join()
    assert sorted(os.listdir(shm)) == ["data", "psm_open"]


@pytest.mark.parametrize(("namespace", "there"), [("ipc:[4026532200]", False), (FIRST_IPC_NAMESPACE, True)])
def test_in_a_container_with_the_hosts_memory_all_stays(proc: Path, shm: Path, namespace: str, there: bool) -> None:
    """It is other containers', too, whose processes cannot be seen and may have the same user id."""
    for name, value in (("pid", "pid:[4026532201]"), ("ipc", namespace)):
        (proc / "self/ns" / name).unlink()
        (proc / "self/ns" / name).symlink_to(value)
    remove_unused(str(shm), str(proc))
    assert (shm / "psm_left").exists() is there


def wait_for(child: Process | None) -> None:
    assert child
    os.waitpid(child.pid, 0)
    child.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes other users")
@pytest.mark.parametrize(
    ("user", "freed"),
    [
        (User("vllmd-alice", 997, 997, (), "/"), True),
        (User("own:m", 60800, 60800, (), "/", makes_home=True), True),
        (User("alice", 1000, 1000, (), "/"), False),
        (User("", 997, 997, (), "/", ours=True), False),
    ],
)
def test_shared_memory_of_people_stays_and_a_run_directory_goes_first(
    user: User, freed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People may have left it to be found. Looking at a process that a driver holds may last for ever."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        told, folder = Path(place, "told"), Path(place, "run")
        monkeypatch.setattr(shared_memory, "remove_unused", lambda: told.write_text(str(folder.exists())))
        for remove in (lambda: tidy(str(folder), user), lambda: sweep([str(folder)], user)):
            folder.mkdir()
            os.chown(folder, user.uid, user.gid)
            wait_for(remove())
            assert not folder.exists()
            assert [each.read_text() for each in [told] if each.exists()] == ["False"] * freed
            told.unlink(missing_ok=True)
