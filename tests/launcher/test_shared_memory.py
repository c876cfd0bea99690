"""What engines leave in /dev/shm goes, and what any process of their user still has does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllmd.launcher.shared_memory import remove_unused

NAMES = ("psm_left", "psm_mapped", "psm_open", "sem.mp-left", "vllm_offload_left.mmap", "nccl-left", "data")


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    (folder := tmp_path / "shm").mkdir()
    for name in NAMES:
        (folder / name).touch()
    return folder


def process(folder: Path, pid: int, uid: int, maps: str = "", files: tuple[Path, ...] = ()) -> Path:
    """A process as proc(5) shows it."""
    (own := folder / str(pid)).mkdir(parents=True)
    (own / "status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    (own / "maps").write_text(f"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n{maps}")
    (own / "fd").mkdir()
    for number, file in enumerate(files):
        (own / "fd" / str(number)).symlink_to(file)
    return own


def test_what_no_process_has_is_removed(tmp_path: Path, shm: Path) -> None:
    """Of the names that are given to memory which ends with its processes; others may be meant to stay."""
    proc, uid = tmp_path / "proc", os.getuid()
    mapped, left = ((shm / name).stat().st_ino for name in ("psm_mapped", "psm_left"))
    # As of a semaphore, which gets its name after it has been mapped.
    process(proc, 7, uid, f"7f0000001000-7f0000002000 rw-s 00000000 00:1b {mapped} {' ' * 30}{shm}/Ab3dE (deleted)\n")
    process(proc, 8, uid, files=(shm / "psm_open", shm / "gone"))
    process(proc, 9, uid + 1, f"7f0000001000-7f0000002000 rw-s 00000000 00:1b {left} {shm}/psm_left\n")
    (proc / "10").mkdir()  # it has just ended
    remove_unused(str(shm), str(proc))
    assert sorted(os.listdir(shm)) == ["data", "psm_mapped", "psm_open"]


def test_where_a_process_cannot_be_looked_at_all_stays(tmp_path: Path, shm: Path) -> None:
    """It may have any of the files."""
    own = process(tmp_path / "proc", 7, os.getuid())
    (own / "maps").unlink()
    (own / "maps").symlink_to("maps")
    with pytest.raises(OSError, match="symbolic links"):
        remove_unused(str(shm), str(tmp_path / "proc"))
    assert sorted(os.listdir(shm)) == sorted(NAMES)
