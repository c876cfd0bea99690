"""A stand-in for AMD's Python package ``amdsmi``: devices as data, failures on demand.

Written after the wheel of 7.0.2, whose functions these are, with the forms of their answers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class AmdSmiLibraryException(Exception):
    """The library's one exception, more or less."""


class AmdSmiMemoryType(enum.IntEnum):
    """Kinds of memory."""

    VRAM, VIS_VRAM, GTT = range(3)


@dataclass
class Card:
    """A device as the library has it. ``refuses``: functions that fail, by their name without ``amdsmi_get_``."""

    address: str
    total: int = 0
    used: int = 0
    held: dict[int, int] = field(default_factory=dict)
    power: Any = "N/A"
    busy: Any = "N/A"
    uncorrectable: int = 0
    refuses: frozenset[str] = frozenset()


class FakeAmdSmi:
    """What ``import amdsmi`` would give."""

    AmdSmiMemoryType = AmdSmiMemoryType
    __version__ = "7.0.2"

    def __init__(self, *cards: Card, broken: str = "") -> None:
        self.cards, self.broken, self.open = cards, broken, False

    def amdsmi_init(self) -> None:
        if self.broken:
            raise AmdSmiLibraryException(self.broken)
        self.open = True

    def amdsmi_shut_down(self) -> None:
        self.open = False

    def amdsmi_get_processor_handles(self) -> list[Card]:
        return list(self.cards)

    def amdsmi_get_gpu_device_bdf(self, card: Card) -> str:
        return _ask(card, "gpu_device_bdf").address.upper()

    def amdsmi_get_gpu_memory_total(self, card: Card, kind: AmdSmiMemoryType) -> int:
        return _ask(card, "gpu_memory_total").total if kind is AmdSmiMemoryType.VRAM else 0

    def amdsmi_get_gpu_memory_usage(self, card: Card, kind: AmdSmiMemoryType) -> int:
        return _ask(card, "gpu_memory_usage").used if kind is AmdSmiMemoryType.VRAM else 0

    def amdsmi_get_gpu_process_list(self, card: Card) -> list[dict[str, Any]]:
        held = _ask(card, "gpu_process_list").held
        return [{"name": "N/A", "pid": pid, "mem": size, "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": size}}
                for pid, size in held.items()]  # fmt: skip

    def amdsmi_get_power_info(self, card: Card) -> dict[str, Any]:
        power = _ask(card, "power_info").power
        return {"socket_power": "N/A", "current_socket_power": power, "average_socket_power": "N/A", "power_limit": 750}

    def amdsmi_get_gpu_activity(self, card: Card) -> dict[str, Any]:
        return {"gfx_activity": _ask(card, "gpu_activity").busy, "umc_activity": "N/A", "mm_activity": "N/A"}

    def amdsmi_get_gpu_total_ecc_count(self, card: Card) -> dict[str, int]:
        errors = _ask(card, "gpu_total_ecc_count").uncorrectable
        return {"correctable_count": 0, "uncorrectable_count": errors, "deferred_count": 0}


def _ask(card: Card, what: str) -> Card:
    if what in card.refuses:
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED")
    return card
