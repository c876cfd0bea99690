"""Dates are by the wall clock as it was then, whatever became of it since."""

from __future__ import annotations

from vllmd.daemon.dates import NOTED, Dates


def test_a_date_stays_when_the_clock_is_set_and_when_the_machine_was_suspended() -> None:
    """In a suspension the monotonic clock stands still: the wall clock is further ahead of it afterwards."""
    wall = [1000.0]
    dates = Dates(lambda: wall[0], lambda: 10.0)
    assert dates.of(4.0) == 994.0
    assert dates.note(10.0, 10.5) == 999.5
    wall[0] += 7200
    assert dates.note(11.0, 11.0) == 8200.0
    wall[0] -= 86400
    assert dates.note(12.0, 12.0) == 1000.0 + 7200 - 86400
    assert [dates.of(at) for at in (10.0, 11.0, 12.0)] == [999.5 + 0.5, 8200.0, 1000.0 + 7200 - 86400]


def test_what_an_earlier_daemon_noted_with_a_date_keeps_it() -> None:
    """The clock has been put forward twice before this daemon began; what happened between goes by what was noted."""
    dates = Dates(lambda: 9000.0, lambda: 1000.0)
    dates.learn(500.0, 600.0)
    dates.learn(200.0, 250.0)
    assert [dates.of(at) for at in (100.0, 200.0, 499.0, 500.0, 999.0)] == [150.0, 250.0, 549.0, 600.0, 1099.0]
    assert dates.of(1000.0) == dates.note(1000.0, 1000.0) == 9000.0


def test_a_clock_that_is_set_all_the_time_fills_no_memory() -> None:
    """What is older has a date that is about right."""
    wall = [0.0]
    dates = Dates(lambda: wall[0], lambda: 0.0)
    for number in range(3 * NOTED):
        wall[0] = 100.0 * number
        dates.note(float(number), float(number))
    assert dates.of(3.0 * NOTED) == wall[0] + 1
    assert dates.of(0.0) > 0
