"""CUDA_VISIBLE_DEVICES: which devices the environment leaves to us, by CUDA's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Visible:
    """Indices that are left, in NVML's order, and what there is to say about it ("" for nothing)."""

    indices: tuple[int, ...]
    note: str = ""
    empty: bool = False  # somebody wants it so that none is left


def visible(env: Mapping[str, str], uuids: Sequence[str]) -> Visible:
    """The devices that ``env`` leaves of those with these UUIDs (in NVML's order).

    As CUDA does, the list is read up to its first entry that means no device;
    a UUID may be shortened to any prefix that fits only one device. A number is
    NVML's (that is nvidia-smi's), which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if VARIABLE not in env:
        return Visible(tuple(range(len(uuids))))
    chosen: list[int] = []
    entries = [entry.strip() for entry in env[VARIABLE].split(",")]
    for entry in entries:
        index = _index_of(entry, uuids)
        if index is None or index in chosen:
            return Visible(tuple(sorted(chosen)), _note(env[VARIABLE], entry, chosen), not chosen)
        chosen.append(index)
    return Visible(tuple(sorted(chosen)), f"{VARIABLE}={env[VARIABLE]}")


def _index_of(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    hits = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return hits[0] if entry and len(hits) == 1 else None


def _note(value: str, stop: str, chosen: Sequence[int]) -> str:
    if not chosen and stop in ("", "-1", "NoDevFiles"):
        return f"{VARIABLE}={value!r} hides every device"
    return f"{VARIABLE}={value!r}: {stop!r} is no device or named twice, so CUDA ignores it and all after it"
