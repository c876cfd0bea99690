"""An engine's output in a file of its own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllmd.daemon.logfile import KEPT, SIZE, LogFile, path_of


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
    file = LogFile(tmp_path / "m.log")
    file.write(["x" * (SIZE // 2)] * (2 * KEPT + 6))
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
