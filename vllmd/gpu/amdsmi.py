"""AMD's management library, through its Python package ``amdsmi``, where that is installed and answers.

It reads the same driver as ``sysfs`` does, by the newest names of each field, and sees processes that our user may not
look at. Each field that it does not tell is taken from the driver's files, so a library that is too old, too new or
not allowed to open anything costs nothing. Written for 6.2 to 7.0; tests bring their own module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from vllmd.gpu.sysfs import UNCORRECTED, AmdDevices, Card
from vllmd.gpu.trouble import Presence

T = TypeVar("T")


class SmiDevices(AmdDevices):
    """amdgpu's devices. Raises whatever the library raises if it cannot be begun with."""

    def __init__(
        self, reserve: int, here: Presence, env: Mapping[str, str], known: Mapping[str, int], amdsmi: Any
    ) -> None:
        self._smi = amdsmi
        amdsmi.amdsmi_init()
        self._handles = self._by_address()
        super().__init__(reserve, here, env, known)
        self.notes = (*self.notes, f"amdsmi {getattr(amdsmi, '__version__', '')}".strip())

    def close(self) -> None:
        """Shut the library down; harmless if that fails."""
        with suppress(Exception):
            self._smi.amdsmi_shut_down()

    def _by_address(self) -> dict[str, Any]:
        found = {}
        for handle in self._smi.amdsmi_get_processor_handles():
            with suppress(Exception):
                found[self._smi.amdsmi_get_gpu_device_bdf(handle).lower()] = handle
        return found

    def _field(self, card: Card, read: Callable[[Any], T | None]) -> T | None:
        """One field of a device; None where the library does not tell it ("N/A", or an exception)."""
        handle = self._handles.get(card.address)
        if handle is None:
            return None
        try:
            return read(handle)
        except Exception:
            return None

    def memory(self, card: Card) -> int | None:
        smi = self._smi
        figure = self._field(card, lambda handle: smi.amdsmi_get_gpu_memory_total(handle, smi.AmdSmiMemoryType.VRAM))
        return figure or super().memory(card)

    def used(self, card: Card, held: int) -> int:
        smi = self._smi
        figure = self._field(card, lambda handle: smi.amdsmi_get_gpu_memory_usage(handle, smi.AmdSmiMemoryType.VRAM))
        return super().used(card, held) if figure is None else int(figure)

    def watts(self, index: int, card: Card) -> float | None:
        names = ("socket_power", "current_socket_power", "average_socket_power")
        figure = self._field(card, lambda handle: _first(self._smi.amdsmi_get_power_info(handle), names))
        return super().watts(index, card) if figure is None else figure

    def busy(self, card: Card) -> float | None:
        figure = self._field(card, lambda handle: _first(self._smi.amdsmi_get_gpu_activity(handle), ("gfx_activity",)))
        return super().busy(card) if figure is None else figure

    def fault(self, card: Card) -> str:
        errors = self._field(card, lambda h: int(self._smi.amdsmi_get_gpu_total_ecc_count(h)["uncorrectable_count"]))
        return UNCORRECTED.format(errors) if errors else super().fault(card)

    def _processes(self) -> tuple[dict[str, dict[int, int]], bool]:
        """The processes that the driver's files show, and those that only the library sees."""
        seen, blind = super()._processes()
        for card in self._cards.values():
            listed = self._field(card, self._smi.amdsmi_get_gpu_process_list)
            sizes = seen.setdefault(card.address, {})
            for process in listed or ():
                pid, size = process.get("pid"), _first(process.get("memory_usage", {}), ("vram_mem",))
                if pid and size is not None:
                    sizes[int(pid)] = max(sizes.get(int(pid), 0), int(size))
        return seen, blind


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    """The first of these fields that is a number; the library says "N/A" for what a device does not have."""
    values = (fields.get(name) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float) and value), None)


def load() -> Any | None:
    """The module, or None: it is not installed, or finds no library of ROCm's."""
    try:
        return importlib.import_module("amdsmi")
    except Exception:  # ImportError, OSError, KeyError: whatever looking for the library came to
        return None
