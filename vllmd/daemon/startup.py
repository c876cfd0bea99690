"""How the daemon gets its back end: devices, core, launcher, engines. Entered after the first client was let in.

The order is that of need. The core must know the devices and what each model will take of them; the engines need the
launcher; nothing may be decided before it is known which engines run already, and what the devices hold. What two parts
need of each other (an engine's end is an event for the core, a decision of the core an order to an engine) they get as
functions, bound here where both are made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vllmd.core import commands, events
from vllmd.core.costs import CostBook
from vllmd.core.scheduler import Scheduler
from vllmd.daemon import collector
from vllmd.daemon.adoption import adopt_all
from vllmd.daemon.back_end import BackEnd
from vllmd.daemon.boot_clock import date_of
from vllmd.daemon.device_readings import DeviceReadings, devices_found
from vllmd.daemon.device_watch import DeviceWatch
from vllmd.daemon.dispatcher import Dispatcher, executors
from vllmd.daemon.engine_keys import EngineKeys
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.expectations import expect, files_of, opener, paths_of, settings_of
from vllmd.daemon.failures import remembered
from vllmd.daemon.front_end import FrontEnd
from vllmd.daemon.launch_planner import LaunchPlanner
from vllmd.daemon.loaders import Loaders
from vllmd.daemon.memory import Memory
from vllmd.daemon.ports import PortPool
from vllmd.daemon.read_ahead import ReadAhead
from vllmd.daemon.standbys import Standbys
from vllmd.engines.weight_files import WeightFile, weight_files
from vllmd.errors import LauncherFailed
from vllmd.gpu import Devices
from vllmd.launcher.client import ExitReport, LauncherClient
from vllmd.launcher.protocol import PROTOCOL
from vllmd.systemd.throttle import Repeated

log = logging.getLogger("vllmd")

LAUNCHER_RETRY = 1.0  # seconds
OLDER_RETRY = 0.1
T = TypeVar("T")
Ended = Callable[[ExitReport], None]
Logged = Callable[[str, list[str]], None]
StandbyReady = Callable[[str, int], None]


async def back_end(front: FrontEnd) -> BackEnd:
    """Find the devices, the launcher and what runs already. Requests are let through by ``FrontEnd.open``."""
    current, runtime, config = front.current, front.runtime, front.current.config
    # 1. The devices, or that they are being waited for.
    devices = DeviceWatch(opener(config, runtime.environment))
    memory = Memory(await devices.begin(), files_of(config))
    log_devices(memory)
    # 2. The core: the models, what each will take, and what was learnt of them.
    await asyncio.to_thread((learnt := front.learnt).load)
    with collector.paused():
        expected = await expect(config, runtime, memory.inventory, front.resolver)
        front.gate.learn_kinds(expected.kinds)
        settings, costs = settings_of(config, memory.inventory), CostBook.from_dict(learnt.costs)
        # Made in a thread: of ten thousand models it takes time in which clients are let in.
        scheduler = await asyncio.to_thread(Scheduler, expected.specs, memory.inventory, settings, costs)
        collector.exempt_existing()  # before it runs again: the first look at all of that would be the longest

    # 3. The launcher's client and the engines behind it. It is opened, and calls these, when everything is there.
    def ended(report: ExitReport) -> None:
        if not front.store.ended(report):
            engines.on_exit(report)

    def report(event: events.Event) -> None:
        ahead.on_event(event)
        front.changes.engine_event(event, dispatcher)

    def files_to_read(replica: str) -> list[WeightFile]:
        model = current.engines.get(replica)
        return weight_files(model, paths_of(current.config, runtime).homes.hub(model)) if model else []

    launcher = launcher_client(
        runtime.launcher, ended, lambda instance, lines: engines.on_log(instance, lines),
        lambda instance, memory: standbys.mark_ready(instance, memory),
    )  # fmt: skip
    front.launcher.set(launcher)
    ports, mark_changed = PortPool(config.engines.port_start, config.engines.port_end), front.changes.mark_changed
    planner = LaunchPlanner(memory, expected.paths, front.resolver, ports, EngineKeys(runtime.cache))
    standbys = Standbys(launcher, planner.standby_of, lambda size: report(events.StandbysHeld(size)))
    standbys.configure(config.engines.standby, expected.engines.values())
    ahead = ReadAhead(files_to_read, lambda: current.config.engines.read_ahead)
    loaders = Loaders(
        learnt.loaders, files_to_read, lambda: current.config.engines.fast_loaders,
        lambda replica: ahead.stop(commands.StopReadAhead(replica)),
    )  # fmt: skip
    engines = EngineManager(
        launcher, report, memory, planner, runtime.logs, mark_changed, lambda: readings.look(), scheduler.costs.usual,
        learnt.ended, learnt.starts, standbys, loaders,
    )  # fmt: skip
    engines.configure(expected.engines, expected.estimates)
    # 4. The dispatcher, between the engines and the core.
    execute = executors(engines, front.gate, front.instances.add, ahead)
    dispatcher = Dispatcher(scheduler, execute, front.changes.decided, mark_changed)
    dispatcher.hold_time()  # until ``adopt_running``: what is to be preloaded may run already
    readings = DeviceReadings(memory, engines, dispatcher)
    launched_by = await connect(launcher, runtime.launcher)
    back = BackEnd(launched_by, launcher, dispatcher, engines, memory, devices, readings, learnt)
    # 5. What is there already: engines of an earlier daemon, and what others hold of the devices.
    back.post(devices_found(memory.devices))
    if not current.broken:  # with a broken configuration nothing is known about them: a reload will adopt them
        await adopt_running(front, back)
    await readings.look()
    return back


async def adopt_running(front: FrontEnd, back: BackEnd) -> None:
    """Take over, or end, every engine that an earlier daemon left; remember which had failed, or are disabled.

    Only then anything is begun by time alone, or by a request.
    """
    try:
        listed = await answered(back.launcher.list)
        # An operator may have had one started meanwhile: that is no other's.
        known = {process.instance for process in back.engines.processes.values()}
        running = [engine for engine in listed if engine.instance not in known]
        for noted in (engine.metadata for engine in running):
            if known_date := date_of(noted, "since"):
                front.learnt.dates.learn(*known_date)
        await adopt_all(back.engines, running, front.current.engines, front.resolver, back.post)
        starts, found = front.learnt.starts, back.engines.processes
        if found:
            started = [*(engine for engine in found if engine not in starts), *starts]
            back.engines.standbys.remember([model for each in started if (model := front.current.engines.get(each))])
        for failure in remembered(back.learnt.failures, front.current.engines, time.time()):
            back.post(failure)
        for order in front.disabled.orders({*front.current.config.models, *front.current.engines}):
            back.post(order)
    finally:
        back.dispatcher.let_time_pass()
        front.adopted()


def log_devices(memory: Memory) -> None:
    """Log which devices there are; an error where they do not answer."""
    if memory.devices.trouble:
        log.error("the devices do not answer (models without devices are served): %s", memory.trouble)
    else:
        log.info("devices: %s", memory.source)


async def apply_devices(front: FrontEnd, back: BackEnd, devices: Devices) -> None:
    """Take devices that answer now, or no longer: footprints are estimated anew, and the core decides what follows."""
    if devices is back.memory.devices:
        await back.readings.look()
        return
    async with front.changing:  # a reload reckons with the devices, too
        if devices is not back.devices.current:  # a reload has taken others meanwhile
            return
        config = front.current.config
        back.memory.use_devices(devices, files_of(config))
        log_devices(back.memory)
        if not devices.trouble:
            known = back.dispatcher.scheduler.specs
            expected = await expect(config, front.runtime, devices.inventory(), front.resolver, known)
            back.engines.configure(expected.engines, expected.estimates)
            front.gate.learn_kinds(expected.kinds)
            settings = settings_of(config, devices.inventory())
            back.post(events.ModelsChanged(expected.specs, settings=settings))
        back.post(devices_found(devices))
        await back.readings.look()


def launcher_client(address: str, ended: Ended, logged: Logged, standby_ready: StandbyReady) -> LauncherClient:
    """A client of the launcher at that socket, or ("") of one of our own; not opened yet."""

    def lost() -> None:
        log.warning("lost the launcher; engines run on, connecting again")

    if address:
        return LauncherClient.at(address, ended, logged, lost, standby_ready)
    return LauncherClient.private(ended, logged, lost, standby_ready)


async def connect(launcher: LauncherClient, address: str) -> str:
    """Open the client, again until the launcher answers, and return its backend; requests wait meanwhile.

    In an upgrade the sockets may wake the new daemon a moment before the launcher is restarted: the old one could
    neither tell us whose its engines are, nor do what we may ask. So a launcher older than we are is waited out.
    """
    trouble, is_told = Repeated(log), False
    while not launcher.connected:
        try:
            await launcher.open()
        except (LauncherFailed, OSError) as error:
            where = address or "(private)"
            trouble.say(logging.ERROR, "cannot reach the launcher at %s: %s; trying again", where, error)
            await asyncio.sleep(LAUNCHER_RETRY)
    while (info := await answered(launcher.info)).protocol < PROTOCOL:  # as ``LauncherClient.trouble`` says
        if not is_told:
            log.warning("the launcher is that of an older version; waiting for `systemctl restart vllmd-launcher`")
        is_told = True
        await asyncio.sleep(OLDER_RETRY)
    return info.backend


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """The launcher's answer, however long it takes: nothing can be decided without it, so requests wait meanwhile."""
    trouble = Repeated(log)
    while True:
        try:
            return await ask()
        except LauncherFailed as error:
            trouble.say(logging.ERROR, "%s; asking again", error)
            await asyncio.sleep(LAUNCHER_RETRY)
