"""What an operator's word would do is what it then does."""

from __future__ import annotations

from tests.core.helpers import GPU, PAIR, model
from tests.core.world import World
from vllmd.core.commands import SleepEngine, StartEngine, StopEngine
from vllmd.core.events import DeviceDrained, DevicesChanged, LoadAsked, ModelDisabled, SleepAsked
from vllmd.core.preview import Leaving
from vllmd.core.types import Device, State
from vllmd.sizes import GiB


def test_a_load_goes_where_it_was_said_after_those_who_were_named() -> None:
    w = World([model("a"), model("b")], [GPU])
    w.load("a")
    w.ask("runs", "a")
    seen = w.scheduler.would_load("b")
    (victim,) = seen.victims
    assert (seen.devices, victim.replica, victim.running, victim.level) == ((0,), "a", 1, 1)
    assert w.scheduler.next_timer() is None and w.state("b") is State.STOPPED, "nothing is changed by looking"
    assert w.do(LoadAsked("b")) == []
    assert w.finish("runs") == [SleepEngine("a", victim.level)]
    (start,) = w.answer("a")
    assert isinstance(start, StartEngine) and start.placement.devices == seen.devices


def test_a_load_that_cannot_be_is_said_with_the_reason() -> None:
    w = World([model("huge", 100), model("pinned", pinned=True), model("small", 2, pinned=True), model("m")], [GPU])
    assert "needs 100 GiB" in w.scheduler.would_load("huge").never
    w.load("pinned")
    assert "pinned models ('pinned') leave less" in w.scheduler.would_load("m").waits
    w.load("small")
    assert "pinned models ('pinned') leave less" in w.scheduler.would_load("m").waits, "the other one is not in the way"
    w.do(ModelDisabled("m", "later"))
    assert w.scheduler.would_load("m").never == "it is disabled: later"


def test_what_serves_or_comes_already_is_said_so() -> None:
    w = World([model("m")], PAIR)
    assert w.scheduler.would_load("m").victims == ()
    w.do(LoadAsked("m"))
    assert w.scheduler.would_load("m").state is State.STARTING
    w.answer("m")
    assert w.scheduler.would_load("m").state is State.READY


def test_a_sleep_names_the_level_that_it_will_have() -> None:
    w = World([model("m"), model("never", sleep_levels=frozenset())], PAIR)
    w.load("m", "never")
    assert [each.level for each in w.scheduler.would_leave("m", 1)] == [1]
    assert [each.level for each in w.scheduler.would_leave("never", 1)] == [0], "one that cannot sleep is stopped"
    (told,) = w.scheduler.would_leave("m", 1)
    assert told == Leaving("m", State.READY, 1, told.devices, 49 * GiB, 0, None, told.back)
    assert w.do(SleepAsked("m", 1)) == [SleepEngine("m", 1)]
    assert w.do(SleepAsked("never", 1)) == [StopEngine("never", "an operator asked for it")]


def test_a_drain_names_who_is_there() -> None:
    w = World([model("m"), model("n")], PAIR)
    w.load("m", "n")
    (device,) = w.view("m").devices
    assert [each.replica for each in w.scheduler.would_drain(device)] == ["m"]
    assert [command.replica for command in w.do(DeviceDrained(device))] == ["m"]  # type: ignore[attr-defined]


def test_what_can_never_be_loaded_is_shown_before_anybody_asks() -> None:
    w = World([model("huge", 100), model("m")], [GPU])
    assert "needs 100 GiB" in w.view("huge").never
    assert w.view("m").never == ""
    w.do(DevicesChanged((Device(0, "gpu0", 200 * GiB),)))
    assert w.view("huge").never == ""
    w.load("huge")
    w.do(DevicesChanged((GPU,)))
    assert w.view("huge").never == "", "it is loaded"
