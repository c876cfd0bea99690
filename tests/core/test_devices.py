"""Devices that are not known, come, go, are ill, or are drained: never taken for none, and engines that run run on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import Admit, CutRequest, Reject, SleepEngine, StartEngine, StopEngine
from vllmd.core.events import (
    DeviceDrained,
    DevicesChanged,
    DevicesTroubled,
    EngineAdopted,
    EngineReady,
    EngineStopped,
    LoadAsked,
    MemorySampled,
    RequestFinished,
    StopAsked,
    TimePassed,
)
from vllmd.core.types import Device, Placement, State
from vllmd.sizes import GiB

WHY = "NVML: Driver/library version mismatch; reboot"
CPU = model("cpu", 0, device_count=0)


def test_who_needs_a_device_is_told_why_there_is_none_and_a_cpu_model_is_served() -> None:
    """Not 60 GiB models loaded at once onto nothing."""
    w = World([model("m"), CPU], [])
    w.do(DevicesChanged((), WHY))
    (refused,) = w.ask("r1", "m")
    assert isinstance(refused, Reject) and (refused.error, refused.message) == ("Unavailable", WHY)
    assert refused.retry_after
    assert isinstance(w.ask("r2", "cpu")[0], StartEngine)


def test_while_devices_are_being_asked_for_requests_wait_and_start_when_they_come() -> None:
    """A driver without persistence mode takes seconds, which is no reason for an error."""
    w = World([model("m")], [])
    w.do(DevicesChanged((), "not asked yet", asking=True))
    assert w.ask("r1", "m") == []
    assert w.do(DevicesChanged((GPU,))) == [StartEngine("m", Placement((0,)), 50 * GiB)]
    assert Admit("r1", "m") in w.do(EngineReady("m"))


def test_who_waited_for_the_answer_is_told_when_it_does_not_come() -> None:
    """Not after the ten minutes of a queue's patience."""
    w = World([model("m")], [])
    w.do(DevicesChanged((), "not asked yet", asking=True))
    w.ask("r1", "m")
    (told,) = w.do(DevicesChanged((), WHY))
    assert isinstance(told, Reject) and told.message == WHY


@pytest.mark.timeout(60)
def test_several_replicas_none_of_which_can_come_up_are_not_nominated_in_turn() -> None:
    """Each would be given up for the sake of the other, without an end; whoever waits is told why."""
    w = World(replicas(2), [])
    w.do(DevicesChanged((), "not asked yet", asking=True))
    w.ask("r1", "m")
    (told,) = w.do(DevicesChanged((), WHY))
    assert isinstance(told, Reject) and told.message == WHY
    (refused,) = w.ask("r2", "m")
    assert isinstance(refused, Reject) and refused.message == WHY


def test_a_device_that_goes_while_an_engine_without_a_footprint_is_on_it_keeps_its_account() -> None:
    """The engine stops later, and is unbooked from a device that is gone."""
    w = World([model("m", 0)], [GPU])
    w.load("m")
    w.do(DevicesChanged((), "the driver is gone"))
    w.do(StopAsked("m"))
    w.answer("m")
    assert w.state("m") is State.STOPPED
    w.do(DevicesChanged(()))
    assert w.seen.devices == ()


def test_preloading_waits_for_the_devices() -> None:
    """At boot the daemon is often up before the driver is."""
    w = World([model("m", preload=True)], [])
    w.do(DevicesChanged((), WHY))
    assert w.do(TimePassed()) == []
    assert [type(c) for c in w.do(DevicesChanged((GPU,)))] == [StartEngine]


def test_an_engine_adopted_while_its_device_is_unknown_is_booked_when_it_is_known() -> None:
    """A restart in that state ends no healthy engine, and the next start does not take its memory for free."""
    w = World([model("m"), model("n")], [])
    w.do(DevicesChanged((), WHY))
    w.do(EngineAdopted("m", Placement((0,)), State.READY, 0, 0.0))
    assert w.ask("r1", "m") == [Admit("r1", "m")]
    w.do(DevicesChanged((GPU,)))
    (device,) = w.seen.devices
    assert device.promised == 50 * GiB
    assert w.ask("r2", "n") == []  # 30 GiB are left


