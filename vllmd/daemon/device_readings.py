"""Tells the core what the devices hold, and which of them must not be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vllmd.core import events
from vllmd.daemon.dispatcher import Dispatcher
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.memory import Memory
from vllmd.errors import out_of_files
from vllmd.gpu import Devices

log = logging.getLogger("vllmd")

UNREAD = "what others hold of the devices is yet to be read"


def devices_found(devices: Devices) -> events.DevicesChanged:
    """What the core is told of devices before their first reading: nothing is put on them until it has come."""
    if devices.trouble or not devices.readable:
        return events.DevicesChanged(devices.inventory(), str(devices.trouble or ""), devices.asking)
    return events.DevicesChanged(devices.inventory(), UNREAD, asking=True)


class DeviceReadings:
    """Remembers the last report to the core, so that each change is reported once."""

    def __init__(self, memory: Memory, engines: EngineManager, dispatcher: Dispatcher) -> None:
        self._memory = memory
        self._engines = engines
        self._dispatcher = dispatcher
        self._devices: Devices | None = None  # of which the core was told (``devices_found``)
        self._trouble = ""  # as reported last
        self._avoided: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {})

    @property
    def is_due(self) -> bool:
        """Whether the core waits for a reading: for the first one, or because the devices do not answer."""
        return self._memory.devices is not self._devices or bool(self._trouble)

    async def look(self) -> None:
        """Read the devices, and report to the core what they hold.

        Where this process can open no file nothing is reported: a driver that cannot be asked would pass for one that
        hangs, and engines' memory for that of others.
        """
        memory, dispatcher = self._memory, self._dispatcher
        if memory.devices is not self._devices:
            self._devices, self._avoided = memory.devices, ({}, {})
            self._trouble = devices_found(memory.devices).unknown
        if out_of_files():
            return
        seen = dispatcher.scheduler.activity(dispatcher.now())
        expected = {(view.id, index): view.memory for view in seen.replicas for index in view.devices}
        idle = {view.id: view.idle for view in seen.replicas if view.idle is not None}
        try:
            sampled = await memory.report(self._engines.processes, expected, idle)
        except OSError:  # the last file descriptor went meanwhile
            return
        if sampled is None and memory.readable:  # the driver hangs, so nobody knows what other processes hold
            sampled = events.MemorySampled({}, {}, {device.index: "no answer" for device in memory.inventory})
        if sampled:
            dispatcher.post(sampled)
        # After one failed reading nobody knows yet whether the devices are silent: what was so before still is.
        is_known = memory.trouble or (memory.last and not memory.last.silent)
        if memory.readable and is_known and memory.trouble != self._trouble:
            if self._trouble and self._trouble != UNREAD:
                log.info("the devices answer again")
            self._trouble = memory.trouble
            dispatcher.post(events.DevicesChanged(memory.inventory, memory.trouble))
        ill, lost = (memory.last.ill, memory.last.lost) if memory.last else ({}, {})
        if (ill, lost) != self._avoided:
            self._avoided = (dict(ill), dict(lost))
            dispatcher.post(events.DevicesTroubled(dict(ill), dict(lost)))
