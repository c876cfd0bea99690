"""The moments at which time alone changes something: the first one is always known, however often they move."""

from __future__ import annotations

import random

from tests.core.helpers import model
from vllmd.core.costs import CostBook
from vllmd.core.model import INFINITY, Model, Replica
from vllmd.core.timers import Timers


def replicas(number: int) -> list[Replica]:
    spec = model("m")
    return [Replica(Model(spec), spec.replicas[0], CostBook(), 0.0) for _ in range(number)]


def test_the_first_moment_is_that_of_a_look_at_all() -> None:
    """Put off, moved forward, taken away: after each change, over a thousand of them."""
    chance, timers, some = random.Random(7), Timers(), replicas(5)
    for _ in range(1000):
        timers.set(chance.choice(some), chance.choice([INFINITY, *map(float, range(20))]))
        assert timers.due == min(r.due for r in some)


def test_a_replica_that_is_used_again_and_again_takes_no_more_room() -> None:
    """Each request puts its idle rule off; what it said before is not kept for minutes."""
    timers, (r,) = Timers(), replicas(1)
    for request in range(1000):
        timers.set(r, INFINITY)
        assert timers.due == INFINITY
        timers.set(r, 300.0 + request)
        assert timers.due == 300.0 + request
    assert len(timers) == 1


def test_whose_moment_has_come_is_told_in_order_until_it_gets_another() -> None:
    """One that nobody puts off is told again: the scheduler looks at it, and then it gets its next moment."""
    timers, (a, b, c) = Timers(), replicas(3)
    for r, due in ((a, 3.0), (b, 2.0), (c, 9.0)):
        timers.set(r, due)
    assert timers.expired(1.0) == []
    assert timers.expired(3.0) == [b, a]
    assert timers.expired(3.0) == [b, a]
    timers.set(b, INFINITY)
    timers.set(a, 5.0)
    assert timers.expired(4.0) == []
    assert timers.due == 5.0
