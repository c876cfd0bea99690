"""``when_free``: a start waits until others leave a device free, and takes the share that is free then."""

from __future__ import annotations

import pytest

from tests.core.helpers import GPU, PAIR, model
from tests.core.world import World
from vllmd.core.commands import Admit, Reject, SleepEngine, StartEngine, WakeEngine
from vllmd.core.events import (
    DevicesChanged,
    EngineReady,
    EngineStartFailed,
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    MemorySampled,
    PinSet,
    SleepAsked,
    StopAsked,
    TimePassed,
)
from vllmd.core.types import Device, Footprint, Placement, Settings, WhenFree
from vllmd.sizes import GiB

ON_0 = Placement((0,))
POLICIES = ("adaptive", "lru")


def external(*gib: int) -> MemorySampled:
    """What they hold on device 0, 1, ..."""
    return MemorySampled({index: size * GiB for index, size in enumerate(gib)}, {})


def waiting_for(w: World, name: str = "m") -> str:
    return next(m.waiting_for for m in w.seen.models if m.name == name)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_starts_when_the_strangers_have_left(policy: str) -> None:
    """57 GiB are free, enough for what it takes: but somebody works there."""
    w = World([model("m", 10, when_free=WhenFree())], [GPU], Settings(policy))
    w.do(external(23))
    w.ask("r", "m")
    assert w.do(external(23)) == []
    assert w.pass_time(300.0) == []
    assert w.do(external(0)) == [StartEngine("m", ON_0, 64 * GiB)]
    assert w.seen.devices[0].promised == 64 * GiB
    assert w.answer("m") == [Admit("r", "m")]
    assert w.seen.devices[0].promised == 64 * GiB
    assert w.view("m").expected == 0, "64 GiB were given to it; beside its footprint that would look like too much"


@pytest.mark.parametrize(
    ("used", "memory", "takes"),
    [
        (0, 80, 64),
        (4, 80, 64),  # 0.95 is free
        (5, 80, 56),
        (9, 80, 56),
        (10, 80, None),  # 10,240 MiB
        (3, 20, 14),  # 0.85 is free
        (4, 24, None),  # below 10,000 MiB, but only 0.83 is free
    ],
)
def test_the_free_ratio_picks_the_share(used: int, memory: int, takes: int | None) -> None:
    """0.8 from 0.95 on, 0.7 from 0.85 on; with less it waits, however little is used."""
    w = World([model("m", 10, when_free=WhenFree())], [Device(0, "gpu0", memory * GiB)])
    w.do(external(memory))
    w.ask("r", "m")
    commands = w.do(external(used))
    assert commands == ([] if takes is None else [StartEngine("m", ON_0, takes * GiB)])


def test_without_shares_it_takes_what_it_takes() -> None:
    """Only the start waits."""
    w = World([model("m", 10, when_free=WhenFree(5 * GiB, {}))], [GPU])
    w.do(external(6))
    w.ask("r", "m")
    assert w.do(external(5)) == []
    assert w.do(external(4)) == [StartEngine("m", ON_0, 10 * GiB)]


def test_models_that_can_make_room_do_not_count() -> None:
    """All that is used is ours, so one swap gives it the device."""
    w = World([model("a"), model("m", when_free=WhenFree(), on_busy="evict")], [GPU])
    w.load("a")
    w.do(external(1))
    assert w.ask("r", "m") == [SleepEngine("a", 1)]
    assert w.answer("a") == [StartEngine("m", ON_0, 64 * GiB)]


def test_models_that_stay_count() -> None:
    """Six GiB are leased out: 0.925 is free of others; with the strangers' five more it waits, until the lease ends."""
    w = World([model("a", 6), model("m", when_free=WhenFree())], [GPU])
    w.load("a")
    w.do(LeaseTaken("l", "a"))
    w.do(external(5))
    assert w.ask("r", "m") == []
    assert "other programs hold 5 GiB and models that stay hold 6 GiB on device 0, 0.863 is free" in waiting_for(w)
    assert w.do(LeaseReleased("l")) == [StartEngine("m", ON_0, 56 * GiB)]


def test_beside_a_leased_model_it_takes_less() -> None:
    """As beside a stranger of that size."""
    w = World([model("a", 6), model("m", when_free=WhenFree())], [GPU])
    w.load("a")
    w.do(LeaseTaken("l", "a"))
    assert w.ask("r", "m") == [StartEngine("m", ON_0, 56 * GiB)]


