"""What ``make bench-check`` lets pass, and what not."""

from __future__ import annotations

from tests.bench.check import CALLS, JSON, newest, with_table, worse

HEAD = "# Figures\n\nWords.\n\n"


def test_the_newest_table_is_the_base() -> None:
    """A table goes before the others, and is read again as it was written."""
    once = with_table(HEAD, {CALLS: 123, JSON: 1.25}, "2026-11-28 18:00")
    twice = with_table(once, {CALLS: 100, JSON: 1.5}, "2026-11-29 18:00")
    assert newest(once) == {CALLS: 123, JSON: 1.25}
    assert newest(twice) == {CALLS: 100, JSON: 1.5}
    assert twice.startswith(HEAD)
    assert twice.index("11-29") < twice.index("11-28")


def test_noise_passes_and_a_regression_does_not() -> None:
    """Of a count hardly anything is noise, of a time half; what is new, or cheaper, is no regression."""
    was = {CALLS: 100.0, JSON: 1.0}
    assert worse(was, {CALLS: 102.0, JSON: 1.5}) == worse(was, {CALLS: 50.0}) == worse({}, was) == []
    assert len(worse(was, {CALLS: 103.0, JSON: 1.6})) == 2
