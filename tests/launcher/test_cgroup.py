"""Groups are watched by inotify, or looked at where there is none left."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllmd.launcher import __main__ as launcher
from vllmd.launcher import cgroup, scopes
from vllmd.launcher.bus import BusError
from vllmd.launcher.cgroup import Cgroup, WatchedCgroup, Watcher, cgroup_of
from vllmd.launcher.loop import Loop
from vllmd.launcher.protocol import StartOrder


class NoInotify:
    """A C library in whose kernel others have used it up."""

    def inotify_init1(self, flags: int) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1

    def inotify_add_watch(self, *_: object) -> int:
        ctypes.set_errno(errno.EBADF)
        return -1


def test_an_end_is_noticed_without_inotify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher would else not start at all; what was let go of is not looked at any more."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoInotify())
    monkeypatch.setattr(cgroup, "LOOK", 0.01)
    (tmp_path / "cgroup.events").write_text("populated 1\n")
    loop, looks = Loop(), []
    group = WatchedCgroup(tmp_path, Watcher(loop))

    def changed() -> None:
        looks.append(group.empty())
        if len(looks) == 2:
            (tmp_path / "cgroup.events").write_text("populated 0\n")
        if looks[-1]:
            group.close()
            loop.later(0.05, loop.stop)

    group.watch(changed)
    loop.run()
    assert looks == [False, False, True]


def out_of_files(*_: object, **__: object) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_group_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of a descriptor a running engine would pass for one that has ended; one that is gone is empty."""
    group = Cgroup(tmp_path / "engine")
    assert group.empty() and group.pids() == [] and group.annotations() == {}
    group.kill()
    group.path.mkdir()
    (group.path / "cgroup.events").write_text("populated 0\n")
    (group.path / "cgroup.procs").write_text("")
    assert group.empty()
    with monkeypatch.context() as out:
        out.setattr(Path, "open", out_of_files)
        out.setattr(Path, "read_text", out_of_files)
        out.setattr(Path, "write_text", out_of_files)
        out.setattr(os, "listxattr", out_of_files)
        assert not group.empty()
        for look in (group.pids, group.kill, group.annotations, lambda: cgroup_of("self")):
            with pytest.raises(OSError, match="Too many"):
                look()


def test_without_version_2_no_engine_is_begun_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes could not be found again; how to boot the machine is in the answer."""
    told: list[str] = []
    monkeypatch.setattr(scopes, "hierarchy", lambda: None)
    nobody: Any = cast(Any, SimpleNamespace())
    scopes.Scopes.place(nobody, StartOrder("a", ("true",)), nobody, lambda group, why: told.append(why))
    assert "systemd.unified_cgroup_hierarchy=1" in told[0]


def test_a_process_that_cannot_be_seen_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scope was made by a call whose answer was lost: without a descriptor for the look, the order goes on."""

    def exists(*_: object) -> Any:
        raise BusError("unit a is already loaded")

    again: list[float] = []
    monkeypatch.setattr(scopes, "hierarchy", lambda: Path("/sys/fs/cgroup"))
    monkeypatch.setattr(scopes, "cgroup_of", out_of_files)
    loop = SimpleNamespace(later=lambda seconds, then: again.append(seconds))
    itself: Any = SimpleNamespace(_placing={}, _loaded=set(), _bus=SimpleNamespace(units=exists), _loop=loop)
    scopes.Scopes.place(itself, StartOrder("a", ("true",)), cast(Any, SimpleNamespace(pid=1)), out_of_files)
    assert again == [scopes.RETRY_SECONDS]


def test_what_the_machine_refuses_is_tried_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd starts the next launcher at once, as often as it takes: that would be all that the machine does."""
    pauses: list[float] = []
    monkeypatch.setattr(launcher, "_run_with_systemd", out_of_files)
    monkeypatch.setattr(launcher, "setup_logging", lambda *_, **__: None)
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert launcher.main([]) == 1
    assert pauses == [launcher.FAILED_SECONDS]
