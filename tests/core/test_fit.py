"""Does it fit: what an engine needs of a device beside what each device has for it. One row per answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.helpers import PAIR, model
from vllmd.core.costs import CostBook
from vllmd.core.fit import Fit, freed_asleep, need
from vllmd.core.ledger import Ledger
from vllmd.core.model import Model, Replica
from vllmd.core.types import Device, Placement, State, WhenFree
from vllmd.sizes import GiB


def replica(name: str, gib: int, **fields: Any) -> Replica:
    spec = model(name, gib, **fields)
    return Replica(Model(spec), spec.replicas[0], CostBook(), 0.0)


class Machine:
    """Two devices of 80 GiB, and who holds what there."""

    def __init__(self, devices: tuple[Device, ...] = PAIR) -> None:
        self.ledger = Ledger(devices, 0)
        self.replicas: dict[str, Replica] = {}
        self.fit = Fit(self.ledger, self.replicas.values(), {})

    def add(self, r: Replica, state: State = State.STOPPED, gib: int = 0, *devices: int) -> Replica:
        r.state, r.placement = state, Placement(devices)
        self.replicas[r.id] = r
        self.ledger.hold(r, dict.fromkeys(devices, gib * GiB))
        return r


def gib(supply: Any) -> dict[int, int]:
    return {index: -1 if size < 0 else size // GiB for index, size in supply.items()}


@pytest.mark.parametrize(
    ("fields", "others", "takes"),
    [
        ({}, 79, 50),  # whoever else is there: the ledger says whether there is room
        ({"when_free": WhenFree(10 * GiB, {})}, 9, 50),
        ({"when_free": WhenFree(10 * GiB, {})}, 10, None),
        ({"when_free": WhenFree(20 * GiB, {0.9: 0.5, 0.8: 0.25})}, 8, 40),
        ({"when_free": WhenFree(20 * GiB, {0.9: 0.5, 0.8: 0.25})}, 16, 20),
        ({"when_free": WhenFree(20 * GiB, {0.9: 0.5, 0.8: 0.25})}, 17, None),
    ],
)
def test_what_a_start_takes_of_a_device(fields: dict[str, Any], others: int, takes: int | None) -> None:
    """By its footprint, or the share that others leave it."""
    size = need(replica("m", 50, **fields), Machine().ledger.accounts[0], others * GiB)
    assert size == (None if takes is None else takes * GiB)


def test_the_supplies_of_a_device() -> None:
    """Alone, beside some, beside what must stay, now; what it holds itself is its own; an avoided one has nothing."""
    m = Machine()
    idle = m.add(replica("idle", 30), State.READY, 30, 0)
    pinned = m.add(replica("pinned", 20), State.READY, 20, 1)
    pinned.pinned = True
    m.ledger.set_external({0: 5 * GiB}, now=1.0)
    assert gib(m.fit.alone()) == {0: 80, 1: 80}
    assert gib(m.fit.beside([pinned])) == {0: 80, 1: 60}
    assert gib(m.fit.beside_kept(idle)) == {0: 75, 1: 60}
    assert gib(m.fit.beside_kept(pinned)) == {0: 75, 1: 80}
    assert gib(m.fit.now(idle)) == {0: 75, 1: 60}
    assert gib(m.fit.now(pinned)) == {0: 45, 1: 80}
    m.ledger.accounts[1].drained = "by an operator"
    assert gib(m.fit.beside_kept(idle)) == {0: 75, 1: -1}
    assert gib(m.fit.now(idle)) == {0: 75, 1: -1}
    assert gib(freed_asleep(m.ledger, idle, GiB)) == {0: 29}
    assert freed_asleep(m.ledger, pinned, GiB) == {}


@pytest.mark.parametrize(
    ("size", "count", "devices", "never"),
    [
        (80, 1, (), ""),
        (81, 1, (), "needs 81 GiB on 1 device; devices 0, 1 have 80 GiB"),
        (10, 3, (), "needs 3 devices, and there are 2 for it"),
        (10, 1, (7,), "needs 1 device, and there are none for it"),
        (500, 0, (), ""),
    ],
)
def test_what_can_never_fit(size: int, count: int, devices: tuple[int, ...], never: str) -> None:
    """With the arithmetic; "" if it can."""
    m = Machine()
    why = m.fit.never(m.add(replica("m", size, device_count=count, devices=devices)))
    assert never in why and bool(never) == bool(why)


def test_a_sleeper_is_stuck_only_if_it_could_start_elsewhere() -> None:
    """Beside what must stay it cannot wake where it is."""
    m = Machine()
    sleeper = m.add(replica("sleeper", 60), State.SLEEPING, 1, 0)
    pinned = m.add(replica("pinned", 40), State.READY, 40, 0)
    assert m.fit.stuck([sleeper]) == {}
    pinned.pinned = True
    assert m.fit.stuck([sleeper]) == {sleeper: "it cannot wake on device 0, and can start elsewhere"}
    m.ledger.accounts[1].drained = "by an operator"
    assert m.fit.stuck([sleeper]) == {}


def test_who_has_room_now() -> None:
    """A start needs its booking, a sleeper what it holds awake; neither on a device that is avoided."""
    m = Machine()
    m.add(replica("large", 50), State.READY, 50, 0)
    sleeper = m.add(replica("sleeper", 31), State.SLEEPING, 1, 0)
    assert not m.fit.has_room(sleeper)
    assert not m.fit.has_room_on(sleeper, (0,))
    assert m.fit.shortage(sleeper, (0,)) == "device 0 has 29 GiB of 30 GiB needed"
    new = m.add(replica("new", 40))
    assert m.fit.has_room(new)
    assert [m.fit.has_room_on(new, (index,)) for index in (0, 1)] == [False, True]
    m.ledger.wedge({1: GiB})
    assert not m.fit.has_room(new)
