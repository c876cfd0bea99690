"""The cycle collector stays out of the way of requests that are under way."""

from __future__ import annotations

import gc

from vllmd.daemon import collector


def test_what_a_hundred_requests_are_made_of_is_not_looked_at_while_they_last() -> None:
    """It frees nothing: what they are made of goes as they end."""
    was = gc.get_threshold()
    try:
        collector.exempt_existing()
        gc.collect(0)
        looked = gc.get_stats()[0]["collections"]
        under_way = [[number] for number in range(5000)]
        assert gc.get_stats()[0]["collections"] == looked
        assert len(under_way) == 5000
    finally:
        gc.set_threshold(*was)
        gc.unfreeze()