def test_when_devices_fall_silent_what_runs_runs_on_and_nothing_is_started() -> None:
    """And it goes on as if nothing had been when they answer again."""
    w = World([model("m", 30), model("n", 30)], [GPU])
    w.load("m")
    assert w.do(DevicesChanged((GPU,), "a reading hangs")) == []
    assert w.ask("r1", "m") == [Admit("r1", "m")]
    (refused,) = w.ask("r2", "n")
    assert isinstance(refused, Reject)
    w.do(LoadAsked("n"))
    assert w.state("n") is State.STOPPED
    w.do(DevicesChanged((GPU,)))
    assert w.ask("r3", "n") == [StartEngine("n", Placement((0,)), 30 * GiB)]


def test_an_ill_device_is_avoided_and_left_once_drained() -> None:
    """Its engine's requests come to their end; the next start goes elsewhere."""
    w = World([model("m", 30)], list(PAIR))
    w.load("m")
    w.ask("r1", "m")
    assert w.do(DevicesTroubled({0: "2 uncorrectable ECC errors"})) == []
    assert w.seen.devices[0].wedged == "2 uncorrectable ECC errors"
    (stop,) = w.do(RequestFinished("r1"))
    assert isinstance(stop, StopEngine) and "device 0: 2 uncorrectable" in stop.reason
    w.do(EngineStopped("m"))
    assert w.ask("r2", "m") == [StartEngine("m", Placement((1,)), 30 * GiB)]
    w.do(DevicesTroubled({}))
    assert w.seen.devices[0].wedged == ""


def test_a_lost_device_takes_its_engine_along_with_the_reason() -> None:
    """Nothing on it answers any more: requests are cut at once, and the model starts elsewhere."""
    w = World([model("m", 30)], list(PAIR))
    w.load("m")
    w.ask("r1", "m")
    told = w.do(DevicesTroubled(lost={0: "GPU is lost"}))
    assert [c.request for c in told if isinstance(c, CutRequest)] == ["r1"]
    w.do(RequestFinished("r1"))
    assert w.state("m") is State.STOPPING
    w.do(EngineStopped("m"))
    assert w.ask("r2", "m") == [StartEngine("m", Placement((1,)), 30 * GiB)]


def test_before_the_machine_sleeps_devices_are_left_for_that_reason() -> None:
    """Who waits reads it, and comes up once the machine is awake."""
    w = World([model("m", 30)], [GPU])
    w.load("m")
    (stop,) = w.do(DeviceDrained(0, True, "the machine is about to sleep"))
    assert isinstance(stop, StopEngine) and "about to sleep" in stop.reason
    w.do(EngineStopped("m"))
    assert w.ask("r1", "m") == []
    assert "the machine is about to sleep" in w.seen.models[0].waiting_for
    assert w.do(DeviceDrained(0, False)) == [StartEngine("m", Placement((0,)), 30 * GiB)]


def test_a_drained_device_gets_nothing_until_it_is_given_back() -> None:
    """Maintenance: what runs there comes to its end, what comes waits or goes elsewhere."""
    w = World([model("m", 30)], [GPU])
    w.load("m")
    (stop,) = w.do(DeviceDrained(0))
    assert isinstance(stop, StopEngine) and "maintenance" in stop.reason
    w.do(EngineStopped("m"))
    assert w.ask("r1", "m") == []
    assert "an operator drained it" in w.seen.models[0].waiting_for
    assert w.do(DeviceDrained(0, drained=False)) == [StartEngine("m", Placement((0,)), 30 * GiB)]


def test_a_drained_device_that_goes_and_comes_back_is_still_drained() -> None:
    """It is being repaired: who plugs it in to look at it wants nothing on it yet. Of one that was never there it is
    told that there is none, so it is not remembered."""
    w = World([model("m", 30, devices=(1,)), model("n", 30, devices=(2,))], PAIR)
    w.do(DeviceDrained(1))
    w.do(DeviceDrained(2))
    w.do(DevicesChanged(PAIR[:1]))
    w.do(DevicesChanged((*PAIR, Device(2, "gpu2", 80 * GiB))))
    assert w.ask("r1", "m") == []
    assert w.ask("r2", "n") == [StartEngine("n", Placement((2,)), 30 * GiB)]
    assert w.do(DeviceDrained(1, drained=False)) == [StartEngine("m", Placement((1,)), 30 * GiB)]
    w.do(DeviceDrained(7, drained=False))
    assert [each.why for each in w.seen.decisions if each.what == "undrain"] == ["device 1: by an operator"]


