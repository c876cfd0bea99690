"""Tells the core what the devices hold, and which of them must not be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vllmd.core import events
from vllmd.daemon.dispatcher import Dispatcher
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.memory import Memory
from vllmd.errors import out_of_files

log = logging.getLogger("vllmd")


class DeviceReadings:
    """Remembers the last report to the core, so that each change is reported once."""

    def __init__(self, memory: Memory, engines: EngineManager, dispatcher: Dispatcher) -> None:
        self._memory = memory
        self._engines = engines
        self._dispatcher = dispatcher
        self._trouble = ""  # as reported last
        self._avoided: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {})

    async def look(self) -> None:
        """Read the devices, and report to the core what they hold.

        Where this process can open no file nothing is reported: a driver that cannot be asked would pass for one that
        hangs, and engines' memory for that of others.
        """
        memory, dispatcher = self._memory, self._dispatcher
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
        if memory.readable and memory.trouble != self._trouble:
            if self._trouble:
                log.info("the devices answer again")
            dispatcher.post(events.DevicesChanged(memory.inventory, memory.trouble))
        self._trouble = memory.trouble
        ill, lost = (memory.last.ill, memory.last.lost) if memory.last else ({}, {})
        if (ill, lost) != self._avoided:
            self._avoided = (dict(ill), dict(lost))
            dispatcher.post(events.DevicesTroubled(dict(ill), dict(lost)))
