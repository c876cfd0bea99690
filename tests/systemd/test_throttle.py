"""Lines of log that others cause have a rate, and what is left out is counted."""

from __future__ import annotations

import logging

import pytest

from vllmd.systemd.throttle import Throttle


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
