"""Which devices the environment leaves to us, by the rules of each maker's runtime.

CUDA_VISIBLE_DEVICES; ROCR_VISIBLE_DEVICES and below it HIP_VISIBLE_DEVICES (or CUDA's variable, which HIP takes too);
ZE_AFFINITY_MASK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

VARIABLE = "CUDA_VISIBLE_DEVICES"
ROCR, HIP, ZE = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"


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


@dataclass(frozen=True, slots=True)
class Remaining:
    """By place among the devices that are there, for those that are left: the number for engines, None: an id is safer.

    ``note``: what there is to say about it; "" for nothing.
    """

    numbers: Mapping[int, int | None] = field(default_factory=dict)
    note: str = ""


def left_of(runtime: str, env: Mapping[str, str], ids: Sequence[str]) -> Remaining:
    """What ``env`` leaves to ``hip`` or ``xpu`` of the devices with these ids, in the order in which it counts.

    Engines may or may not inherit a ROCR_VISIBLE_DEVICES, in which HIP's numbers count. So those that it leaves are
    told by their ids, in that same variable; what has no id of AMD's keeps the number that it has in there.
    """
    everything = tuple(range(len(ids)))
    if runtime == "xpu":
        told = env.get(ZE)
        entries = [entry.split(".")[0] for entry in told.split(",")] if told else []  # tiles count as their cards
        chosen = _chosen(list(dict.fromkeys(entries)), ids) if told else everything
        return Remaining({place: place for place in chosen}, f"{ZE}={told}" if told else "")
    rocr = env.get(ROCR)
    first = _chosen(rocr.split(","), ids) if rocr is not None else everything
    variable = HIP if HIP in env else VARIABLE
    asked = env.get(variable)
    second = _chosen(asked.split(","), [""] * len(first)) if asked is not None else tuple(range(len(first)))
    by_id = rocr is not None
    numbers = {first[i]: None if by_id and ids[first[i]].startswith("GPU-") else i for i in second}
    told_both = ((ROCR, rocr), (variable, asked))
    return Remaining(numbers, ", ".join(f"{name}={value}" for name, value in told_both if value is not None))


def _chosen(entries: Sequence[str], ids: Sequence[str]) -> tuple[int, ...]:
    """Up to the first entry that means no device, or one that was named before."""
    chosen: list[int] = []
    for entry in entries:
        index = _index_of(entry.strip(), ids)
        if index is None or index in chosen:
            break
        chosen.append(index)
    return tuple(chosen)


def _index_of(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    hits = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return hits[0] if entry and len(hits) == 1 else None


def _note(value: str, stop: str, chosen: Sequence[int]) -> str:
    if not chosen and stop in ("", "-1", "NoDevFiles"):
        return f"{VARIABLE}={value!r} hides every device"
    return f"{VARIABLE}={value!r}: {stop!r} is no device or named twice, so CUDA ignores it and all after it"
