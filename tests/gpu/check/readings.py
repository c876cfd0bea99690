"""NVML against torch's own figures, what torch takes as CUDA_VISIBLE_DEVICES, and what the driver tells at all."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.gpu.check.bench import Bench, GiB, MiB, gib

HELD = 2 * GiB
ROUNDING = 64 * MiB
CONTEXT_LIMIT = 2 * GiB

# Holds memory, tells what torch makes of the device, and goes on when it is told to.
HOLDER = """
import json, os, sys, time
began = time.monotonic()
import torch
imported = time.monotonic()
size = int(sys.argv[1])
torch.cuda.init()
ready = time.monotonic()
block = torch.empty(size, dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
from vllmd.config.types import Config
from vllmd.gpu import open_devices
devices = open_devices(Config(), {})
mine = [device for device in devices.inventory() if device.id == sys.argv[2]][0]
free, total = torch.cuda.mem_get_info(0)
sample = devices.sample().devices[mine.index]
told = torch.cuda.get_device_properties(0)
uuid = str(getattr(told, "uuid", ""))
print(json.dumps({"pid": os.getpid(), "free": free, "total": total, "properties": told.total_memory,
                  "name": told.name, "uuid": uuid, "nvml_free": sample.free, "nvml_total": sample.total,
                  "mine": sample.processes.get(os.getpid()), "processes": len(sample.processes),
                  "unsized": len(sample.unsized), "hides": sample.hides_processes,
                  "torch": torch.__version__, "cuda": str(torch.version.cuda),
                  "import": imported - began, "init": ready - imported}))
"""
VISIBLE = """
import json, torch
count = torch.cuda.device_count()
name = ""
try:
    torch.cuda.init()
    name = torch.cuda.get_device_name(0)
    held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda:0").numel()
except Exception as error:
    held, name = 0, f"{type(error).__name__}: {error}".splitlines()[0][:120]
print(json.dumps({"count": count, "held": held, "name": name}))
"""
WATTS = """
import json, sys, time, torch
size, settle = int(sys.argv[1]), float(sys.argv[2])
torch.cuda.init()
block = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
time.sleep(settle)
from vllmd.config.types import Config
from vllmd.gpu import open_devices
devices = open_devices(Config(), {})
seen = []
for _ in range(20):
    seen += [each.power for index, each in devices.sample().devices.items() if each.power is not None]
    time.sleep(0.1)
print(json.dumps({"watts": sum(seen) / len(seen) if seen else None}))
"""


def run(bench: Bench) -> None:
    """The cheap readings first: they are the ones without which the others mean nothing."""
    idle = _power(bench)  # before anything of ours has woken the device: its clocks stay up for a while
    _cost(bench)
    _figures(bench)
    _visible(bench)
    _watts(bench, idle)
    bench.facts.update(facts())


def _cost(bench: Bench) -> None:
    """What one reading costs the daemon, and that an idle device is idle."""
    bench.sample()
    each = min(_took(bench.sample) for _ in range(20))  # the others had to wait for something else
    bench.table.add("one reading of the device", "< 50 ms", f"{each * 1000:.2f} ms", each < 0.05)
    sample = bench.sample()
    gap = abs(sample.used + sample.free - sample.total)
    bench.table.add("used + free = total", gib(sample.total), gib(sample.used + sample.free), gap <= ROUNDING)
    bench.table.figure("in use before anything of ours", f"{gib(sample.used)}, {len(sample.processes)} processes")


def _took(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _figures(bench: Bench) -> None:
    """The same device by NVML and by torch, while one process holds 2 GiB."""
    told = bench.script(HOLDER, str(HELD), bench.device.id, CUDA_VISIBLE_DEVICES=bench.device.id)
    add = bench.table.add
    add("torch", "", f"{told['torch']}, CUDA {told['cuda']}, import {told['import']:.1f} s, init {told['init']:.1f} s")
    add("name", bench.device.name, told["name"], told["name"] == bench.device.name)
    same = not told["uuid"] or told["uuid"] in bench.device.id
    add("UUID", bench.device.id, told["uuid"] or "torch tells none", same)
    # CUDA leaves out what the driver keeps for itself, NVML's first call counts it as used.
    add("total by NVML less total by torch", "0 to 2 GiB", gib(told["nvml_total"] - told["total"]),
        0 <= told["nvml_total"] - told["total"] <= 2 * GiB)  # fmt: skip
    add("free by NVML and by torch", gib(told["free"]), gib(told["nvml_free"]),
        abs(told["free"] - told["nvml_free"]) <= ROUNDING)  # fmt: skip
    if told["mine"] is None:
        where = "hides processes" if told["hides"] else f"lists {told['processes']}, {told['unsized']} without size"
        add("its process by pid", "listed with a size", f"NVML {where}", False)
        return
    context = told["mine"] - HELD
    add("2 GiB held, by pid", "2.00 GiB + context", f"{gib(HELD)} + {gib(context)}", 0 <= context <= CONTEXT_LIMIT)


def _visible(bench: Bench) -> None:
    """Every spelling by which an engine may be given its device."""
    index = str(bench.device.index)
    spellings = {"index": index, "UUID": bench.device.id, "UUID's first 12": bench.device.id[:12], "nothing": ""}
    told_by = bench.scripts(VISIBLE, {what: ((), {"CUDA_VISIBLE_DEVICES": to}) for what, to in spellings.items()})
    empty = told_by.pop("nothing")
    for what, told in told_by.items():
        good = told["count"] == 1 and told["held"] > 0
        bench.table.add(f"CUDA_VISIBLE_DEVICES as {what}", "1 device", f"{told['count']}, {told['name']}", good)
    bench.table.add("CUDA_VISIBLE_DEVICES empty", "0 devices", str(empty["count"]), empty["count"] == 0)


def _watts(bench: Bench, idle: float | None) -> None:
    """What an idle loaded model costs: a context alone, and a context that holds half of the memory."""
    if idle is None:
        bench.table.figure("power", "the device tells none")
        return
    bench.table.figure("power, nothing loaded", f"{idle:.1f} W")
    for what, size in (("a context alone", 0), ("a context that holds half of the memory", bench.sample().free // 2)):
        told = bench.script(WATTS, str(size), f"{bench.settle}", CUDA_VISIBLE_DEVICES=bench.device.id)
        watts = "not told" if told["watts"] is None else f"{told['watts']:.1f} W"
        bench.table.figure(f"power, idle with {what} for {bench.settle:.0f} s", watts)
    time.sleep(bench.settle)
    bench.table.figure(f"power, {bench.settle:.0f} s after that", f"{_power(bench) or 0.0:.1f} W")


def _power(bench: Bench) -> float | None:
    """The mean of a second, in watts."""
    seen = []
    for _ in range(10):
        seen.append(bench.sample().power)
        time.sleep(0.1)
    told = [each for each in seen if each is not None]
    return sum(told) / len(told) if told else None


def facts() -> dict[str, Any]:
    """Everything that NVML and the kernel tell of the devices here; what a call refuses, with its words."""
    nodes = sorted(str(path) for pattern in ("nvidia*", "nvidia-caps/*", "dri/*", "dxg", "kfd")
                   for path in Path("/dev").glob(pattern))  # fmt: skip
    found: dict[str, Any] = {"nodes": [f"{path} {os.stat(path).st_mode:o}" for path in nodes]}
    for path in ("/proc/driver/nvidia/version", "/proc/devices", "/proc/self/cgroup", "/sys/module/nvidia/version"):
        with suppress(OSError):
            found[path] = Path(path).read_text()
    with suppress(Exception):
        found["nvml"] = list(_asked(importlib.import_module("pynvml")))
    return found


def _asked(nvml: Any) -> Iterator[str]:
    nvml.nvmlInit()
    for name in ("nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion", "nvmlSystemGetCudaDriverVersion_v2"):
        yield _answer(nvml, name)
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        for call, *more in _CALLS:
            yield f"{index}: " + _answer(nvml, call, handle, *more)


_CALLS: tuple[tuple[Any, ...], ...] = (
    ("nvmlDeviceGetUUID",),
    ("nvmlDeviceGetPciInfo",),
    ("nvmlDeviceGetMemoryInfo",),
    ("nvmlDeviceGetMemoryInfo", 0x2000028),
    ("nvmlDeviceGetBAR1MemoryInfo",),
    ("nvmlDeviceGetComputeRunningProcesses",),
    ("nvmlDeviceGetGraphicsRunningProcesses",),
    ("nvmlDeviceGetMPSComputeRunningProcesses",),
    ("nvmlDeviceGetMigMode",),
    ("nvmlDeviceGetComputeMode",),
    ("nvmlDeviceGetPersistenceMode",),
    ("nvmlDeviceGetPowerUsage",),
    ("nvmlDeviceGetPowerManagementLimit",),
    ("nvmlDeviceGetTotalEnergyConsumption",),
    ("nvmlDeviceGetUtilizationRates",),
    ("nvmlDeviceGetTemperature", 0),
    ("nvmlDeviceGetCurrentClocksEventReasons",),
    ("nvmlDeviceGetCurrentClocksThrottleReasons",),
    ("nvmlDeviceGetEccMode",),
    ("nvmlDeviceGetTotalEccErrors", 1, 0),
    ("nvmlDeviceGetTotalEccErrors", 0, 0),
    ("nvmlDeviceGetRetiredPagesPendingStatus",),
    ("nvmlDeviceGetRemappedRows",),
    ("nvmlDeviceGetGpuFabricInfo",),
    ("nvmlDeviceGetNumaNodeId",),
    ("nvmlDeviceGetMemoryAffinity", 4, 0),
    ("nvmlDeviceGetCpuAffinity", 4),
    ("nvmlDeviceGetCpuAffinityWithinScope", 4, 0),
    ("nvmlDeviceGetNvLinkState", 0),
    ("nvmlDeviceGetMinorNumber",),
    ("nvmlDeviceGetArchitecture",),
    ("nvmlDeviceGetCudaComputeCapability",),
    ("nvmlDeviceGetVirtualizationMode",),
    ("nvmlDeviceGetAddressingMode",),
    ("nvmlDeviceGetCurrPcieLinkGeneration",),
    ("nvmlDeviceGetCurrPcieLinkWidth",),
)


def _answer(nvml: Any, name: str, *arguments: Any) -> str:
    began = time.perf_counter()
    try:
        value = getattr(nvml, name)(*arguments)
        shown = [str(each) for each in value] if isinstance(value, list) else str(value)
    except Exception as error:
        shown = f"{type(error).__name__}: {error}"
    return f"{name}{arguments[1:] or ''} = {shown} [{(time.perf_counter() - began) * 1000:.2f} ms]"