def test_another_device_with_the_number_of_a_drained_one_is_not_drained() -> None:
    """The CPU is used where the last GPU has gone; and what has come back with another number is drained there."""
    a, b = Device(0, "GPU-a", 80 * GiB, runtime="cuda"), Device(0, "GPU-b", 80 * GiB, runtime="cuda")
    w = World([model("m", 30)], [a])
    w.do(DeviceDrained(0))
    w.do(DevicesChanged((b,)))
    assert [d.drained for d in w.seen.devices] == [False]
    w.do(DevicesChanged((b, replace(a, index=1))))
    assert [(d.index, d.drained) for d in w.seen.devices] == [(0, False), (1, True)]
    assert w.seen.drained == {1}
    w.do(DeviceDrained(0, drained=False))
    w.do(DeviceDrained(1, drained=False))
    assert (w.seen.drained, [d.drained for d in w.seen.devices]) == (frozenset(), [False, False])


def test_a_drained_device_that_is_gone_can_be_given_back() -> None:
    """By the number that it had; until then whoever looks is told that it is drained."""
    w = World([model("m", 30)], PAIR)
    w.do(DeviceDrained(1))
    w.do(DevicesChanged(PAIR[:1]))
    assert w.seen.drained == {1}
    w.do(DeviceDrained(1, drained=False))
    w.do(DevicesChanged(PAIR))
    assert (w.seen.drained, [d.drained for d in w.seen.devices]) == (frozenset(), [False, False])


def test_a_device_that_is_gone_is_forgotten_once_nobody_holds_any_of_it() -> None:
    """And one that comes is used."""
    w = World([model("m", 30), model("n", 60)], [GPU])
    w.load("m")
    w.do(DevicesChanged((PAIR[1],)))
    assert [(d.index, d.wedged) for d in w.seen.devices] == [(0, "it is not there any more"), (1, "")]
    assert w.ask("r1", "n") == [StartEngine("n", Placement((1,)), 60 * GiB)]


def test_a_swap_to_a_device_that_goes_meanwhile_is_called_off_and_who_waits_is_told() -> None:
    """The swap would look for room on a device without an account; and nobody is to wait for what cannot be now."""
    w = World([model("m", 60), model("wide", 60, device_count=2)], PAIR)
    w.load("m")
    assert [type(command) for command in w.ask("r", "wide")] == [SleepEngine]
    assert w.view("m").devices == (0,)
    (told,) = w.do(DevicesChanged(PAIR[:1]))
    assert isinstance(told, Reject)
    assert told.message == "'wide' needs 2 devices, and there is 1 for it"
    w.answer("m")
    assert w.state("m") is State.SLEEPING
    assert [d.what for d in w.seen.decisions if d.model == "wide"][-2:] == ["cancel", "refuse"]


def test_what_others_hold_of_a_device_is_not_held_of_another_one_in_its_place() -> None:
    """A GPU, or the CPU, was device 0 until devices were declared, of which nobody reads what others hold."""
    before = Device(0, "GPU-a", 24 * GiB, runtime="cuda")
    w = World([model("m", 20)], [before])
    w.do(MemorySampled({0: 9 * GiB}, {}))
    assert w.seen.devices[0].external == 9 * GiB
    w.do(DevicesChanged((Device(0, "0", 24 * GiB),)))
    assert w.seen.devices[0].external == 0
    assert w.ask("r1", "m") == [StartEngine("m", Placement((0,)), 20 * GiB)]


