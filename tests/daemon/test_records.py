"""Who watches requests end: a bounded number of them, whatever the rate."""

from __future__ import annotations

from tests.daemon.test_spans import SERVED
from vllmd.daemon.records import MOST_AT_ONCE, Watcher
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.records.ring import Filter


def watcher(caller: Caller = ANYBODY, *, failed: bool = False) -> Watcher:
    return Watcher(Filter(failed=failed), caller)


def test_of_many_requests_a_watcher_is_told_the_newest() -> None:
    """What is wanted is chosen first: a failed request is not pushed out by those that nobody asked for."""
    every, failures = watcher(), watcher(failed=True)
    failed = SERVED._replace(number=0, status=502, error="UpstreamFailed")
    for each in (failed, *(SERVED._replace(number=number) for number in range(1, 10 * MOST_AT_ONCE))):
        every.offer(each)
        failures.offer(each)
    assert [entry.number for entry in every.take_all()] == list(range(9 * MOST_AT_ONCE, 10 * MOST_AT_ONCE))
    assert [entry.number for entry in failures.take_all()] == [0]
    assert every.take_all() == []


def test_a_watcher_hears_of_nothing_that_it_may_not_see() -> None:
    """A key sees its own requests only."""
    stranger = watcher(Caller("bob"))
    stranger.offer(SERVED)
    assert stranger.take_all() == [] and not stranger.has_entries.is_set()
