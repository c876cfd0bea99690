"""The production scheduler under the virtual clock: exact small stories, and nothing is lost in large ones."""

from __future__ import annotations

import pytest

from tests.bench.scenarios import scenarios
from tests.bench.schedule import FOR_EVER, GB, VARIANTS, run, specs
from vllmd.core.types import Device, Footprint, ModelSpec, Settings, single
from vllmd.errors import VllmdError
from vllmd.simulate.baselines import ALL
from vllmd.simulate.physics import Physics
from vllmd.simulate.report import Report
from vllmd.simulate.trace import Row
from vllmd.simulate.world import Machine, Warm, freezing, simulate

EXACT = Physics(bandwidth=10 * GB, step=0.0, step_per_request=0.0, prefill=1e9, noise=0.0)  # 10 GB: 1 s per token


def model(name: str, size: int = 10, levels: tuple[int, ...] = (1, 2), **settings: object) -> ModelSpec:
    """``size`` GB of weights, and as much of the device."""
    footprint = Footprint(size * GB, size * GB, 0, size * GB)
    return single(name, footprint, size * GB, sleep_levels=frozenset(levels), idle=FOR_EVER, **settings)


def machine(*models: ModelSpec, device: int = 10, warm: Warm = Warm.STOPPED) -> Machine:
    return Machine(models, [Device(0, "0", device * GB)], Settings(host_memory=100 * GB), EXACT, warm)


def play(m: Machine, *rows: Row, policy: str = "adaptive") -> Report:
    return simulate(m, rows, ALL[policy])


def test_one_request_waits_for_the_cold_start_and_no_longer() -> None:
    """37 s + 0.2 s per GB of weights; then one token per second."""
    report = play(machine(model("a")), Row(0.0, "a", 0, 5))
    assert report.all.wait.longest == pytest.approx(39.0)
    assert report.all.latency.longest == pytest.approx(44.0)
    assert (report.all.swaps, report.all.served, report.length) == (1, 1, pytest.approx(44.0))


def test_a_loaded_model_serves_at_once() -> None:
    """The second request finds it there."""
    report = play(machine(model("a")), Row(0.0, "a", 0, 1), Row(60.0, "a", 0, 1))
    assert report.all.wait.p50 == 0.0
    assert report.all.swaps == 1


def test_two_that_do_not_fit_together_swap_places_by_sleeping() -> None:
    """b at 100 s finds a idle: sleep a (0.05 + 0.455 s), wake b (0.25 + 0.45 s)."""
    rows = Row(0.0, "a", 0, 1), Row(100.0, "b", 0, 1)
    report = play(machine(model("a"), model("b"), warm=Warm.ASLEEP), *rows, policy="lru")
    assert report.models["a"].wait.longest == pytest.approx(0.70)
    assert report.models["b"].wait.longest == pytest.approx(0.505 + 0.70)
    assert report.all.swaps == 2


def test_a_drain_lets_the_running_request_end() -> None:
    """LRU closes a's gate at 10 s; its 20 tokens run until 20.7 s, then the swap takes 1.205 s."""
    rows = Row(0.0, "a", 0, 20), Row(10.0, "b", 0, 1)
    report = play(machine(model("a"), model("b"), warm=Warm.ASLEEP), *rows, policy="lru")
    assert report.models["a"].latency.longest == pytest.approx(20.70)
    assert report.models["b"].wait.longest == pytest.approx(20.70 - 10.0 + 1.205)


def never_idle(policy: str, drain_limit: float | None = None) -> Report:
    """A model that always has somebody, beside a rare one that cannot live with it."""
    rows = [Row(4.0 * n, "busy", 0, 10) for n in range(400)]
    rows.append(Row(200.5, "rare", 0, 1))
    m = machine(model("busy", drain_limit=drain_limit), model("rare", queue_timeout=None), warm=Warm.ASLEEP)
    return simulate(m, sorted(rows, key=lambda row: row.time), ALL[policy])


def test_a_rare_model_beside_a_never_idle_one_is_served_within_the_deadline() -> None:
    """60 s of waiting, then a drain of at most 10 s and a swap."""
    assert never_idle("adaptive").models["rare"].wait.longest < 60.25 + 10.5 + 2.0


def test_a_drain_limit_bounds_that_wait() -> None:
    """Who waits behind a model with one waits no longer than that, and the swap."""
    assert never_idle("adaptive", drain_limit=12.0).models["rare"].wait.longest < 12.0 + 2.0


