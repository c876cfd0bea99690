"""The small parts: ledger, queue, costs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import vllmd.core
from tests.core.helpers import GPU, PAIR, model
from vllmd.core import events
from vllmd.core.costs import CostBook, Costs
from vllmd.core.ledger import Ledger
from vllmd.core.queues import Queue
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, Footprint, ReplicaSpec, Settings, Source
from vllmd.sizes import GiB


def of(name: str, **fields: Any) -> ReplicaSpec:
    """The one engine of such a model."""
    return model(name, **fields).replicas[0]


def test_what_is_held_is_not_free() -> None:
    """Promises, the reserve and external memory are subtracted; a release gives all of it back."""
    ledger = Ledger([Device(0, "x", 80 * GiB, 2 * GiB)], 0)
    ledger.hold("m", {0: 50 * GiB})
    ledger.set_external({0: 5 * GiB}, now=1.0)
    assert ledger.accounts[0].free == 23 * GiB
    ledger.hold("m", {0: 1 * GiB})
    assert ledger.accounts[0].free == 72 * GiB
    ledger.release("m")
    assert ledger.accounts[0].free == 73 * GiB


def test_what_a_model_keeps_of_the_host_counts_for_itself() -> None:
    """A sleeper may sleep again in the memory that it already has."""
    ledger = Ledger(PAIR, 64 * GiB)
    ledger.hold_host("m", 40 * GiB)
    assert ledger.host_free_for("m") == 64 * GiB
    assert ledger.host_free_for("other") == 24 * GiB
    ledger.release("m")
    assert ledger.host_promised == 0


def test_a_wedged_device_recovers_when_its_memory_is_seen_free() -> None:
    """Half of it is still missing: wedged; less: not."""
    ledger = Ledger([GPU], 0)
    ledger.wedge({0: 40 * GiB})
    ledger.set_external({0: 30 * GiB}, now=1.0)
    assert ledger.accounts[0].missing
    ledger.set_external({0: 1 * GiB}, now=1.0)
    assert not ledger.accounts[0].missing


def test_the_queue_knows_the_sum_of_the_ages() -> None:
    """What a queue has waited is one multiplication, however long it is."""
    queue = Queue()
    for n, at in enumerate((1.0, 3.0, 5.0)):
        queue.add(f"r{n}", "key", at)
    assert len(queue) * 10.0 - queue.arrived == 21.0
    queue.remove("r1")
    assert len(queue) * 10.0 - queue.arrived == 14.0
    assert queue.oldest == 1.0


def test_a_prior_is_by_kind_and_is_corrected_by_others_of_it() -> None:
    """One engine of a kind has started in a tenth of the time: the others are expected to as well, other kinds not."""
    book = CostBook()
    first, second = of("a", engine="x", start_time=20.0), of("b", engine="x", start_time=40.0)
    other = of("c", engine="y", start_time=40.0)
    assert book.open(second).wake(0) == 40.0
    assert book.open(first).observe("start", 2.0)
    assert book.open(second).wake(0) == pytest.approx(4.0)
    assert book.open(second).learnt("start") == 0.0
    assert book.open(other).wake(0) == 40.0


def test_times_of_another_engine_are_forgotten() -> None:
    """The user's cache may have a model of that name and another size."""
    book = CostBook()
    book.open(of("a", weights=GiB)).observe("start", 2.0)
    kept = CostBook.from_dict(book.to_dict())
    assert kept.open(of("a", weights=GiB)).learnt("start") == 2.0
    kept = CostBook.from_dict(book.to_dict())
    assert kept.open(of("a", weights=9 * GiB)).learnt("start") == 0.0


def test_the_first_observation_replaces_the_prior() -> None:
    """Other machines differ by an order of magnitude; later observations are averaged in."""
    costs = Costs(weights=40.0)
    assert costs.wake(0) == pytest.approx(45.0)
    costs.observe("start", 4.0)
    assert costs.wake(0) == 4.0
    costs.observe("start", 6.0)
    assert costs.wake(0) == 5.0


def test_who_starts_in_no_time_is_gone_in_no_time() -> None:
    """Nobody has seen it stop: that takes no longer than its start did, until it is known."""
    costs = Costs()
    assert costs.sleep(0) == 3.0
    costs.observe("start", 0.2)
    assert costs.sleep(0) == 0.2
    costs.observe("stop", 0.5)
    assert costs.sleep(0) == 0.5


@pytest.mark.parametrize("absurd", [-1.0, math.inf, math.nan])
def test_absurd_times_teach_nothing(absurd: float) -> None:
    """A clock that jumped must not poison the figures."""
    costs = Costs(weights=40.0)
    costs.observe("start", absurd)
    assert costs.wake(0) == pytest.approx(45.0)


def test_a_rate_forgets() -> None:
    """Sixty arrivals in a minute are about one a second; ten minutes later, none."""
    costs = Costs(weights=40.0)
    for second in range(300):
        costs.arrived(float(second))
    rate = costs.rate
    assert rate.read(300.0) == pytest.approx(1.0, rel=0.05)
    assert rate.read(900.0) < 0.001


ENGINE = model("m").replicas[0]


def test_what_was_learnt_survives_in_the_cache() -> None:
    """Times and footprints come back; a model configured otherwise starts anew with its footprint."""
    book = CostBook()
    costs = book.open(ENGINE)
    costs.observe("wake1", 0.7)
    costs.footprint = Footprint(5, 4, 3, 2, Source.MEASURED)
    again = CostBook.from_dict(book.to_dict())
    assert again.to_dict() == book.to_dict()
    assert again.open(ENGINE).footprint == Footprint(5, 4, 3, 2, Source.MEASURED)
    other = CostBook.from_dict(book.to_dict()).open(model("m", 60).replicas[0])
    assert other.footprint is None
    assert other.wake(1) == 0.7


DAMAGE = [None, "x", {}, {"seconds": 3}, {"seconds": {"start": ["x", 1]}, "of": "", "asked": 0}]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_no_cache(damage: object) -> None:
    """It is safe to delete, so it is safe to ignore."""
    book = CostBook.from_dict({"m": damage})  # type: ignore[dict-item]
    assert book.open(ENGINE).seconds("start") == CostBook().open(ENGINE).seconds("start")


def test_every_event_has_a_handler() -> None:
    """One without is an operator's verb that answers 200 and does nothing."""
    told = {each for each in vars(events).values() if isinstance(each, type) and issubclass(each, events.Event)}
    handled = Scheduler([], [], Settings()).handlers
    assert told - {events.Event} == set(handled)


def test_the_tutorial_names_each_file() -> None:
    """A stranger finds every room of the core in design.md, and none that is not there."""
    here = Path(vllmd.core.__file__).parent
    _, _, rest = (here / "design.md").read_text().partition("## The files")
    named = re.findall(r"\b(\w+\.py)\b", rest.partition("# Reference")[0].replace("simulate/baselines.py", ""))
    assert sorted(named) == sorted(file.name for file in here.glob("*.py") if file.name != "__init__.py")
