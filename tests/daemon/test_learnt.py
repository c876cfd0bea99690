"""The cache of learnt figures: kept whole or not at all, and never believed blindly."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.api.answers import Decision
from vllmd.core.costs import CostBook
from vllmd.core.types import Footprint, ReplicaSpec, Source
from vllmd.daemon.last_starts import Start
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.main import learnt_of
from vllmd.sizes import GiB


def learnt(path: Path | None) -> Learnt:
    cache = Learnt(path)
    cache.load()
    return cache


def test_what_was_learnt_is_there_the_next_time(tmp_path: Path) -> None:
    """Through the file and the core's own cost book."""
    spec = ReplicaSpec("m", Footprint(20 * GiB, 20 * GiB), settings="s")
    book = CostBook()
    book.open(spec).footprint = Footprint(22 * GiB, 21 * GiB, GiB, 0, Source.MEASURED)
    cache = learnt(tmp_path / "learnt.json")
    cache.costs = book.to_dict()
    cache.save()
    retry = CostBook.from_dict(learnt(tmp_path / "learnt.json").costs)
    assert retry.open(spec).footprint == Footprint(22 * GiB, 21 * GiB, GiB, 0, Source.MEASURED)


def test_the_phases_of_a_start_keep_their_order(tmp_path: Path) -> None:
    """That in which they passed: so the next daemon shows them, too."""
    cache = learnt(tmp_path / "learnt.json")
    cache.starts.note("m", Start(3.0, {"process": 0.1, "imports": 2.0, "compile": 0.9}))
    cache.save()
    (last,) = learnt(tmp_path / "learnt.json").starts.values()
    assert list(last.phases) == ["process", "imports", "compile"]


def test_other_settings_forget_what_was_measured(tmp_path: Path) -> None:
    """Else a model made smaller could be refused for ever for what it once took."""
    book = CostBook()
    footprint = Footprint(20 * GiB, 20 * GiB)
    book.open(ReplicaSpec("m", footprint, settings="long")).footprint = Footprint(90 * GiB, 90 * GiB)
    retry = CostBook.from_dict(book.to_dict())
    assert retry.open(ReplicaSpec("m", footprint, settings="short")).footprint is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"costs": 3}', '{"costs": null}', "\x00\xff", '{"other": {}}']
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and everything is learnt anew."""
    path = tmp_path / "learnt.json"
    path.write_text(text)
    cache = learnt(path)
    assert cache.costs == {}
    assert "it is damaged" in caplog.text
    cache.costs = {"m": {}}
    cache.save()
    assert learnt(path).costs == {"m": {}}


def test_figures_that_cannot_be_are_passed_over() -> None:
    """Negative memory would make room out of nothing."""
    damaged = {"m": {"seconds": {}, "of": "", "asked": 0, "footprint": [-1, 5, 0, 0]}}
    assert CostBook.from_dict(damaged).open(ReplicaSpec("m", Footprint(1, 1))).footprint is None


def test_a_folder_that_cannot_be_written_costs_only_the_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full or read-only disk must not take the daemon down; the status says it until it is over."""
    (tmp_path / "file").touch()
    cache = learnt(tmp_path / "file" / "learnt.json")
    cache.costs = {"m": {}}
    cache.save()
    told = f"learnt figures cannot be kept in {tmp_path}/file/learnt.json: "
    assert told in caplog.text
    assert cache.trouble.startswith(told)
    (tmp_path / "file").unlink()
    cache.save()
    assert cache.trouble == ""


def test_without_a_folder_nothing_is_kept() -> None:
    """By hand, without systemd, there may be none."""
    cache = learnt(None)
    cache.costs = {"m": {}}
    cache.save()
    assert learnt(None).costs == {}


def test_a_daemon_without_a_unit_remembers_in_the_users_cache(tmp_path: Path) -> None:
    """So the second ``vllmd serve`` knows how long a start takes."""
    assert learnt_of({"HOME": "/home/me"}) == Path("/home/me/.cache/vllmd/learnt.json")
    assert learnt_of({"HOME": "/home/me", "XDG_CACHE_HOME": "/c"}) == Path("/c/vllmd/learnt.json")
    assert learnt_of({"HOME": "/home/me", "VLLMD_LEARNT": ""}) is None
    cache = learnt(tmp_path / "not" / "yet" / "there.json")
    cache.costs = {"m": {}}
    cache.save()
    assert learnt(tmp_path / "not" / "yet" / "there.json").costs == {"m": {}}


def test_what_was_decided_and_which_engines_ran_outlives_the_daemon(tmp_path: Path) -> None:
    """Why a model stands as it does is asked after an idle exit, too; the same decision again counts once."""
    cache = learnt(tmp_path / "learnt.json")
    for at in range(9):
        cache.decided(Decision(float(at), "evict", "m", "room" if at < 7 else f"{at}"))
    for number in range(5):
        cache.ended("m", f"m-{number:06}")
    cache.save()
    again = learnt(tmp_path / "learnt.json")
    assert [(each.at, each.why) for each in again.decisions["m"]] == [(6.0, "room"), (7.0, "7"), (8.0, "8")]
    assert [instance for instance, _ in again.runs["m"]] == ["m-000002", "m-000003", "m-000004"]
