"""Lines of log that others cause have a rate, and what is left out is counted."""

from __future__ import annotations

import logging

import pytest

from vllmd.systemd.throttle import Repeated, Throttle


def test_a_flood_is_a_few_lines_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left out unsaid, and what comes at a human pace is all there."""
    now, logger = 0.0, logging.getLogger("test.throttle")
    throttle = Throttle(logger, burst=2, period=60.0, clock=lambda: now)
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            throttle.say(logging.INFO, "refused %d", number)
        assert caplog.messages == ["refused 0", "refused 1"]
        now = 30.0
        throttle.say(logging.INFO, "refused %d", 1000, fields={"MODEL": "m"})
        assert caplog.messages[2:] == ["998 more lines were left out, the last: refused 999", "refused 1000"]
        assert caplog.records[-1].journal == {"MODEL": "m"}  # type: ignore[attr-defined]
        now = 1000.0
        for number in range(3):
            throttle.say(logging.INFO, "refused %d", number)
        assert caplog.messages[4:] == ["refused 0", "refused 1"]
        throttle.flush()
        throttle.flush()
        assert caplog.messages[6:] == ["1 more lines were left out, the last: refused 2"]


def test_a_level_that_is_not_logged_counts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody would have read has not been left out."""
    throttle = Throttle(logging.getLogger("test.throttle"), burst=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            throttle.say(logging.INFO, "x")
        throttle.flush()
    assert caplog.messages == []


def test_what_is_tried_again_and_again_is_said_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A launcher that is away for a day is no 86,400 lines; another reason is said at once."""
    now = 0.0
    repeated = Repeated(logging.getLogger("test"), clock=lambda: now)
    with caplog.at_level(logging.ERROR):
        for _ in range(24 * 3600):
            repeated.say(logging.ERROR, "cannot reach %s", "it")
            now += 1
        repeated.say(logging.ERROR, "cannot reach %s", "another")
        repeated.over()
        repeated.say(logging.ERROR, "cannot reach %s", "another")
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == ["cannot reach it", "cannot reach it (60 times more)", "cannot reach it (120 times more)"]
    assert said[-2:] == ["cannot reach another"] * 2
    assert len(said) < 40
