"""A minute or two of what `make soak` does for an hour."""

from __future__ import annotations

import time

import pytest

from tests.machine.container import Machine
from tests.soak.blows import QUICK
from tests.soak.chaos import Soak

pytestmark = pytest.mark.machine


def test_nothing_is_lost_in_a_while_of_kills_stops_and_restarts(installed_machine: Machine) -> None:
    """No orphan, no scope without a process, no byte promised that nobody holds, no client that waits for ever."""
    soak, end = Soak(installed_machine, seed=13, blows=QUICK, kills=(1, 2, 3)), time.monotonic() + 70
    while time.monotonic() < end:
        soak.round()
    assert soak.ends["200"] > 0, soak.table()
