"""The policy's shortcuts change no decision: held equal to the plain search in random situations."""

from __future__ import annotations

import random
from collections.abc import Iterable
from unittest.mock import patch

import pytest

from tests.core.helpers import PAIR, by_device, model
from tests.core.world import World
from vllmd.core.commands import SleepEngine
from vllmd.core.policies import Adaptive, _Turns
from vllmd.core.policy import (
    INFINITY,
    DeviceSupply,
    Knobs,
    Move,
    OffloadOption,
    Plan,
    PolicyInput,
    Resident,
    Waiting,
)
from vllmd.core.types import IdleRules

NOW = 1000.0


def resident(rng: random.Random, name: str, devices: int) -> Resident:
    """Asleep, idle or busy; some can be frozen, or have a drain limit."""
    asleep, size = rng.random() < 0.4, rng.choice((5, 10, 20, 40))
    takes, back = rng.choice(((0.1, 0.3), (3.0, 2.0), (3.0, 40.0)))
    stop = OffloadOption(0, rng.choice((1, 9)) if asleep else size, takes, back, rng.choice((0.0, takes)))
    nap = OffloadOption(1, size - 1, rng.choice((0.1, 1.0)), 1.0, rng.choice((0.0, 1.0)))
    busy = not asleep and rng.random() < 0.6
    return Resident(
        model=name,
        devices=tuple(sorted(rng.sample(range(devices), rng.choice((1, 1, 1, min(2, devices)))))),
        asleep=asleep,
        options=(stop,) if asleep else (nap, stop),
        since=NOW - rng.choice((0.5, 5.0, 500.0)),
        used=NOW - rng.choice((0.0, 5.0, 500.0)),
        running=rng.choice((1, 2, 5)) if busy else 0,
        queued=0,
        service=4.0,
        rate=rng.choice((0.0, 0.02, 1.0)),
        rate_long=rng.choice((0.0, 0.05)),
        rate_at=NOW,
        freezable=rng.random() < 0.1,
        refrozen=False,
        priority=rng.choice((1.0, 1.0, 5.0)),
        drain_limit=rng.choice((INFINITY, INFINITY, INFINITY, 10.0)),
        began=NOW - 3.0 if busy else INFINITY,
        need=size,
        allowed=tuple(range(devices)),
    )


def waiting(rng: random.Random, name: str, devices: int) -> Waiting:
    """A sleeper where it sleeps, which may be able to move, or one that can start anywhere."""
    count, age, need = rng.choice((1, 1, 6)), rng.choice((0.0, 1.0, 20.0, 70.0, 200.0)), rng.choice((4, 9, 19, 39))
    span = rng.choice((1, 1, 1, min(2, devices)))
    where = tuple(sorted(rng.sample(range(devices), span))) if rng.random() < 0.8 else tuple(range(devices))
    stop = OffloadOption(0, 1, 3.0, 20.0)
    moves = rng.random() < 0.3
    learnt = rng.choice((0.0, 23.0)) if moves else 0.0
    load = rng.choice((0.5, 1.0, 30.0))
    here = Waiting(
        model=name,
        waiters=count,
        arrived=count * (NOW - age),
        oldest=NOW - age,
        load=load,
        sleep=1.0,
        service=4.0,
        need=need,
        devices=where,
        span=span,
        priority=rng.choice((1.0, 1.0, 3.0)),
        impatient=rng.random() < 0.1,
        learnt=rng.choice((0.0, load)),
    )
    there = here._replace(load=23.0, learnt=learnt, devices=tuple(range(devices)))
    return here._replace(move=Move(stop, there)) if moves and len(where) == span else here


