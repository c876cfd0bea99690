"""Promises that deliberate mutations once broke without any test noticing; ``make mutants`` tries them all again."""

from __future__ import annotations

from tests.core.helpers import GPU, PAIR, model
from tests.core.test_policies import NAP, busy, see, waiting
from tests.core.world import World
from vllmd.core.commands import Reject, SleepEngine, StartEngine, StopEngine
from vllmd.core.events import EngineReady, EngineStopped, MemorySampled, RequestArrived, StopAsked, TimePassed
from vllmd.core.eviction import Candidate, cover
from vllmd.core.policy import INFINITY, OffloadOption
from vllmd.core.pricing import Prices
from vllmd.core.types import State
from vllmd.sizes import GiB


def wedged(w: World, name: str) -> int:
    """Have the engine stop without giving back 7 GiB of its device; which device."""
    (device,) = w.view(name).devices
    w.do(StopAsked(name))
    w.do(EngineStopped(name, {device: 7 * GiB}))
    return device


def test_nothing_starts_on_a_wedged_device_however_much_of_it_is_free() -> None:
    """Whatever went wrong there may go wrong again; it is used once the memory has come back."""
    w = World([model("a", 20), model("b", 20)], [GPU])
    w.load("a")
    wedged(w, "a")
    assert w.ask("r", "b") == []
    assert "is avoided" in w.seen.models[1].waiting_for
    (start,) = w.do(MemorySampled({0: 0}, {}))
    assert isinstance(start, StartEngine)


def test_of_two_devices_the_wedged_one_is_passed_over_though_it_is_the_emptier() -> None:
    """A plan for it would only be given up again when its turn comes."""
    w = World([model("a", 20), model("other", 30), model("b", 20)], PAIR)
    w.load("a", "other")
    bad = wedged(w, "a")
    (start,) = w.ask("r", "b")
    assert isinstance(start, StartEngine)
    assert start.placement.devices == (1 - bad,)


def test_a_swap_whose_device_is_wedged_meanwhile_starts_nothing_there() -> None:
    """Its victim was the one that did not give its memory back."""
    w = World([model("a", 50, sleep_levels=frozenset()), model("b", 20), model("c", 40, on_busy="evict")], [GPU])
    w.load("a")
    (stop,) = w.ask("r", "c")
    assert isinstance(stop, StopEngine)
    assert w.do(EngineStopped("a", {0: 5 * GiB})) == []
    assert w.state("c") is State.STOPPED


def test_frozen_requests_are_regretted_each() -> None:
    """Two that are frozen for a minute lose two minutes: the more run, the dearer the victim."""
    w = waiting("w")
    few, many = busy("few", freezable=True, running=1), busy("many", freezable=True, running=9)
    prices = Prices(see([w], [few, many]))
    assert prices.of(w, many, NAP, 0.0) > 2 * prices.of(w, few, NAP, 0.0)
    assert prices.of(w, many, NAP, 0.0) < prices.of(w, many, NAP, INFINITY)


def test_two_small_victims_are_found_where_they_are_cheaper_than_a_large_one() -> None:
    """And three, where it takes three."""

    def candidate(name: str, frees: int, price: float) -> Candidate:
        return Candidate(price, busy(name), OffloadOption(1, frees, 1.0, 1.0))

    group = [candidate("large", 30, 9.0), *(candidate(name, 10, 2.0) for name in "abc")]
    assert {found.resident.model for found in cover(group, 20, 4) or ()} == {"a", "b"}
    assert {found.resident.model for found in cover(group, 30, 4) or ()} == {"a", "b", "c"}


def test_preloading_waits_for_a_device_on_which_something_moves() -> None:
    """The second cannot start while the first does; that is no reason to give it up."""
    w = World([model("a", 30, preload=True), model("b", 30, preload=True)], [GPU])
    (first,) = w.do(TimePassed())
    assert isinstance(first, StartEngine)
    (second,) = w.do(EngineReady("a"))
    assert isinstance(second, StartEngine)
    assert second.replica == "b"


def test_retry_after_is_the_time_that_something_will_take() -> None:
    """A client that comes back each second of a start of a minute only fills the log."""
    w = World([model("m", 20, queue_limit=1, concurrency=1)], [GPU])
    w.ask("r1", "m")
    refused = w.ask("r2", "m")[0]
    assert isinstance(refused, Reject)
    costs = w.scheduler.costs.open(w.specs["m"])
    assert refused.retry_after == costs.wake(0) > 2.0
    w.answer("m")
    w.ask("r3", "m")
    refused = w.do(RequestArrived("r4", "m"))[0]
    assert isinstance(refused, Reject)
    assert refused.retry_after == costs.seconds("service") > 1.0


def test_retry_after_of_a_model_that_nothing_is_done_for_is_the_time_of_its_load() -> None:
    """It is refused for the sake of a pinned one: sooner than it could be loaded nobody need ask again."""
    w = World([model("pinned", 60, pinned=True), model("m", 30)], [GPU])
    w.ask("first", "pinned")
    w.now = 40.0
    w.answer("pinned")
    (refused,) = w.ask("r", "m")
    assert isinstance(refused, Reject) and "pinned" in refused.message
    assert refused.retry_after == w.scheduler.costs.open(w.specs["m"]).wake(0) > 2.0


def test_one_command_at_a_time_on_a_device() -> None:
    """vLLM mis-sizes itself when two start together: the second one waits for the first."""
    w = World([model("a", 20), model("b", 20)], [GPU])
    w.ask("r1", "a")
    assert w.ask("r2", "b") == []
    w.answer("a")
    w.finish("r1")
    assert w.state("b") is State.STARTING
    w.do(StopAsked("a"))
    assert w.state("a") is State.DRAINING, "no memory comes free while another engine measures it"
    assert not [c for c in w.answer("b") if isinstance(c, SleepEngine)]
    assert w.state("a") is State.STOPPING
