"""Several devices: a sleeper serves where it serves soonest, and models that fit together come to rest."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tests.core.helpers import NEVER, PAIR, model
from tests.core.world import World
from vllmd.core.commands import SleepEngine, StartEngine, StopEngine
from vllmd.core.events import EngineAdopted
from vllmd.core.policies import Adaptive, Lru
from vllmd.core.policy import Plan, Policy, PolicyInput
from vllmd.core.types import Device, Footprint, ModelSpec, Placement, Settings, State, single
from vllmd.simulate.baselines import ALL
from vllmd.simulate.physics import Physics
from vllmd.simulate.trace import Row
from vllmd.simulate.world import Machine, Warm, simulate
from vllmd.simulate.world import World as Clock
from vllmd.sizes import GiB

TIMES = {"start": 2.0, "stop": 0.5, "wake1": 0.2, "wake2": 0.4, "sleep1": 0.2, "sleep2": 0.2}
POLICIES = [Adaptive(), Lru()]


def both_on_device_0(policy: str, **fields: float) -> World:
    """``a`` serves on device 0, ``c`` sleeps there, device 1 is empty."""
    w = World([model("a"), model("c", **fields)], PAIR, Settings(policy=policy, host_memory=100 * GiB))
    w.do(EngineAdopted("a", Placement((0,)), State.READY, 0))
    w.do(EngineAdopted("c", Placement((0,)), State.SLEEPING, 2))
    return w


@pytest.mark.parametrize("policy", ["adaptive", "lru"])
def test_a_sleeper_beside_a_busy_model_starts_where_there_is_room(policy: str) -> None:
    """It waited for 121 s and longer beside an empty device."""
    w = both_on_device_0(policy, start_time=2.0)
    w.ask("long", "a")
    w.pass_time(20.0)
    commands = [*w.ask("r", "c"), *w.pass_time(23.0)]
    assert commands == [StopEngine("c", commands[0].reason, False)]  # type: ignore[union-attr]
    assert next(c for c in w.answer("c") if isinstance(c, StartEngine)).placement.devices == (1,)
    w.answer("c")
    assert w.running["r"] == "c" and w.running["long"] == "a"


def test_a_start_that_takes_long_is_not_begun_for_a_victim_that_will_soon_be_idle() -> None:
    """Forty seconds elsewhere, or some five here: compared by what the waiters pay."""
    w = both_on_device_0("adaptive", start_time=40.0)
    w.ask("short", "a")
    assert w.ask("r", "c") == []
    assert [type(c) for c in w.finish("short")] == [SleepEngine]


@pytest.mark.parametrize("policy", ["adaptive", "lru"])
def test_two_that_are_asked_in_turn_swap_once(policy: str) -> None:
    """They swapped thirty times beside an empty device: the one that had to leave moves there while nobody waits."""
    w = both_on_device_0(policy, start_time=40.0)
    swaps = 0
    for n in range(20):
        name = "ca"[n % 2]
        w.now += 5.0
        swaps += any(isinstance(c, SleepEngine) for c in w.ask(f"r{n}", name))
        while w.pending:
            w.now += 1.0
            swaps += any(isinstance(c, SleepEngine) for c in w.answer(next(iter(w.pending))))
        w.finish(f"r{n}")
        while w.pending:
            w.answer(next(iter(w.pending)))
    assert swaps == 1
    assert {w.state("a"), w.state("c")} == {State.READY}


def test_a_request_for_one_that_is_being_moved_waits_for_its_start() -> None:
    """It moves while nobody waits; who comes then is served where it arrives."""
    w = both_on_device_0("adaptive", start_time=40.0)
    w.ask("r", "c")
    while "c" not in w.running.values():
        w.answer(next(iter(w.pending)))
    w.finish("r")
    assert isinstance(w.pending["a"], StopEngine)
    assert w.ask("late", "a") == []
    assert [type(c) for c in w.answer("a")] == [StartEngine]
    w.answer("a")
    assert w.running == {"late": "a"}


def test_a_new_model_leaves_the_large_device_to_large_ones() -> None:
    """35 GiB went to the card of 80 beside an empty one of 40, and from then on swapped with 70 GiB for ever."""
    w = World([model("small", 35), model("large", 70)], (Device(0, "0", 80 * GiB), Device(1, "1", 40 * GiB)))
    w.load("small", "large")
    assert w.state("small") is w.state("large") is State.READY


# -- random machines


class Watched(Clock):
    """Notes which transfers begin, and when."""

    def answer_later(self, model: str, kind: str, event: object) -> None:
        self.begun: list[tuple[float, str, str]] = getattr(self, "begun", [])
        self.begun.append((self.now, model, kind))
        super().answer_later(model, kind, event)  # type: ignore[arg-type]


def machine(rng: random.Random, devices: int, share: float) -> Machine:
    """Models that fit together, with ``share`` of each device to spare; they sleep wherever the simulator put them."""
    sizes = [rng.choice((40, 80, 80)) for _ in range(devices)]
    needs = []
    for size in sizes:
        left = size * (1 - share)
        while left > 8:
            needs.append(min(left, rng.uniform(8, 35)))
            left -= needs[-1]
    rng.shuffle(needs)
    specs = [of_size(f"m{n}", need) for n, need in enumerate(needs)]
    physics = Physics(noise=0.0, measured={spec.name: TIMES for spec in specs})
    where = [Device(index, str(index), size * GiB) for index, size in enumerate(sizes)]
    return Machine(specs, where, Settings(host_memory=4000 * GiB), physics, Warm.ASLEEP)


def of_size(name: str, gib: float) -> ModelSpec:
    awake, levels = int(gib * GiB), frozenset({1, 2})
    footprint = Footprint(awake, awake, GiB // 4, awake)
    return single(name, footprint, GiB, sleep_levels=levels, idle=NEVER, start_time=2.0, queue_timeout=None)


def one_at_a_time(rng: random.Random, specs: Sequence[ModelSpec], number: int, gap: float) -> list[Row]:
    names = [spec.name for spec in specs]
    return [Row(gap * (n + 1), rng.choice(names), 10, 2) for n in range(number)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_models_that_fit_together_come_to_rest(policy: Policy) -> None:
    """Stable: each is moved once at most, and then there are no more swaps. Twenty machines of two to four devices."""
    for seed in range(20):
        rng = random.Random(seed)
        m = machine(rng, 2 + seed % 3, share=0.15)
        rows = one_at_a_time(rng, m.specs, 24 * len(m.specs), 8.0)
        world = Watched(m, rows, policy)
        world.run()
        quiet = rows[len(rows) // 2].time
        late = [(at, name, kind) for at, name, kind in world.begun if at > quiet]
        assert not late, f"seed {seed}: {len(m.specs)} models still move: {late[:4]}"
        starts = [name for _, name, kind in world.begun if kind == "start"]
        assert len(starts) == len(set(starts)), f"seed {seed}: moved twice: {starts}"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_nobody_waits_twice_as_long_as_the_swap_takes_where_all_are_idle(policy: Policy) -> None:
    """Work-conserving: requests come one at a time, after any past, with any priorities; too many for the memory."""
    for seed in range(12):
        rng = random.Random(100 + seed)
        m = machine(rng, 1 + seed % 3, share=-0.8)
        rows = one_at_a_time(rng, m.specs, 60, rng.choice((3.0, 8.0, 40.0)))
        burst = [Row(rows[20].time + n / 50, rows[20].model, 5, 1) for n in range(40)]
        world = Watched(m, sorted([*rows, *burst], key=lambda row: row.time), policy)
        world.run()
        for job in world.jobs:
            spent = sum(TIMES[kind] for at, _, kind in world.begun if job.arrived - 3.0 <= at <= job.began)
            wait = job.began - job.arrived
            assert wait <= 2 * spent + 0.26, f"seed {seed}: {job.id} for {job.model} waited {wait:.2f} s"


class Checked(Adaptive):
    """No swap is begun beside a device that has room for its target."""

    def choose(self, s: PolicyInput) -> Plan | None:
        plan = super().choose(s)
        if plan and plan.victims:
            w = next(w for w in s.waiting if w.model == plan.target)
            moves = plan.victims[0].model == plan.target
            there = w.move.there if w.move else w
            free = [
                supply for i, supply in s.supplies.items() if i in there.devices and supply.free >= there.need_on(i)
            ]
            open_ = [supply for supply in free if not supply.until and not supply.claimed]
            if not moves and len(open_) >= w.span > 0:
                # It sleeps, and to wake it here takes less than a start there; whoever leaves for it will move.
                assert w.move, f"{plan} beside {open_}"
                swap = sum(v.option.takes for v in plan.victims) + w.load
                assert swap < there.load, f"{plan} takes {swap}, a start on {open_} {there.load}"
        return plan


def test_no_swap_beside_room() -> None:
    """Whatever fits somewhere takes nobody's place; a sleeper does so once at most, where that is quicker."""
    for seed in range(12):
        rng = random.Random(200 + seed)
        m = machine(rng, 2 + seed % 3, share=rng.choice((0.3, 0.0, -0.5)))
        rows = one_at_a_time(rng, m.specs, 80, rng.choice((0.5, 4.0)))
        simulate(m, rows, Checked())


def test_baselines_move_nobody() -> None:
    """Of the peers' rules none knows sleepers that could serve elsewhere."""
    assert not any(ALL[name].moves for name in ("llama-swap", "ollama"))
