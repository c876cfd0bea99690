"""The devices that the daemon's environment leaves, by the rules of each vendor's runtime.

CUDA_VISIBLE_DEVICES; ROCR_VISIBLE_DEVICES and below it HIP_VISIBLE_DEVICES (or CUDA's variable, which HIP takes too);
ZE_AFFINITY_MASK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from vllmd.frozen import frozen

VARIABLE = "CUDA_VISIBLE_DEVICES"
ROCR, HIP, ZE = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"


@frozen
class Visible:
    """The indices of visible devices, in NVML's order, and a note for operators ("" for none)."""

    indices: tuple[int, ...]
    note: str = ""
    empty: bool = False  # the variable hides all devices


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


@frozen
class Remaining:
    """The visible devices: place among all devices -> the number for engines, None if they must use the id.

    ``note``: a note for operators, "" for none.
    """

    numbers: Mapping[int, int | None] = field(default_factory=dict)
    note: str = ""


def left_of(runtime: str, env: Mapping[str, str], ids: Sequence[str]) -> Remaining:
    """The devices that ``env`` leaves to the runtime ``hip`` or ``xpu``. ``ids``: of all devices, in its order.

    HIP's numbers count within ROCR_VISIBLE_DEVICES, which engines may or may not inherit. So if it is set, engines get
    ids, in that same variable; a device without an id of AMD's keeps its number within it.
    """
    everything = tuple(range(len(ids)))
    if runtime == "xpu":
        mask = env.get(ZE)
        entries = [entry.split(".")[0] for entry in mask.split(",")] if mask else []  # a tile counts as its card
        chosen = _chosen(list(dict.fromkeys(entries)), ids) if mask else everything
        return Remaining({place: place for place in chosen}, f"{ZE}={mask}" if mask else "")
    rocr = env.get(ROCR)
    first = _chosen(rocr.split(","), ids) if rocr is not None else everything
    variable = HIP if HIP in env else VARIABLE
    hip = env.get(variable)
    second = _chosen(hip.split(","), [""] * len(first)) if hip is not None else tuple(range(len(first)))
    by_id = rocr is not None
    numbers = {first[i]: None if by_id and ids[first[i]].startswith("GPU-") else i for i in second}
    values = ((ROCR, rocr), (variable, hip))
    return Remaining(numbers, ", ".join(f"{name}={value}" for name, value in values if value is not None))


def _chosen(entries: Sequence[str], ids: Sequence[str]) -> tuple[int, ...]:
    """The places of the entries, up to the first one that means no device or one that was named before."""
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
