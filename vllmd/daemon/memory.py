"""Samples of the devices' memory, and whether memory that was freed has come back.

NVML can hang on a wedged driver, so every read happens in a thread and under a
time limit; a device that does not answer is reported, never waited for. Where
no device answers any more, ``trouble`` says so until one does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api.answers import DeviceNow
from vllmd.core import events
from vllmd.core.types import Device, DeviceView, Placement
from vllmd.daemon.power import NOBODY, Power
from vllmd.gpu import Devices, Sample, attribute, gpus, in_thread, pids_of

if TYPE_CHECKING:
    from vllmd.daemon.engine_process import EngineProcess

log = logging.getLogger("vllmd.memory")

SAMPLE_LIMIT = 5.0  # seconds for one reading of all devices
LATE = 0.25  # seconds after which a reading counts as late; later callers wait for it no longer than this
SILENT_AFTER = 2  # failed readings in a row: the first may be a driver that is being reloaded
RETURN_LIMIT = 10.0  # seconds for freed memory to show as free
RETURN_POLL = 0.1
TOLERANCE = 256 << 20  # bytes; what a sample may differ by without meaning anything


class Memory:
    """What the devices say, attributed to models by their processes."""

    def __init__(self, devices: Devices, files: Mapping[int, Path] | None = None) -> None:
        self.files = files or {}  # of declared devices, for stand-in engines
        self.last: Sample | None = None
        self.power = Power()
        self._reading: asyncio.Future[Sample] | None = None
        self._began = 0.0
        self._silent = ""  # why no device at all could be read, the last times
        self._failures = 0  # of whole readings, in a row
        self.use_devices(devices)

    def use_devices(self, devices: Devices, files: Mapping[int, Path] | None = None) -> None:
        """Go on with these devices."""
        self._devices = devices
        self.files = self.files if files is None else files
        self.inventory: tuple[Device, ...] = devices.inventory()
        self._by_index = {device.index: device for device in self.inventory}
        self.readable = devices.readable
        self.last = None  # the reading of others says nothing of these
        self._reading = None
        self._silent, self._failures = "", 0

    @property
    def devices(self) -> Devices:
        """Where the figures come from."""
        return self._devices

    @property
    def trouble(self) -> str:
        """Why nobody knows which devices there are, or what they hold; "" if that is known."""
        if self._devices.trouble:
            return str(self._devices.trouble)
        return self._silent if self._failures >= SILENT_AFTER else ""

    @property
    def hangs(self) -> bool:
        """A reading is under way that should have come back long ago."""
        return self._reading is not None and not self._reading.done() and time.monotonic() > self._began + LATE

    @property
    def source(self) -> str:
        """Where the devices come from, readable."""
        return f"{self._devices.source}: {self._devices.note}" if self._devices.note else self._devices.source

    def devices_of(self, placement: Placement) -> tuple[Device, ...]:
        """The GPUs of a placement, in its order."""
        return gpus([self._by_index[index] for index in placement.devices])

    def files_of(self, placement: Placement) -> tuple[str, ...]:
        """The files in which stand-ins write how much they hold of these devices; none unless all devices have one."""
        files = tuple(str(self.files[index]) for index in placement.devices if index in self.files)
        return files if len(files) == len(placement.devices) else ()

    def about(self, view: DeviceView) -> DeviceNow:
        """A device's properties, and its last reading; None where the device does not tell."""
        device, last = self._by_index.get(view.index), self.last.devices.get(view.index) if self.last else None
        return DeviceNow(
            **asdict(view),
            name=device.name if device else "",
            id=device.id if device else "",
            links=tuple(sorted(device.links)) if device else (),
            node=device.node if device else None,
            switch=device.switch if device else "",
            cpus=device.cpus if device else (),
            power=last.power if last else None,
            temperature=last.temperature if last else None,
            utilisation=last.utilisation if last else None,
            throttled=last.throttled if last else "",
        )

    async def sample(self) -> Sample | None:
        """One reading of all devices, shared by concurrent callers; None if they cannot be read or do not answer."""
        if not self.readable:
            return None
        reading, devices = self._reading, self._devices
        if reading is None or reading.done():
            # A reading that hangs is not repeated: one stuck thread is enough.
            reading = self._reading = in_thread(devices.sample)
            self._began = time.monotonic()
        done, _ = await asyncio.wait({reading}, timeout=LATE if self.hangs else SAMPLE_LIMIT)
        if devices is not self._devices:  # others are used by now
            return None
        if not done:
            self._log_silent(f"the driver does not answer: a reading hangs for {time.monotonic() - self._began:.0f} s")
            self._failures = SILENT_AFTER  # that was long enough
            return None
        try:
            sample = reading.result()
        except Exception as error:  # whatever a driver's library throws
            self._log_silent(f"the devices cannot be read: {error}")
            return None
        self.last = sample
        if sample.silent and self.inventory:
            self._log_silent(f"no device can be read: {sample.silent}")
        else:
            self._silent, self._failures = "", 0
        return sample

    def _log_silent(self, why: str) -> None:
        self._failures += 1
        if not self._silent:
            log.error("%s", why)
            self._silent = why

    async def report(
        self,
        processes: Mapping[str, EngineProcess],
        expected: Mapping[tuple[str, int], int],
        idle: Mapping[str, float] = NOBODY,
    ) -> events.MemorySampled | None:
        """A sample as the event that the core wants.

        ``expected``: what the ledger has each model at. ``idle``: seconds that each engine has been unused. Raises
        OSError where we have no file descriptor to look with.
        """
        sample = await self.sample()
        if sample is None:
            return None
        external, models = attribute(sample, {name: _pids(process) for name, process in processes.items()}, expected)
        self.power.note(sample, models, idle)
        for (name, index), size in models.items():
            if name in processes and processes[name].self_managed:  # it may take what it has given back at any time
                models[name, index] = max(size, expected.get((name, index), 0))
        return events.MemorySampled(external, models, dict(sample.failed), dict(self.power.since_used))

    async def held(self, process: EngineProcess) -> dict[int, int]:
        """Bytes per device index that the engine's processes hold now, of those devices that tell.

        For an engine without a device no reading is made: a driver that hangs must not hold it up. A device that hides
        processes is left out, not counted as 0: a sleep would seem to have freed nothing of it.
        """
        sample = await self.sample() if process.placement.devices else None
        if sample is None or process.running is None:
            return {}
        try:
            name, pids = process.model.name, _pids(process)
        except OSError:  # we have no file descriptor to look with
            return {}
        _, models = attribute(sample, {name: pids})
        held: dict[int, int] = {}
        for index in process.placement.devices:
            device = sample.devices.get(index)
            if (name, index) in models:
                held[index] = models[name, index]
            elif device and not device.hides_processes and pids.isdisjoint(device.unsized):
                held[index] = 0
        return held

    async def settled(self, process: EngineProcess, before: Mapping[int, int]) -> dict[int, int]:
        """The bytes that it holds once they have fallen below ``before``, or after the limit; empty if unknown."""
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
        """Bytes per device of ``before`` that the driver has not given back after the engine's end.

        ``ownerless``: bytes that no process held while the engine still ran.
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
