"""The environment variables by which an engine gets its devices, for each vendor's runtime."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.core.types import Device

NUMBERS = {"cuda": "CUDA_VISIBLE_DEVICES", "hip": "HIP_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
IDS = {**NUMBERS, "hip": "ROCR_VISIBLE_DEVICES"}  # HIP's own takes numbers alone
ORDER = {"cuda": ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), "xpu": ("ZE_ENABLE_PCI_ID_DEVICE_ORDER", "1")}


def environment(devices: Sequence[Device]) -> dict[str, str]:
    """The variables for an engine on these devices, in their order; none without devices.

    As numbers where all of them have one: every version of every engine takes those (vLLM up to 0.23 does ``int()`` on
    them). As ids where it is not certain how the runtime counts: MIG slices have no number, and a runtime leaves out
    cards that it does not know. docs/gpus.md has what which vLLM takes.
    """
    if not devices:
        return {}
    runtime = devices[0].runtime or "cuda"
    numbers = [device.number for device in devices]
    known = [str(number) for number in numbers if number is not None]
    if len(known) == len(devices):
        variable = {NUMBERS[runtime]: ",".join(known)}
    else:
        variable = {IDS[runtime]: ",".join(device.id for device in devices)}
    return {**variable, **dict([ORDER[runtime]] if runtime in ORDER else [])}
