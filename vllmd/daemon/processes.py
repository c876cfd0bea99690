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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api.answers import GPUInfo, GPUProcess
from vllmd.errors import OUT_OF_FILES, Conflict, Forbidden, NotFound, Unavailable, Unsupported

if TYPE_CHECKING:
    from vllmd.daemon.engine_manager import EngineManager
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
    from vllmd.gpu import pids_of

    # 1. A descriptor, which goes on meaning this very process if the id is given to another one.
    try:
        handle = os.pidfd_open(pid)
    except (OSError, OverflowError, ValueError) as error:  # EINVAL: a thread, or no process at all
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
            raise Unavailable(f"vllmd can open no more files, so nothing was done to process {pid}") from None
        raise NotFound(f"there is no process {pid}") from None
    try:
        # 2. A process of an engine: the whole engine is killed, for one that has lost a worker is of no use.
        for process in list(engine_manager.processes.values()):
            running = process.running
            if running and pid in await asyncio.to_thread(pids_of, running.cgroup, running.pid):
                name = process.model.name
                if not await engine_manager.kill(process, KILL_LIMIT):
                    raise Conflict(f"process {pid} was sent SIGKILL with the engine of {name}, but is still there")
                return f"killed the engine of {name}, which process {pid} was part of"
        # 3. Any other process.
        return await _kill_external(pid, handle, memory, force=force)
    finally:
        os.close(handle)


async def _kill_external(pid: int, handle: int, memory: Memory, *, force: bool) -> str:
    """Kill a process that is no engine's, and only one on a GPU, with the daemon's own rights."""
    name = _name(pid)
    if not force:
        raise Forbidden(f"process {pid} ({name}) is not part of any engine; force=true kills it if it is on a GPU")
    sample = await memory.sample()
    devices = sample.devices.values() if sample else ()
    if pid == os.getpid() or not any(pid in device.processes or pid in device.unsized for device in devices):
        raise Forbidden(f"process {pid} ({name}) is neither an engine's nor on a GPU; vllmd does not kill it")
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except PermissionError:
        raise Forbidden(f"process {pid} ({name}) is another user's; as root: kill -9 {pid}") from None
    except ProcessLookupError:
        return f"process {pid} ended by itself"
    return f"killed process {pid} ({name})"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
