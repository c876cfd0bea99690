"""The store adds up, survives what a disk does, and leaves alone what it does not understand."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vllmd.records import store as store_module
from vllmd.records.store import Question, Store, StoreError
from vllmd.records.sums import DAY, FIELDS, HOUR, MOST_ROWS, Ended, Sums
from vllmd.records.trace import Arrival, Damaged, anonymous, packed, unpacked

NOON = 20_000 * DAY + 12 * HOUR  # 2024-10-04
FOREVER = 9e9
ZERO = dict.fromkeys(FIELDS, 0.0)


def row(**values: float) -> list[float]:
    return list({**ZERO, **values}.values())


def at(hour: float) -> int:
    return int((NOON + hour * HOUR) // HOUR)


def filled(path: Path) -> Store:
    store = Store(path)
    rows = {
        (at(0), "alice", "small"): row(requests=2, prompt=10),
        (at(0), "bob", "small"): row(requests=1, prompt=5),
        (at(13), "alice", "big"): row(requests=1, prompt=100),
    }
    store.write(rows, [], FOREVER, FOREVER)
    store.write({(at(0), "alice", "small"): row(requests=1, prompt=1, errors=1)}, [], FOREVER, FOREVER)
    return store


def asked(store: Store, *by: str, days: float = 30, **more: str) -> list[tuple[object, ...]]:
    question = Question(by, NOON - days * DAY, NOON + 2 * DAY, **more)  # type: ignore[arg-type]
    return sorted((*(each[name] for name in by), each["requests"], each["prompt"]) for each in store.ask(question))


def test_it_adds_up_by_whatever_is_asked(tmp_path: Path) -> None:
    """Hours that come twice are added; days, months and keys are sums of them."""
    store = filled(tmp_path / "usage.db")
    assert asked(store, "key") == [("alice", 4, 111), ("bob", 1, 5)]
    assert asked(store, "model") == [("big", 1, 100), ("small", 4, 16)]
    assert asked(store, "day") == [("2024-10-04", 4, 16), ("2024-10-05", 1, 100)]
    assert asked(store, "hour", "key", days=0) == [
        ("2024-10-04T12:00Z", "alice", 3, 11),
        ("2024-10-04T12:00Z", "bob", 1, 5),
        ("2024-10-05T01:00Z", "alice", 1, 100),
    ]
    assert asked(store, "month", "key") == [("2024-10", "alice", 4, 111), ("2024-10", "bob", 1, 5)]
    assert asked(store, "key", "day", model="small") == [("alice", "2024-10-04", 3, 11), ("bob", "2024-10-04", 1, 5)]
    assert asked(store, "day", key="bob") == [("2024-10-04", 1, 5)]
    assert asked(store) == [(5, 116)]
    assert asked(store, key="nobody") == []
    with pytest.raises(ValueError, match="none of key, model"):
        asked(store, "colour")


def test_old_hours_go_and_days_stay(tmp_path: Path) -> None:
    """As long as the configuration says."""
    store = filled(tmp_path / "usage.db")
    for day in (100, 101, 102):
        store.write({(at(24 * day), "alice", "small"): row(requests=1)}, [], 200 * DAY, FOREVER)
    with sqlite3.connect(tmp_path / "usage.db") as look:
        assert look.execute("SELECT COUNT(*) FROM hours").fetchone() == (3,)
        assert look.execute("SELECT COUNT(*) FROM days").fetchone() == (6,)
    store.write({(at(24 * 103), "alice", "small"): row(requests=1)}, [], 30 * DAY, FOREVER)
    with sqlite3.connect(tmp_path / "usage.db") as look:
        assert look.execute("SELECT COUNT(*) FROM days").fetchone() == (4,)


def test_a_clock_that_was_wrong_for_a_day_has_nothing_deleted(tmp_path: Path) -> None:
    """Years ahead everything is too old; back again, what is too old goes as before."""
    store = filled(tmp_path / "usage.db")
    arrived = [Arrival(int(NOON * 1000), "small", "alice", 1, 1)]
    store.write({(at(1), "alice", "small"): row(requests=1)}, arrived, 400 * DAY, 14 * DAY)
    for hour in (24 * 4000, 24 * 4000 + 1, 24 * 4001):
        store.write({(at(hour), "alice", "small"): row(requests=1)}, [], 400 * DAY, 14 * DAY)
    assert asked(store, "key") == [("alice", 5, 111), ("bob", 1, 5)]
    assert list(store.arrivals(0)) == arrived
    for day in range(2, 18):
        store.write({(at(24 * day), "alice", "small"): row(requests=1)}, [], 10 * DAY, 14 * DAY)
    assert list(store.arrivals(0)) == []
    assert asked(store, "day") == []


def test_a_store_from_the_future_is_left_alone(tmp_path: Path) -> None:
    """Neither written nor read, and one word says so."""
    path = tmp_path / "usage.db"
    filled(path).close()
    with sqlite3.connect(path) as change:
        change.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    store = Store(path)
    for act in (lambda: store.write({(1, "a", "m"): row()}, [], 1, 1), lambda: store.ask(Question(("key",), 0, 1))):
        with pytest.raises(StoreError, match="later vllmd"):
            act()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"this is no database, it never was one" * 200, None])
def test_a_damaged_file_is_put_aside(tmp_path: Path, damage: bytes | None) -> None:
    """What comes is recorded anew, and what there was can be looked into."""
    path = tmp_path / "usage.db"
    filled(path).close()
    whole = path.read_bytes()
    path.write_bytes(damage or whole[:4096] + b"\xff" * 4096 + whole[8192:])
    store = Store(path)
    store.write({(at(0), "alice", "small"): row(requests=7)}, [], FOREVER, FOREVER)
    assert "put aside" in store.began_anew
    assert asked(store, "key") == [("alice", 7, 0)]
    assert (tmp_path / "usage.db.damaged").exists()


def test_a_locked_file_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and the next try writes it."""
    monkeypatch.setattr(store_module, "BUSY", 0.01)
    store = filled(tmp_path / "usage.db")
    store.close()
    other = sqlite3.connect(tmp_path / "usage.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="cannot be used now: database is locked"):
        store.write({(at(0), "carol", "small"): row(requests=1)}, [], FOREVER, FOREVER)
    other.execute("ROLLBACK")
    other.close()
    store.write({(at(0), "carol", "small"): row(requests=1)}, [], FOREVER, FOREVER)
    assert ("carol", 1, 0) in asked(store, "key")


def test_a_full_disk_costs_no_record(tmp_path: Path) -> None:
    """SQLite's own limit stands for it: the same error. What was written before stays whole."""
    store = filled(tmp_path / "usage.db")
    connection = store._open()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    many = {(at(0), f"key{n}", "m" * 200): row(requests=1) for n in range(200)}
    with pytest.raises(StoreError, match="full"):
        store.write(many, [], FOREVER, FOREVER)
    assert asked(store, "key") == [("alice", 4, 111), ("bob", 1, 5)]
    store.write(many, [], FOREVER, FOREVER)  # there is room again: it opens the file anew
    assert len(asked(store, "key")) == 202


def test_no_folder_is_said(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "x").write_text("")
    with pytest.raises(StoreError, match="cannot be used now"):
        Store(tmp_path / "x" / "usage.db").write({(1, "a", "m"): row()}, [], 1, 1)
    with pytest.raises(StoreError, match="nothing has been recorded"):
        Store(tmp_path / "none.db").ask(Question(("key",), 0, 1))


def test_a_kill_in_the_middle_of_writing_leaves_it_sound(tmp_path: Path) -> None:
    """Each batch is there whole or not at all."""
    path = tmp_path / "usage.db"
    program = f"""
        from pathlib import Path
        from vllmd.records.store import Store
        from vllmd.records.sums import FIELDS
        store, hour = Store(Path({str(path)!r})), 480_000
        while True:
            store.write({{(hour, f"k{{n}}", "m"): [1.0] * len(FIELDS) for n in range(20)}}, [], 9e9, 9e9)
            print(flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    store = Store(path)
    store.write({}, [], FOREVER, FOREVER)
    counts = {each["requests"] for each in store.ask(Question(("key",), 479_000 * HOUR, 481_000 * HOUR))}
    assert store.began_anew == ""
    assert len(counts) == 1
    assert counts.pop() >= 5


def ended(at: float = NOON, model: str = "m", key: str = "a", *, seconds: float = 0.0, failed: bool = False) -> Ended:
    """A request of 5 and 7 tokens, 3 of them cached."""
    return at * 1000, model, key, 5, 7, 3, 0, seconds, failed


def test_requests_are_added_up_by_the_hour_in_which_they_came() -> None:
    """By key and model, too; one that came in another hour than those it ends with is not mixed up with them."""
    sums = Sums()
    sums.add([ended(), ended(NOON - 1, failed=True), ended(NOON + 1, key="b"), ended(seconds=2.0), ended(model="n")])
    one = {"requests": 1, "prompt": 5, "answer": 7, "cached": 3}
    assert sums.take() == {
        (at(0) - 1, "a", "m"): row(**one, errors=1),
        (at(0), "a", "m"): row(**{name: 2 * value for name, value in one.items()}, engine_seconds=2.0),
        (at(0), "b", "m"): row(**one),
        (at(0), "a", "n"): row(**one),
    }


def test_what_could_not_be_written_is_kept_within_bounds() -> None:
    """It is added to what comes; where nothing can be written for weeks, the oldest goes."""
    sums = Sums()
    sums.add([ended(seconds=2.0, failed=True)])
    rows = sums.take()
    sums.add([ended(seconds=1.0)])
    sums.put_back(rows)
    both = row(requests=2, errors=1, prompt=10, answer=14, cached=6, engine_seconds=3.0)
    assert sums.take() == {(at(0), "a", "m"): both}
    sums.put_back({(hour, "a", "m"): row() for hour in range(MOST_ROWS + 5)})
    assert (sums.dropped, min(sums.take())) == (5, (5, "a", "m"))


ARRIVALS = [Arrival(1_700_000_000_000 + n * 300, f"m{n % 3}", "alice" if n % 2 else "", n, 200 + n) for n in range(500)]


def test_arrivals_are_small_and_come_back(tmp_path: Path) -> None:
    """In their order, whatever order they were told in; five to eight bytes for each."""
    first, segment = packed(reversed(ARRIVALS))
    assert list(unpacked(first, segment)) == ARRIVALS
    assert len(segment) < 8 * len(ARRIVALS)
    assert packed([(at + 0.25 + n / 1000, *more, "not kept") for n, (at, *more) in enumerate(ARRIVALS)]) == (
        first,
        segment,
    )
    store = Store(tmp_path / "usage.db")
    store.write({}, ARRIVALS, FOREVER, FOREVER)
    assert list(store.arrivals(0)) == ARRIVALS
    assert list(store.arrivals(1_800_000_000)) == []
    for broken in (b"", segment[:20], segment[:-9], b"x" * 100):
        with pytest.raises(Damaged):
            list(unpacked(first, broken))


def test_anonymous_arrivals_have_no_names_and_no_date() -> None:
    """What is left is when, which of them, and how long."""
    found = list(anonymous(ARRIVALS[:4]))
    assert [(each.at, each.model, each.key) for each in found] == [
        (0, "model1", ""), (300, "model2", "key1"), (600, "model3", ""), (900, "model1", "key1"),
    ]  # fmt: skip


def test_a_question_about_much_use_is_answered_soon(tmp_path: Path) -> None:
    """A year of 50 keys and 20 models: days answer, and few of them are looked at. The bound is for what hangs."""
    store = Store(tmp_path / "usage.db")
    rows = {
        (at(24 * day), f"key{key}", f"model{model}"): row(requests=27, prompt=1)
        for day in range(60)
        for key in range(50)
        for model in range(20)
    }
    store.write(rows, [], FOREVER, FOREVER)
    began = time.monotonic()
    found = store.ask(Question(("key",), NOON, NOON + 90 * DAY))
    assert (len(found), sum(each["requests"] for each in found)) == (50, 60 * 1000 * 27)
    assert time.monotonic() - began < 10
