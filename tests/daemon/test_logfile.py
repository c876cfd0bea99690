"""An engine's output in a file of its own.

V is the Ollama-like manager: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from vllmd.daemon import logfile
from vllmd.daemon.logfile import BURST, KEPT, RATE, RUNS, SIZE, LogFile, forget_old_runs, forget_removed_models, path_of


def test_lines_are_appended_under_a_name_without_slashes(tmp_path: Path) -> None:
    """V's name pattern, in a folder that is made when it is needed; earlier runs are kept."""
    path = path_of(tmp_path / "new", "org/model", "33300")
    for text in ("first", "second"):
        file = LogFile(path)
        file.write([text, f"{text} again"])
        file.close()
    assert path.name == "org_model_33300.log"
    assert path.read_text().splitlines() == ["first", "first again", "second", "second again"]


def test_it_rotates(tmp_path: Path) -> None:
    """A chatty engine must not fill the disk."""
    now = 0.0
    file = LogFile(tmp_path / "m.log", clock=lambda: now)
    for _ in range(2 * KEPT + 6):
        now += 60
        file.write(["x" * (SIZE // 2)])
    file.close()
    assert len(list(tmp_path.iterdir())) == KEPT + 1


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full or read-only disk is no reason to stop serving, nor to fill the journal."""
    (tmp_path / "taken").write_text("not a folder")
    with caplog.at_level(logging.ERROR):
        file = LogFile(tmp_path / "taken" / "m.log")
        file.write(["a", "b", "c"])
    assert [record.message.count("cannot write") for record in caplog.records] == [1]


def test_a_full_disk_is_told_once_and_can_be_closed(caplog: pytest.LogCaptureFixture) -> None:
    """What could not be written is still in a buffer, which closing tries to write again."""
    with caplog.at_level(logging.ERROR):
        file = LogFile(Path("/dev/full"))
        file.write(["a", "b", "c"])
        file.close()
    assert [record.message for record in caplog.records] == [
        "cannot write /dev/full: [Errno 28] No space left on device; its lines are in the journal only"
    ]
    assert caplog.records[0].exc_info is None


def test_what_comes_too_fast_is_counted(tmp_path: Path) -> None:
    """An engine in a loop must not keep the disk busy for everybody; what is left out is said."""
    now = 0.0
    file = LogFile(tmp_path / "m.log", clock=lambda: now)
    line = "x" * (BURST // 8 - 1)
    file.write([line] * 10)
    now += 2 * len(line) / RATE
    file.write(["y", line])
    file.close()
    written = [text[:8] for text in (tmp_path / "m.log").read_text().splitlines()]
    assert written == ["xxxxxxxx"] * 8 + ["[2 lines", "y", "xxxxxxxx"]


def test_only_the_last_runs_are_kept(tmp_path: Path) -> None:
    """Each run of an engine without a port has a file of its own name, and crashes can be many."""
    others = ["m_x_m-x-123456.log", "m_33300.log.bak", "n_n-123456.log", "m_other.log"]
    mine = [f"m_m-00000{run}.log" for run in range(RUNS + 2)] + ["m_33300.log"]
    for age, name in enumerate([*mine, *others]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (age, age))
    (tmp_path / f"{mine[0]}.1").write_text("")  # the oldest run was the last to be written
    forget_old_runs(tmp_path, "m")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, mine[0], f"{mine[0]}.1", *mine[-(RUNS - 2) :]}


def test_all_runs_of_a_model_have_a_bound(tmp_path: Path) -> None:
    """Not only each: five runs of a chatty engine are as many files as it may have."""
    for run in range(4):
        for old in range(KEPT + 1):
            file = tmp_path / f"m_3330{run}.log{f'.{old}' if old else ''}"
            with file.open("wb") as hollow:
                hollow.truncate(SIZE)
            os.utime(file, (run, run))
    forget_old_runs(tmp_path, "m")
    assert {file.name.partition(".")[0] for file in tmp_path.iterdir()} == {"m_33303", "m_33302"}


def test_files_of_removed_models_are_bounded_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody starts such a model again, so nobody else would remove them; the newest stay, and what is not ours."""
    monkeypatch.setattr(logfile, "MOST", 250)
    names = ["org_gone_org-gone-0a0a0a.log", "org_gone_org-gone-0a0a0a.log.1", "old_old-0b0b0b.log", "m_m-0c0c0c.log"]
    others = ["backup_2024-aabbcc.log", "gone_else-0a0a0a.log", "notes.txt"]
    for age, name in enumerate([*names, *others]):
        (tmp_path / name).write_text("x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    forget_removed_models(tmp_path, ["m", "new"])
    assert {path.name for path in tmp_path.iterdir()} == {*names[:2], names[3], *others}
