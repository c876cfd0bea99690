"""When a daemon that systemd activated exits: when nobody has wanted anything of it for long enough."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from tests.daemon.test_dispatcher import StillLoop
from vllmd.daemon.changes import Changes
from vllmd.daemon.chores import Chores
from vllmd.daemon.idle_exit import IdleExit


def test_it_ends_when_idle_for_long_enough() -> None:
    """Not before, and never where it is switched off."""
    exit = IdleExit(born=100.0)
    assert not exit.due(109.9, 10.0, busy=False, accepted=0)
    assert not exit.due(110.0, None, busy=False, accepted=0)
    assert exit.due(110.0, 10.0, busy=False, accepted=0)


def test_use_begins_the_time_anew() -> None:
    """From the last look at which it was in use."""
    exit = IdleExit(born=0.0)
    assert not exit.due(50.0, 10.0, busy=True, accepted=0)
    assert not exit.due(59.9, 10.0, busy=False, accepted=0)
    assert exit.due(60.0, 10.0, busy=False, accepted=0)


def test_connections_between_two_looks_keep_it_awake() -> None:
    """Refused requests too: each would start it anew, and it would never rest."""
    exit = IdleExit(born=0.0)
    for look in range(1, 100):
        assert not exit.due(float(look), 0.5, busy=False, accepted=look)
    assert exit.due(100.0, 0.5, busy=False, accepted=99)


def test_it_lives_a_second_at_least() -> None:
    """Or a short idle_exit would look like a crash loop to systemd, which then starts it no more."""
    exit = IdleExit(born=0.0)
    assert not exit.due(0.9, 0.0, busy=False, accepted=0)
    assert exit.due(1.0, 0.0, busy=False, accepted=0)


class Idle(SimpleNamespace):
    """A part of the daemon in which nothing goes on, but for what is said."""

    def __getattr__(self, name: str) -> Idle:
        return Idle()

    def __bool__(self) -> bool:
        return False


class There(Idle):
    """One that is there."""

    def __bool__(self) -> bool:
        return True


def chores_of(front: Idle, *, activated: bool, born: float, notify: object = None) -> Chores:
    """The chores of a daemon that is nothing but this front end, since ``born``."""
    awake = SimpleNamespace(passed=float)
    return Chores(front, notify, asyncio.Event(), activated=activated, born=born, slept_time=awake)  # type: ignore[arg-type]


@pytest.mark.parametrize(("connections", "requests", "exits"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_it_stays_while_somebody_is_connected(connections: int, requests: int, exits: bool) -> None:
    """A client that keeps its connection, or waits for an answer, would see it break."""
    config = SimpleNamespace(server=SimpleNamespace(idle_exit=1.0))
    front = Idle(
        gate=SimpleNamespace(requests=requests),
        listeners=SimpleNamespace(connections=connections, accepted=0),
        current=SimpleNamespace(config=config),
    )
    assert chores_of(front, activated=True, born=time.monotonic() - 100.0).may_exit(None) is exits


@pytest.mark.parametrize(("orders", "exits"), [(False, True), (True, False)])
def test_it_stays_while_there_are_orders_that_only_it_remembers(orders: bool, exits: bool) -> None:
    """The next daemon would put models on a drained device, and have a pinned one evicted."""
    config = SimpleNamespace(server=SimpleNamespace(idle_exit=1.0))
    front = Idle(
        gate=SimpleNamespace(requests=0),
        listeners=SimpleNamespace(connections=0, accepted=0),
        current=SimpleNamespace(config=config),
        back=SimpleNamespace(now=Idle(dispatcher=Idle(scheduler=SimpleNamespace(holds_orders=orders)))),
    )
    assert chores_of(front, activated=True, born=time.monotonic() - 100.0).may_exit(None) is exits


class Ticking:
    """A daemon's ticks, on a clock that stands still; nothing is loaded."""

    def __init__(self, *, idle_exit: float | None = None, connections: int = 0, activated: bool = False) -> None:
        self.loop, self.looks = StillLoop(), list[float]()
        self.changes = Changes(*[Idle()] * 4)
        server = SimpleNamespace(idle_exit=idle_exit)
        standbys = SimpleNamespace(in_use=False, review=lambda **told: None)
        back = There(activity=self._look, engines=SimpleNamespace(processes={}, standbys=standbys))
        front = Idle(
            back=SimpleNamespace(now=back),
            changes=self.changes,
            gate=SimpleNamespace(requests=0),
            store=SimpleNamespace(active=False),
            listeners=SimpleNamespace(connections=connections, accepted=0),
            current=SimpleNamespace(broken="", config=SimpleNamespace(server=server, models={})),
        )
        notify = SimpleNamespace(watchdog=int, status=str, watchdog_interval=15.0)
        self.chores = chores_of(front, activated=activated, born=0.0, notify=notify)

    def _look(self) -> SimpleNamespace:
        self.looks.append(self.loop.time())
        return SimpleNamespace(replicas=(), devices=(), host_standbys=0)

    def play(self, script: Callable[[], Awaitable[None]]) -> None:
        """Run it beside the ticks."""

        async def all_of_it() -> None:
            ticks = asyncio.ensure_future(self.chores.run())
            await script()
            assert not ticks.done()
            ticks.cancel()

        self.loop.run_until_complete(all_of_it())
        self.loop.close()


@pytest.mark.parametrize(("connections", "looks"), [(0, [1, 1, 2, 3]), (1, [1, 2, 3, 4])], ids=["at rest", "in use"])
def test_at_rest_it_looks_only_when_the_watchdog_wants_it_or_something_happens(
    connections: int, looks: list[int]
) -> None:
    """Ten wake-ups a minute, not sixty; with somebody connected there is something to see each second."""
    ticking, counts = Ticking(connections=connections), list[int]()

    async def script() -> None:
        for clock in (100.0, 101.0):
            await ticking.loop.until(clock)
            counts.append(len(ticking.looks))
        ticking.changes.mark_changed()
        await ticking.loop.until(102.0)
        counts.append(len(ticking.looks))
        await ticking.loop.until(117.0)
        counts.append(len(ticking.looks))

    ticking.play(script)
    assert counts == looks


def test_it_exits_once(caplog: pytest.LogCaptureFixture) -> None:
    """Told to stop a second time it would break off whoever connects while it ends: a client of the next daemon's."""
    ticking = Ticking(idle_exit=1.0, activated=True)

    async def script() -> None:
        for clock in (100.0, 101.0, 102.0):
            await ticking.loop.until(clock)

    with caplog.at_level(logging.INFO):
        ticking.play(script)
    assert len(ticking.looks) == 3
    assert caplog.messages == ["nothing is loaded and nobody is connected: exiting until the next connection"]
