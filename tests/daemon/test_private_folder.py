"""The run directory of a hand-run daemon: its own while it lives, and nobody's trace when it was killed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from vllmd.daemon.private_folder import FLAGS, PREFIX, private_folder
from vllmd.errors import ConfigError


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left(folder: Path, name: str, **files: str) -> Path:
    """What a daemon that was killed left there."""
    path = folder / f"{PREFIX}{name}"
    path.mkdir(mode=0o700)
    for file, text in files.items():
        (path / file).write_text(text)
    return path


def test_it_is_ours_alone_and_is_removed(temporary: Path) -> None:
    with private_folder() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "sock").touch()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_daemon_left_is_removed_by_the_next_one(temporary: Path) -> None:
    """Of the living, nothing is; nor what has anything in it, a link, a file, or what somebody else named."""
    dead, used = left(temporary, "dead"), left(temporary, "used", sock="")
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}link").symlink_to(left(temporary / "..", f"aim-{os.getpid()}"))
    older = temporary / "vllmd-older"
    older.mkdir()
    with private_folder() as living, private_folder() as second:
        assert not dead.exists()
        assert living.is_dir()
        assert {each.name for each in temporary.iterdir()} == {
            living.name, second.name, used.name, older.name, f"{PREFIX}file", f"{PREFIX}link",
        }  # fmt: skip
        assert (temporary / f"{PREFIX}link").resolve().is_dir()
        (temporary / f"{PREFIX}link").resolve().rmdir()


def test_one_that_was_taken_for_abandoned_before_it_was_locked_is_made_anew(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two daemons that start at the same time: each has a directory that is there."""
    locked = fcntl.flock
    taken: list[str] = []

    def late(handle: int, how: int) -> None:
        if not taken and how == fcntl.LOCK_EX:
            taken.append(os.readlink(f"/proc/self/fd/{handle}"))
            os.rmdir(taken[0])
        locked(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with private_folder() as path:
        assert path.is_dir()
        assert str(path) != taken[0]
        with pytest.raises(BlockingIOError):
            locked(os.open(path, FLAGS), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_none_can_be_made_it_is_said_what_helps(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with pytest.raises(ConfigError, match="TMPDIR or VLLMD_ENGINE_RUN_DIR"), private_folder():
        pass
