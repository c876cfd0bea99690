"""What a device draws is shared out among those who hold memory there, and summed up while it is read."""

from __future__ import annotations

from vllmd.core.types import GiB
from vllmd.daemon.power import Power
from vllmd.gpu import DeviceSample, Sample


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
