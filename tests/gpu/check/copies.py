"""What moving weights between host and device costs, against what the core expects of a sleep and of a wake."""

from __future__ import annotations

import os

from tests.gpu.check.bench import Bench, GiB, gib
from vllmd.core.costs import Costs

# One direction and kind of host memory at a time, so that the host never holds more than one such block.
SCRIPT = """
import json, sys, time, torch
size, pinned = int(sys.argv[1]), sys.argv[2] == "pinned"
device = torch.empty(size, dtype=torch.uint8, device="cuda:0")
device.fill_(7)
torch.cuda.synchronize()
began = time.perf_counter()
host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
if not pinned:
    host.fill_(1)  # pages are there only once they are touched
told = {"allocate": time.perf_counter() - began}
def timed(copy):
    torch.cuda.synchronize()
    began = time.perf_counter()
    copy()
    torch.cuda.synchronize()
    return time.perf_counter() - began
told["down"] = [timed(lambda: host.copy_(device, non_blocking=pinned)) for _ in range(2)]
told["up"] = [timed(lambda: device.copy_(host, non_blocking=pinned)) for _ in range(2)]
told["same"] = int(host[0]) == 7 and int(host[-1]) == 7
began = time.perf_counter()
del host
if pinned and hasattr(torch._C, "_host_emptyCache"):
    torch._C._host_emptyCache()
told["release"] = time.perf_counter() - began
began = time.perf_counter()
host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
if not pinned:
    host.fill_(1)
told["allocate_again"] = time.perf_counter() - began
print(json.dumps(told))
"""
FACTOR = 3.0  # slower than so many times the prior, and a first eviction would be decided on a wrong figure


def run(bench: Bench) -> None:
    """Down is what a sleep at level 1 does, up what its wake does; vLLM's host memory is pinned."""
    size = size_of(bench)
    bench.table.figure("block", f"{gib(size)}, {gib(available())} of host memory available")
    costs = Costs(size / 1e9)
    for kind in ("pinned", "pageable"):
        if bench.left < 40:
            bench.table.figure(f"{kind} host memory", "skipped: no time left")
            continue
        told = bench.script(SCRIPT, str(size), kind, CUDA_VISIBLE_DEVICES=bench.device.id)
        bench.table.add(f"{kind}: what was copied is what arrives", "yes", str(told["same"]), told["same"])
        bench.table.figure(
            f"{kind}: allocate, release, allocate again",
            f"{told['allocate']:.2f} s, {told['release']:.2f} s, {told['allocate_again']:.2f} s",
        )
        for what, key, prior in (("device to host", "down", costs.sleep(1)), ("host to device", "up", costs.wake(1))):
            first, again = told[key]
            seen = f"{first:.2f} s, again {again:.2f} s: {size / again / 1e9:.1f} GB/s"
            wanted = f"<= {FACTOR:.0f} x {prior:.2f} s, the core's prior" if kind == "pinned" else ""
            held = again <= prior * FACTOR if kind == "pinned" else None
            bench.table.add(f"{kind}: {what}", wanted, seen, held)


def size_of(bench: Bench) -> int:
    """20 GiB, or what device and host have room for."""
    return max(1, min(bench.copy_bytes, bench.sample().free - 2 * GiB, available() // 2))


def available() -> int:
    """Bytes of host memory that a process may still take."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
