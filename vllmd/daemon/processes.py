"""Processes on the devices: which engine each belongs to, and how to end one.

The daemon has no privileges. An engine is killed by the launcher, as a whole:
one that has lost a worker is of no use. A stranger is killed only if the operator
insists, only if it is seen on a GPU, and with the daemon's own rights; the
launcher, which could kill anything, is not used for that.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api.answers import GPUInfo, GPUProcess
from vllmd.errors import Conflict, Forbidden, NotFound, Unavailable, Unsupported

if TYPE_CHECKING:
    from vllmd.daemon.engine_manager import EngineManager
    from vllmd.daemon.engine_process import EngineProcess
    from vllmd.daemon.memory import Memory

KILL_LIMIT = 10.0  # seconds for a killed engine's cgroup to become empty


async def gpus(memory: Memory) -> list[GPUInfo]:
    """A ``GPUInfo`` per device that can be read. Raises Unsupported, Unavailable."""
    from vllmd.gpu import gpu_infos, the_cpu

    if memory.devices.trouble:
        raise Unavailable(f"the devices do not answer: {memory.trouble}", retry_after=5)
    if not memory.readable or the_cpu(memory.inventory):
        raise Unsupported(f"the GPUs of this machine cannot be read: {memory.source}")
    sample = await memory.sample()
    if sample is None:
        raise Unavailable(memory.trouble or "the GPU driver does not answer", retry_after=5)
    return [
        GPUInfo(each.id, each.memory_usage, each.power_draw, tuple(GPUProcess(**asdict(p)) for p in each.processes))
        for each in await asyncio.to_thread(gpu_infos, sample)
    ]


async def kill(pid: int, engine_manager: EngineManager, memory: Memory, *, force: bool) -> str:
    """Kill a process; returns what was done, in words. Raises NotFound, Forbidden, Conflict."""
    handle = _opened(pid)
    try:
        owner = await asyncio.to_thread(_owner, pid, dict(engine_manager.processes))
        if owner:
            return await _kill_engine(pid, owner, engine_manager)
        return await _kill_external(pid, handle, memory, force=force)
    finally:
        os.close(handle)


def _opened(pid: int) -> int:
    """A descriptor that goes on meaning this very process."""
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError, ValueError):  # EINVAL: a thread, or none at all
        raise NotFound(f"there is no process {pid}") from None


def _owner(pid: int, processes: Mapping[str, EngineProcess]) -> EngineProcess | None:
    from vllmd.gpu import pids_of

    running = (process for process in processes.values() if process.running)
    return next((m for m in running if m.running and pid in pids_of(m.running.cgroup, m.running.pid)), None)


async def _kill_engine(pid: int, process: EngineProcess, engine_manager: EngineManager) -> str:
    name = process.model.name
    if not await engine_manager.kill(process, KILL_LIMIT):
        raise Conflict(f"process {pid} was sent SIGKILL with the engine of {name}, but is still there")
    return f"killed the engine of {name}, which process {pid} was part of"


async def _kill_external(pid: int, handle: int, memory: Memory, *, force: bool) -> str:
    name = _name(pid)
    if not force:
        raise Forbidden(f"process {pid} ({name}) is not part of any engine; force=true kills it if it is on a GPU")
    if not await _on_gpu(pid, memory):
        raise Forbidden(f"process {pid} ({name}) is neither an engine's nor on a GPU; vllmd does not kill it")
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except PermissionError:
        raise Forbidden(f"process {pid} ({name}) is another user's; as root: kill -9 {pid}") from None
    except ProcessLookupError:
        return f"process {pid} ended by itself"
    return f"killed process {pid} ({name})"


async def _on_gpu(pid: int, memory: Memory) -> bool:
    sample = await memory.sample()
    devices = sample.devices.values() if sample else ()
    return pid != os.getpid() and any(pid in device.processes or pid in device.unsized for device in devices)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
