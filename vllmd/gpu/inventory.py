"""The devices of a source as they were found, without reading them again."""

from __future__ import annotations

from vllmd.core.types import Device
from vllmd.gpu.sample import Sample
from vllmd.gpu.trouble import Trouble


class Inventory:
    """The devices as they were found at first, and notes about them for operators.

    ``trouble``: why the devices are not known; then the inventory is empty. ``asking``: they may be known in a moment.
    """

    trouble: Trouble | None = None
    asking = False

    def __init__(self, devices: tuple[Device, ...] = (), notes: tuple[str, ...] = ()) -> None:
        self._inventory = devices
        self.notes = notes

    @property
    def note(self) -> str:
        """The notes as one line."""
        return "; ".join(self.notes)

    def inventory(self) -> tuple[Device, ...]:
        """The devices; never asks the driver."""
        return self._inventory

    def close(self) -> None:
        """Nothing to free: no library is held open."""


class NoDevices(Inventory):
    """A machine without any: engines run on the CPU, and only host memory counts."""

    source = "none"
    readable = False

    def __init__(self, why: str) -> None:
        super().__init__(notes=(why,))

    def sample(self) -> Sample:
        """Always empty: there is nothing to read."""
        return Sample()


class Unanswered(Inventory):
    """Something is there that does not answer, so the devices are not known."""

    readable = False

    def __init__(self, source: str, trouble: Trouble, *, asking: bool = False) -> None:
        super().__init__(notes=(str(trouble),))
        self.source, self.trouble, self.asking = source, trouble, asking

    def sample(self) -> Sample:
        """Always empty: the devices do not answer."""
        return Sample()
