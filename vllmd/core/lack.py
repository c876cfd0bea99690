"""What devices can never give a model, decided here and worded here: for the scheduler, the checks and the estimates.

Only the figures differ: a configuration's check knows what is configured, an estimate what the files tell, and the
scheduler what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllmd.core.types import Device
from vllmd.sizes import in_words


class Lack(NamedTuple):
    """``there``: the devices that the model may use. ``size``: bytes that it needs of each; None: they are too few."""

    number: int
    there: Sequence[Device]
    size: int | None

    def of(self, subject: str, why: str = "") -> str:
        """The lack in words. ``subject``: who needs it; ``why``: where the size comes from."""
        if self.size is None:
            there = "is 1" if len(self.there) == 1 else f"are {len(self.there) or 'none'}"
            return f"{subject} needs {_devices(self.number)}, and there {there} for it"
        alike: dict[str, list[str]] = {}
        for device in self.there:
            has = in_words(device.memory)
            if device.reserve:
                room = in_words(max(0, device.memory - device.reserve))
                has += f" less a reserve of {in_words(device.reserve)}: {room}"
            alike.setdefault(has, []).append(str(device.index))
        sizes = "; ".join(
            f"device {on[0]} has {has}" if len(on) == 1 else f"devices {', '.join(on)} have {has} each"
            for has, on in alike.items()
        )
        reason, each = f" ({why})" if why else "", "each of " * (self.number > 1) + _devices(self.number)
        return f"{subject} needs {in_words(self.size)} on {each}{reason}; {sizes}"


def lack(devices: Sequence[Device], count: int, need: Callable[[Device], int | None]) -> Lack | None:
    """What these devices lack with nobody else on them; None if they are enough.

    ``need``: bytes that the model takes of a device that it has to itself; None: it does not start there.
    """
    if len(devices) < count:
        return Lack(count, devices, None)
    sizes = [(need(device), device.memory - device.reserve) for device in devices]
    if sum(size is not None and size <= room for size, room in sizes) >= count:
        return None
    return Lack(count, devices, max([size or 0 for size, _ in sizes], default=0))


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