def test_pinned_models_that_leave_no_device_free_are_named_at_once() -> None:
    """They stay for good: waiting would be in vain."""
    w = World([model("a", 20), model("m", when_free=WhenFree())], [GPU])
    w.load("a")
    w.do(PinSet("a", True))
    (told,) = w.ask("r", "m")
    assert isinstance(told, Reject)
    assert told.message == "'m' starts on devices that others leave free, and pinned models ('a') do not leave enough"


def test_it_goes_where_nobody_is() -> None:
    """The other device is free."""
    w = World([model("m", when_free=WhenFree())], PAIR)
    w.do(external(30, 80))
    w.ask("r", "m")
    assert w.do(external(30, 3)) == [StartEngine("m", Placement((1,)), 64 * GiB)]


def test_of_several_devices_all_must_be_free_and_the_fullest_decides() -> None:
    """Tensor parallel 2: one share for both."""
    w = World([model("wide", device_count=2, when_free=WhenFree())], PAIR)
    w.do(external(0, 30))
    w.ask("r", "wide")
    assert w.do(external(0, 30)) == []
    assert waiting_for(w, "wide").startswith("2 free devices (others use less than 9.77 GiB, at least 0.85 of it free)")
    assert w.do(external(0, 8)) == [StartEngine("wide", Placement((0, 1)), 56 * GiB)]


def test_an_old_word_is_no_word() -> None:
    """While nothing is loaded nobody looks at the devices: what was read yesterday says nothing of now."""
    w = World([model("m", when_free=WhenFree())], [GPU])
    w.do(external(0))
    w.now = 86400.0
    assert w.ask("r", "m") == []
    assert waiting_for(w).endswith("device 0 is yet to be looked at")
    assert w.do(external(23)) == []
    assert w.do(external(0)) == [StartEngine("m", ON_0, 64 * GiB)]


def test_a_device_that_cannot_be_read_is_not_free() -> None:
    """Its last figures are not what is there now."""
    w = World([model("m", when_free=WhenFree())], PAIR)
    w.do(external(0, 30))
    w.now = 1.0
    w.ask("r", "m")
    assert w.do(MemorySampled({1: 30 * GiB}, {}, {0: "GPU is lost"})) == []
    assert w.do(external(0, 30)) == [StartEngine("m", ON_0, 64 * GiB)]


def test_what_it_was_measured_at_is_of_another_share() -> None:
    """It held 66 GiB when the device was its own; this time it is given 56."""
    w = World([model("m", when_free=WhenFree())], [GPU])
    w.ask("r1", "m")
    w.do(EngineReady("m", Footprint(66 * GiB, 66 * GiB)))
    w.finish("r1")
    assert w.seen.devices[0].promised == 66 * GiB
    w.do(StopAsked("m"))
    w.answer("m")
    w.do(external(8))
    assert w.ask("r2", "m") == [StartEngine("m", ON_0, 56 * GiB)]
    assert w.seen.devices[0].promised == 56 * GiB


