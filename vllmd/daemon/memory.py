"""Samples of the devices' memory, and whether memory that was freed has come back.

NVML can hang on a wedged driver, so every read happens in a thread and under a
time limit; a device that does not answer is reported, never waited for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.core import events
from vllmd.core.types import Device, Placement
from vllmd.gpu import Devices, Sample, attribute, in_thread, pids_of

if TYPE_CHECKING:
    from vllmd.daemon.engine_process import EngineProcess

log = logging.getLogger("vllmd.memory")

SAMPLE_LIMIT = 5.0  # seconds for one reading of all devices
RETURN_LIMIT = 10.0  # seconds for freed memory to show as free
RETURN_POLL = 0.1
TOLERANCE = 256 << 20  # bytes; what a sample may differ by without meaning anything


class Memory:
    """What the devices say, attributed to models by their processes."""

    def __init__(self, devices: Devices, files: Mapping[int, Path] | None = None) -> None:
        self._devices = devices
        self._files = files or {}  # of declared devices, for stand-in engines
        self.inventory: tuple[Device, ...] = devices.inventory()
        self._by_index = {device.index: device for device in self.inventory}
        self.readable = devices.readable
        self.last: Sample | None = None
        self._reading: asyncio.Future[Sample] | None = None

    @property
    def source(self) -> str:
        """Where the devices come from, readable."""
        return f"{self._devices.source}: {self._devices.note}" if self._devices.note else self._devices.source

    def devices_of(self, placement: Placement) -> tuple[Device, ...]:
        """The devices of a placement, in its order."""
        return tuple(self._by_index[index] for index in placement.devices)

    def files_of(self, placement: Placement) -> tuple[str, ...]:
        """The files in which stand-ins keep who holds how much of these devices; none unless all have one."""
        files = tuple(str(self._files[index]) for index in placement.devices if index in self._files)
        return files if len(files) == len(placement.devices) else ()

    async def sample(self) -> Sample | None:
        """One reading of all devices; None if they cannot be read or do not answer in time."""
        if not self.readable:
            return None
        if self._reading is None or self._reading.done():
            # A reading that hangs is not repeated: one stuck thread is enough.
            self._reading = in_thread(self._devices.sample)
        done, _ = await asyncio.wait({self._reading}, timeout=SAMPLE_LIMIT)
        if not done:
            log.error("the devices did not answer within %.0f s", SAMPLE_LIMIT)
            return None
        try:
            self.last = self._reading.result()
        except Exception as error:  # whatever a driver's library throws
            log.error("cannot read the devices: %s", error)
            return None
        return self.last

    async def report(
        self, processes: Mapping[str, EngineProcess], expected: Mapping[tuple[str, int], int]
    ) -> events.MemorySampled | None:
        """A sample as the event that the core wants; ``expected``: what the ledger has each model at."""
        sample = await self.sample()
        if sample is None:
            return None
        external, models = attribute(sample, {name: _pids(process) for name, process in processes.items()}, expected)
        for (name, index), size in models.items():
            if name in processes and processes[name].self_managed:  # what it does not hold now it may take any time
                models[name, index] = max(size, expected.get((name, index), 0))
        return events.MemorySampled(external, models, dict(sample.failed))

    async def held(self, process: EngineProcess) -> dict[int, int]:
        """Bytes per device index that the engine's processes hold now; empty if it cannot be known."""
        sample = await self.sample()
        if sample is None or process.running is None:
            return {}
        name = process.model.name
        _, models = attribute(sample, {name: _pids(process)})
        return {index: models.get((name, index), 0) for index in process.placement.devices}

    async def settled(self, process: EngineProcess, before: Mapping[int, int]) -> dict[int, int]:
        """What it holds once that has fallen below ``before``, or after the limit; empty if it cannot be known."""
        end = time.monotonic() + RETURN_LIMIT
        while True:
            held = await self.held(process)
            back = held and all(held.get(index, 0) <= max(0, was - TOLERANCE) for index, was in before.items())
            if back or not before or time.monotonic() > end:
                return held
            await asyncio.sleep(RETURN_POLL)

    def ownerless(self) -> dict[int, int]:
        """Per device, bytes in use that no process owned at the last sample: the driver's own share."""
        return {index: device.ownerless for index, device in self.last.devices.items()} if self.last else {}

    async def missing(self, before: Mapping[int, int], ownerless: Mapping[int, int]) -> dict[int, int]:
        """After an engine's end: bytes per device of ``before`` that nobody owns and nobody got back.

        ``ownerless``: what nobody owned while it still ran.
        """
        missing: dict[int, int] = {}
        for _ in range(round(RETURN_LIMIT / RETURN_POLL)):
            sample = await self.sample() if any(before.values()) else None
            missing = _unaccounted(sample, before, ownerless) if sample else {}
            if not missing:
                break
            await asyncio.sleep(RETURN_POLL)
        return missing


def _unaccounted(sample: Sample, before: Mapping[int, int], ownerless: Mapping[int, int]) -> dict[int, int]:
    """Per device, memory of the ended engine that is still in use, owned by no process."""
    missing = {}
    for index, was in before.items():
        device = sample.devices.get(index)
        if device is None or device.hides_processes or device.unsized:
            continue
        left = device.ownerless - ownerless.get(index, 0)
        if left > TOLERANCE:
            missing[index] = min(was, left)
    return missing


def _pids(process: EngineProcess) -> frozenset[int]:
    if process.running is None:
        return frozenset()
    return pids_of(process.running.cgroup, process.running.pid)