@pytest.mark.parametrize("policy", ["llama-swap", "ollama"])
def test_the_peers_rules_let_it_starve(policy: str) -> None:
    """What these baselines are there to show: it waits until the busy one's last request."""
    assert never_idle(policy).models["rare"].wait.longest > 1300.0


def test_models_that_fit_together_stay() -> None:
    """Three of 10 GB on 30 GB: one start each, whatever happens later."""
    rows = [Row(100.0 * n, "abc"[n % 3], 0, 2) for n in range(12)]
    for policy in ("adaptive", "lru", "llama-swap", "ollama"):
        report = play(machine(model("a"), model("b"), model("c"), device=30), *rows, policy=policy)
        assert report.all.swaps == 3


def test_a_large_model_makes_more_than_four_small_ones_leave() -> None:
    """No set of four is enough; it must be served all the same."""
    small = [model(f"s{n}", 5) for n in range(8)]
    rows = [Row(0.1 * n, f"s{n}", 0, 1) for n in range(8)] + [Row(400.0, "big", 0, 1)]
    report = play(machine(*small, model("big", 38), device=40, warm=Warm.ASLEEP), *rows)
    assert report.models["big"].wait.longest < 60.0


@pytest.mark.parametrize("policy", [*ALL, "adaptive+freeze"])
def test_every_request_is_accounted_for(policy: str) -> None:
    """Conservation: each ends once, not before it came, and its wait is part of its latency."""
    scenario = next(iter(scenarios(seed=3, rate=0.3, duration=600.0)))
    figures = run(scenario, VARIANTS[0], policy, seed=3)
    assert figures.requests == len(scenario.rows) == figures.served + figures.failed
    assert figures.failed == 0
    assert 0.0 <= figures.wait.mean <= figures.latency.mean
    assert figures.tokens == sum(row.output for row in scenario.rows)


@pytest.mark.parametrize("policy", ["adaptive", "lru"])
def test_two_runs_are_the_same(policy: str) -> None:
    """A benchmark whose figures change from run to run compares nothing."""
    scenario = list(scenarios(seed=5, rate=0.3, duration=600.0))[2]
    assert run(scenario, VARIANTS[3], policy, 5) == run(scenario, VARIANTS[3], policy, 5)


def test_frozen_requests_end_correctly() -> None:
    """With preempt the victims' requests are frozen, and all of them still end."""
    scenario = list(scenarios(seed=1, rate=1.0, duration=600.0))[3]
    rows = [Row(row.time, row.model, row.prompt, row.output) for row in scenario.rows]
    m = Machine(
        freezing(specs(scenario.weights)), [Device(0, "0", 80 * GB)], Settings(host_memory=256 * GB), warm=Warm.ASLEEP
    )
    report = simulate(m, rows, ALL["adaptive"])
    assert report.all.frozen > 0
    assert report.all.served + report.all.failed == len(rows)
    assert report.all.failed == 0


def test_memory_and_work_are_within_bounds() -> None:
    """The ledger never promises more than there is, at any sample."""
    scenario = list(scenarios(seed=2, duration=600.0))[4]
    m = Machine(specs(scenario.weights), [Device(0, "0", 80 * GB)], Settings(host_memory=96 * GB), warm=Warm.ASLEEP)
    report = simulate(m, [Row(r.time, r.model, r.prompt, r.output) for r in scenario.rows], ALL["adaptive"])
    assert report.samples
    assert all(0 <= sample.promised[0] <= 80 * GB and sample.host <= 96 * GB for sample in report.samples)
    assert 0.0 < report.busy[0] <= 1.0


def test_a_queue_timeout_is_counted_as_a_failure_with_its_wait() -> None:
    """A policy that gives up on somebody must not look as if it had served him at once."""
    report = play(machine(model("a", queue_timeout=10.0)), Row(0.0, "a", 0, 1))
    assert (report.all.served, report.all.failed) == (0, 1)
    assert report.errors == {"Unavailable": 1}
    assert report.all.wait.longest == pytest.approx(10.0)


def test_a_model_that_is_not_there_is_an_error() -> None:
    """It names what there is."""
    with pytest.raises(VllmdError, match="asks for 'b', which is not one of the models: 'a'"):
        play(machine(model("a")), Row(0.0, "b", 0, 1))