def test_waking_needs_room_only() -> None:
    """It was there before the strangers."""
    w = World([model("m", when_free=WhenFree())], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    w.answer("m")
    w.do(external(12))
    assert w.ask("r", "m") == [WakeEngine("m", 1)]


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_waits_behind_it(policy: str) -> None:
    """It waits for others, not for its turn."""
    w = World([model("m", when_free=WhenFree()), model("b", 20)], [GPU], Settings(policy))
    w.do(external(30))
    w.ask("r", "m")
    w.do(external(30))
    w.pass_time(300.0)
    assert w.ask("r2", "b") == [StartEngine("b", ON_0, 20 * GiB)]


def test_who_comes_back_during_the_swap_stops_it() -> None:
    """The rule holds at the moment of the start, too."""
    w = World([model("a"), model("m", when_free=WhenFree(), on_busy="evict")], [GPU])
    w.load("a")
    w.ask("r", "m")
    w.do(external(11))
    assert w.answer("a") == []
    assert "other programs hold 11 GiB on device 0, 0.863 is free" in waiting_for(w)
    why = [d.why for d in w.seen.decisions if d.what == "replan"]
    assert why == ["after the swap others do not leave device 0 free: other programs hold 11 GiB there"]
    assert w.do(external(0)) == [StartEngine("m", ON_0, 64 * GiB)]


def test_a_start_for_which_memory_was_lacking_waits_again() -> None:
    """Somebody was faster; the second try takes what is free then, not what the first asked for."""
    w = World([model("m", when_free=WhenFree())], [GPU])
    w.ask("r", "m")
    w.do(external(30))
    assert w.do(EngineStartFailed("m", "less free than desired", memory=True, needed=64 * GiB)) == []
    assert w.do(external(6)) == [StartEngine("m", ON_0, 56 * GiB)]


def test_why_it_waits_and_what_it_took_is_recorded() -> None:
    """Once, with the numbers, however often one looks."""
    w = World([model("m", when_free=WhenFree())], [GPU])
    w.do(external(23))
    w.do(LoadAsked("m"))
    w.now = 1.0
    for size in (23, 24, 23):
        w.do(external(size))
        w.pass_time(w.now + 1.0)
    w.do(external(8))
    waits, starts, takes = w.seen.decisions
    assert (waits.what, starts.what, takes.what) == ("wait", "start", "free")
    assert waits.why == (
        "it waits for a free device (others use less than 9.77 GiB, at least 0.85 of it free): "
        "other programs hold 23 GiB on device 0, 0.713 is free"
    )
    assert waits.numbers == {"used_below": 10_000 << 20, "used_0": 23 * GiB}
    assert takes.why == "others hold 8 GiB of device 0, 0.900 of it is free: it takes 0.7, 56 GiB"
    assert takes.numbers == {"devices": "0", "used": 8 * GiB, "free": 0.9, "share": 0.7, "memory": 56 * GiB}


def test_a_request_waits_no_longer_than_it_may() -> None:
    """``queue_timeout`` as ever."""
    w = World([model("m", when_free=WhenFree(), queue_timeout=30.0)], [GPU])
    w.do(external(23))
    w.ask("r", "m")
    (told,) = w.pass_time(31.0)
    assert isinstance(told, Reject)
    assert told.message == "'m' could not be served within 30 s"


def test_one_to_be_preloaded_waits_as_well() -> None:
    """Servers that come up as the machine empties."""
    w = World([model("m", preload=True, when_free=WhenFree())], [GPU])
    w.do(external(23))
    assert w.do(TimePassed()) == []
    w.pass_time(600.0)
    assert w.do(external(0)) == [StartEngine("m", ON_0, 64 * GiB)]


def test_it_is_not_rejected_for_strangers() -> None:
    """``on_busy: reject`` is about models that work; for strangers it waits."""
    w = World([model("m", when_free=WhenFree(), on_busy="reject")], [GPU])
    w.do(external(23))
    assert w.ask("r", "m") == []


def test_a_reserve_that_leaves_less_than_the_share_is_said() -> None:
    """No empty device could hold it."""
    rule = WhenFree(GiB, {0.9: 0.9})
    w = World([model("m", when_free=rule)], [Device(0, "gpu0", 80 * GiB, 10 * GiB)])
    (told,) = w.ask("r", "m")
    assert isinstance(told, Reject)
    needs = "'m' needs 72 GiB on 1 device"
    assert told.message == f"{needs}; device 0 has 80 GiB less a reserve of 10 GiB: 70 GiB"


READ = Device(0, "gpu0", 80 * GiB, read=True)


def test_a_device_that_comes_is_not_free_before_it_was_read() -> None:
    """Whoever holds it would be disturbed by a start that comes seconds too early."""
    w = World([model("m", 10, when_free=WhenFree(GiB, {}))], [])
    w.do(DevicesChanged((), "not asked yet", asking=True))
    w.ask("r", "m")
    w.do(DevicesChanged((READ,)))
    assert w.pending == {} and waiting_for(w).endswith("device 0 is yet to be looked at")
    assert w.do(external(23)) == []
    assert w.do(external(0)) == [StartEngine("m", ON_0, 10 * GiB)]


@pytest.mark.parametrize("other", [READ, Device(0, "another", 80 * GiB, read=True)])
def test_a_device_that_comes_back_has_to_be_read_again(other: Device) -> None:
    """What was read before it went is of another time, also where an engine has kept its account meanwhile."""
    w = World([model("a", 5), model("m", 10, when_free=WhenFree(GiB, {}))], [READ])
    w.load("a")
    w.do(external(0))
    w.do(LoadAsked("m"))
    w.answer("m")
    w.do(StopAsked("m"))
    w.answer("m")
    w.do(DevicesChanged((), "the driver is gone"))
    w.do(DevicesChanged((other,)))
    assert w.do(LoadAsked("m")) == []
    assert StartEngine("m", ON_0, 10 * GiB) in w.do(external(0))


@pytest.mark.parametrize("how", ["found", "failed"])
def test_preloading_reckons_with_no_device_that_was_never_read(how: str) -> None:
    """However old a reading may be: there is none."""
    w = World([model("m", 10, preload=True, when_free=WhenFree(GiB, {}))], [READ])
    if how == "failed":
        w.do(MemorySampled({}, {}, {0: "no answer"}))
    assert w.do(TimePassed()) == []
    assert w.do(external(0)) == [StartEngine("m", ON_0, 10 * GiB)]