@pytest.mark.parametrize("left", [PAIR[:1], ()])
def test_nobody_waits_for_a_device_that_is_gone_and_still_held(left: tuple[Device, ...]) -> None:
    """It was counted as one on which a model might fit, for as long as the engine on it had not ended, and ever after.
    Where no device is left at all, models start without one, as on any machine that has none."""
    w = World([model("m", 30, devices=(1,)), model("n", 60, devices=(1,))], PAIR)
    w.load("m")
    w.do(DevicesChanged(left))
    assert w.view("m").devices == (1,)
    (told,) = w.ask("r1", "n")
    if left:
        assert isinstance(told, Reject) and told.message == "'n' needs 1 device, and there are none for it"
    else:
        assert told == StartEngine("n", Placement(()), 60 * GiB)


def test_a_reserve_that_changes_is_kept_from_now_on() -> None:
    """As after a reload: what is promised stays, what is free is reckoned anew."""
    w = World([model("m", 70)], [GPU])
    smaller = type(GPU)(0, "gpu0", 80 * GiB, reserve=20 * GiB)
    w.do(DevicesChanged((smaller,)))
    (refused,) = w.ask("r1", "m")
    assert isinstance(refused, Reject) and refused.error == "ModelTooLarge"


def four(
    links: dict[int, set[int]] | None = None, nodes: tuple[int | None, ...] = (None,) * 4, switches: str = "    "
) -> list[Device]:
    """Four alike, joined so."""
    joined, names = links or {}, [switch.strip() for switch in switches]
    return [
        Device(i, f"gpu{i}", 80 * GiB, links=frozenset(joined.get(i, ())), node=nodes[i], switch=names[i])
        for i in range(4)
    ]


@pytest.mark.parametrize(
    ("devices", "where"),
    [
        (four(), (0, 1)),
        (four({0: {2}, 2: {0}, 1: {3}, 3: {1}}), (0, 2)),  # bridges between pairs
        (four(nodes=(0, 1, 1, 0)), (0, 3)),
        (four({1: {2}, 2: {1}}, (0, 1, 1, 0)), (1, 2)),  # a bridge is nearer than a node
        (four(nodes=(0, 0, 0, 0), switches="aba "), (0, 2)),  # as is a switch
        (four({1: {2}, 2: {1}}, switches="aba "), (1, 2)),  # than which a bridge is nearer
    ],
)
def test_a_model_on_several_devices_gets_such_as_are_near_each_other(
    devices: list[Device], where: tuple[int, ...]
) -> None:
    """NVLink first, then the same PCIe switch, then the same NUMA node, then as ever."""
    w = World([model("m", 30, device_count=2)], devices)
    (start,) = w.ask("r1", "m")
    assert isinstance(start, StartEngine) and start.placement == Placement(where)


def test_a_swap_that_costs_the_same_anywhere_goes_where_devices_are_near() -> None:
    """Four are full alike; the two that are to become free are a pair."""
    pairs = four({0: {2}, 2: {0}, 1: {3}, 3: {1}})
    residents = [model(f"r{i}", 60, devices=(i,)) for i in range(4)]
    w = World([*residents, model("m", 60, device_count=2)], pairs)
    for resident in residents:
        w.load(resident.name)
    told = w.ask("r1", "m")
    leaving = sorted(command.replica for command in told if isinstance(command, SleepEngine | StopEngine))
    assert leaving in (["r0", "r2"], ["r1", "r3"])


def test_nearness_gives_way_to_room() -> None:
    """A pair of which one is taken is no pair."""
    pairs = four({0: {1}, 1: {0}, 2: {3}, 3: {2}})
    w = World([model("n", 60, devices=(1,)), model("m", 30, device_count=2)], pairs)
    w.load("n")
    (start,) = w.ask("r1", "m")
    assert isinstance(start, StartEngine) and start.placement == Placement((2, 3))


def test_that_devices_answer_is_told_only_after_it_was_told_that_they_did_not() -> None:
    """They are read at each start: of that a journal need not tell anything."""
    w = World([], [])
    for unknown, asking in (("yet to be read", True), ("", False), ("the driver is gone", False)):
        w.do(DevicesChanged(PAIR, unknown, asking))
    for unknown, asking in (("yet to be read", True), ("", False), ("", False)):
        w.do(DevicesChanged(PAIR, unknown, asking))
    told = [each.why for each in w.seen.decisions if each.what == "devices"]
    assert told == ["the driver is gone", "there are 2, and they answer"]
