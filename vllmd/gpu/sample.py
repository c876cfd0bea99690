"""One reading of the devices. Memory in bytes, power in watts, utilisation in per cent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from vllmd.frozen import frozen
from vllmd.sizes import in_words


@frozen
class DeviceSample:
    """The figures of one device.

    ``processes``: pid -> bytes. ``unsized``: processes on the device without a known size. ``hides_processes``: memory
    is in use and no process can be seen, because the daemon is in another pid namespace than the driver; then a pid's
    absence means nothing. ``temperature`` in degrees Celsius. ``throttled``: why the device is slowed down; "" if it is
    not.
    """

    total: int
    used: int
    free: int
    processes: Mapping[int, int] = field(default_factory=dict)
    unsized: frozenset[int] = frozenset()
    hides_processes: bool = False
    name: str = ""
    power: float | None = None
    utilisation: float | None = None
    temperature: float | None = None
    throttled: str = ""

    @property
    def ownerless(self) -> int:
        """Bytes in use beyond those of its processes: the driver's own, or unaccounted for."""
        return max(0, self.used - sum(self.processes.values()))


@frozen
class Sample:
    """Per device index its figures, or in ``failed`` why it could not be read. No index is in both.

    ``ill``: devices that work and should not be used, with why. ``lost``: those of ``failed`` that are off the bus or
    do nothing until they are reset.
    """

    devices: Mapping[int, DeviceSample] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    ill: Mapping[int, str] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def silent(self) -> str:
        """Why nothing at all could be read, where that is so."""
        return "" if self.devices else next(iter(self.failed.values()), "")


def absurdity(total: int, used: int, free: int, known_total: int) -> str:
    """Why a device's figures cannot be true; "" if they can."""
    figures = f"{in_words(used)} used and {in_words(free)} free of {in_words(total)}"
    if total <= 0 or used < 0 or free < 0:
        return f"it reports impossible figures: {figures}"
    if used > total or free > total:
        return f"it reports more memory than it has: {figures}"
    if total != known_total:
        return f"its size changed from {in_words(known_total)} to {in_words(total)} (MIG reconfigured?); restart vllmd"
    return ""
