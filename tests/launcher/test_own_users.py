"""Users made up for models: each its own number, kept by its home, never anybody else's."""

from __future__ import annotations

import os
import pwd
import socket
import tempfile
from pathlib import Path

import pytest

from vllmd.launcher.own_users import OwnUsers
from vllmd.launcher.spawn import Users, sweep, unused

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives homes to others")


def made(folder: Path, name: str, owner: int) -> None:
    (folder / name).mkdir()
    os.chown(folder / name, owner, owner)


def test_each_name_gets_a_number_of_its_own(tmp_path: Path) -> None:
    """And the same one again, although its home has not been made yet."""
    users = OwnUsers(70000, 70009, str(tmp_path))
    assert [users.allocate(name) for name in ("a", "b", "a", "c")] == [70000, 70001, 70000, 70002]


@root
def test_a_home_keeps_its_number_over_restarts(tmp_path: Path) -> None:
    """The next launcher has no other memory."""
    made(tmp_path, "b", 70001)
    users = OwnUsers(70000, 70009, str(tmp_path))
    assert users.allocate("b") == 70001
    assert [users.allocate(name) for name in ("a", "c")] == [70000, 70002]
    assert (users.find("b"), users.find("nobody")) == (70001, None)


@root
@pytest.mark.parametrize("owner", [0, 4711])
def test_a_home_of_somebody_else_is_refused(tmp_path: Path, owner: int) -> None:
    """Whoever could put one there would choose whom an engine runs as."""
    made(tmp_path, "a", owner)
    users = OwnUsers(70000, 70009, str(tmp_path))
    with pytest.raises(ValueError, match="is not one of"):
        users.allocate("a")
    assert users.find("a") is None


@root
def test_a_link_or_a_file_is_nobodys_home(tmp_path: Path) -> None:
    """Its owner says nothing about where it leads."""
    (tmp_path / "a").symlink_to("/tmp")
    os.chown(tmp_path / "a", 70001, 70001, follow_symlinks=False)
    with pytest.raises(ValueError, match="is not one of"):
        OwnUsers(70000, 70009, str(tmp_path)).allocate("a")


def test_numbers_of_known_users_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator may have made one since."""

    def getpwuid(number: int) -> None:
        if number != 70000:
            raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    assert OwnUsers(70000, 70009, str(tmp_path)).allocate("a") == 70001


@root
def test_what_their_engines_left_behind_is_swept_too() -> None:
    """Engines end while there is no launcher; the next one removes their run directories, whoever's they are."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place)
        made(folder, "homes", 0)
        made(folder / "homes", "a", 70001)
        made(folder, "run", 70001)
        made(folder / "run", "left", 70001)
        made(folder / "run", "runs", 70001)
        socket.socket(socket.AF_UNIX).bind(str(folder / "run/left/e.sock"))
        os.chown(folder / "run/left/e.sock", 70001, 70001)
        users = Users(["nobody"], OwnUsers(70000, 70009, str(folder / "homes")))
        assert [user.name for user in users.all()] == ["nobody", "own:a"]
        for user in users.all():
            child = sweep(unused(str(folder / "run"), {"runs"}), user)
            if child:
                os.waitpid(child.pid, 0)
                child.close()
        assert os.listdir(folder / "run") == ["runs"]


def test_a_range_that_is_used_up_says_so(tmp_path: Path) -> None:
    """And what would help: the homes are named."""
    users = OwnUsers(70000, 70000, str(tmp_path))
    users.allocate("a")
    with pytest.raises(ValueError, match=f"have homes in {tmp_path}"):
        users.allocate("b")


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a\n", "a" * 65])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    """They come from the daemon, and become paths."""
    with pytest.raises(ValueError, match="cannot be the name"):
        OwnUsers(70000, 70009, str(tmp_path)).allocate(name)


@pytest.mark.parametrize(
    ("numbers", "homes"),
    [("0-9", "/h"), ("70000", "/h"), ("70009-70000", "/h"), ("1000-9999999999", "/h"), ("70000-70009", "h/..")],
)
def test_a_wrong_range_or_folder_is_told(numbers: str, homes: str) -> None:
    """At the launcher's start."""
    with pytest.raises(ValueError, match="--own-"):
        OwnUsers.parse(numbers, homes)


def test_no_range_means_no_such_users() -> None:
    """The default."""
    assert OwnUsers.parse("", "") is None