def situation(rng: random.Random) -> PolicyInput:
    """One to four devices, more or less full."""
    count = rng.choice((1, 2, 4))
    supplies = {}
    for index in range(count):
        free, claimed = rng.choice((-3, 0, 0, 4, 20)), rng.random() < 0.2
        busy = rng.choice((0.0, 0.0, NOW + 0.5, NOW + 2.5, NOW + 30.0))
        supplies[index] = DeviceSupply(index, free, free + rng.choice((0, 10, 40, 80)), busy, claimed, 2.0 * claimed)
    residents = [resident(rng, f"r{n}", count) for n in range(rng.randrange(9))]
    waiters = [waiting(rng, f"w{n}", count) for n in range(rng.randrange(1, 6))]
    return PolicyInput(NOW, sorted(waiters, key=lambda w: (w.oldest, w.model)), by_device(residents), supplies, Knobs())


def plain(s: PolicyInput) -> Plan | None:
    """The same policy with every search made in full."""

    def everybody(self: _Turns, w: Waiting) -> Iterable[Resident]:
        return self.s.on(w.devices)

    with (
        patch.object(_Turns, "must_wait", lambda self, w: False),
        patch.object(_Turns, "closed", lambda self, w: False),
        patch.object(_Turns, "_on", everybody),
    ):
        return Adaptive().choose(s)


@pytest.mark.parametrize("block", range(4))
def test_no_shortcut_changes_a_decision(block: int) -> None:
    """Two thousand situations in all; most have a plan, and many have none."""
    rng, plans, rested = random.Random(block), 0, 0
    for _ in range(500):
        s = situation(rng)
        expected = plain(s)
        assert Adaptive().choose(s) == expected, s
        plans += expected is not None
        rested += expected is not None and expected.why.startswith("those that sleep there")
    assert 150 < plans < 450
    assert rested > 1


class Counting(Adaptive):
    """Counts how often it is asked."""

    asked = 0

    def choose(self, s: PolicyInput) -> Plan | None:
        self.asked += 1
        return super().choose(s)


def test_what_happens_on_a_device_is_no_news_for_who_cannot_come_up_there() -> None:
    """Nobody is looked at anew because an engine on another device falls idle; on its own the swap begins at once."""
    policy = Counting()
    models = [model("a", 70, devices=(0,)), model("b", 70, devices=(1,)), model("w", 70, devices=(0,))]
    w = World(models, PAIR, policy=policy)
    for name in ("a", "b"):
        w.ask(f"load-{name}", name)
        w.answer(name)
    w.ask("r", "w")
    before = policy.asked
    w.finish("load-b")
    assert policy.asked == before
    (sleep,) = w.finish("load-a")
    assert isinstance(sleep, SleepEngine)
    assert policy.asked > before


def whole_story(block: int, *, short: bool) -> tuple[object, ...]:
    """What the core said and shows: requests come and go to two models that serve and one that has to come up."""
    rng = random.Random(block)
    at_once = IdleRules(sleep_after=0.0)
    models = [
        model("a", 20, idle=IdleRules(sleep_after=5.0)),
        model("b", 20, concurrency=2),
        model("c", 20, idle=at_once),
    ]
    w, said = World(models, PAIR), []
    w.short_way = short
    for number in range(200):
        w.now += rng.choice((0.0, 0.01, 1.0, 7.0))
        if w.running and rng.random() < 0.5:
            said.append(w.finish(rng.choice(sorted(w.running))))
        else:
            said.append(w.ask(f"r{number}", rng.choice("aaabbbc")))
        said.extend(w.answer(name) for name in list(w.pending) if rng.random() < 0.7)
    s = w.scheduler
    assert bool(w.shortened) is short
    return said, s.snapshot(w.now), s.next_timer(), s.costs.to_dict(), {r.id: (r.due, r.used) for r in s.core.active}


@pytest.mark.parametrize("block", range(4))
def test_the_short_way_of_a_request_leads_to_the_same_as_the_events(block: int) -> None:
    """In bursts and after rests, to models that serve and to one that has to come up, with idle rules and limits."""
    assert whole_story(block, short=True) == whole_story(block, short=False)
