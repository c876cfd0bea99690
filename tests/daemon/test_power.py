"""What a device draws is shared out among those who hold memory there, and summed up while it is read."""

from __future__ import annotations

from vllmd.daemon.power import Power
from vllmd.gpu import DeviceSample, Sample
from vllmd.sizes import GiB


def drawing(*watts: float | None) -> Sample:
    return Sample({i: DeviceSample(80 * GiB, 0, 80 * GiB, power=power) for i, power in enumerate(watts)})


def test_shares_are_by_memory_and_joules_are_watts_times_seconds() -> None:
    """Alone on a device is all of it; a gap in which nobody looked is not guessed at; a device may tell nothing."""
    clock = [0.0]
    power = Power(lambda: clock[0])
    held = {("a", 0): 30 * GiB, ("b", 0): 10 * GiB, ("a", 1): GiB, ("c", 2): GiB, ("gone", 0): 0}
    power.note(drawing(400, 100, None), held)
    assert power.watts == {"a": 400.0, "b": 100.0}
    clock[0] = 5.0
    power.note(drawing(400, 100, None), held)
    assert power.joules == {"a": 2000.0, "b": 500.0}
    assert power.device_joules == {0: 2000.0, 1: 500.0}
    clock[0] = 500.0
    power.note(drawing(400, 100), {})
    assert power.watts == {}
    assert power.device_joules[0] == 2000.0


def test_what_engines_draw_unused_counts_from_their_last_request() -> None:
    """One that was used since the last reading begins anew, with what it drew after that; one that is busy has none."""
    clock = [0.0]
    power = Power(lambda: clock[0])
    held = {("a", 0): GiB, ("b", 1): GiB}
    seen = []
    for now, idle in (
        (0.0, {"a": 0.5}),
        (5.0, {"a": 5.5, "b": 2.0}),
        (10.0, {"a": 1.0, "b": 7.0}),
        (15.0, {"b": 12.0}),
    ):
        clock[0] = now
        power.note(drawing(100, 10), held, idle)
        seen.append(dict(power.since_used))
    assert seen == [{"a": 0.0}, {"a": 500.0, "b": 20.0}, {"a": 100.0, "b": 70.0}, {"b": 120.0}]
    assert power.unused_joules == {"a": 600.0, "b": 120.0}
    assert power.joules == {"a": 1500.0, "b": 150.0}
