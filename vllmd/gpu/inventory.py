"""What every source of devices tells without reading them."""

from __future__ import annotations

from vllmd.core.types import Device


class Inventory:
    """The devices as they were found at first, and notes for people about how."""

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
        """Nothing is held open."""
