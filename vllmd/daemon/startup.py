"""How the daemon gets its rooms: devices, scheduler, launcher, engines. Entered after the first client was let in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vllmd.config.types import Config, ModelConfig
from vllmd.core import events
from vllmd.core.costs import CostBook
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, ModelSpec, ReplicaSpec, Settings
from vllmd.daemon.adoption import adopt_all
from vllmd.daemon.device_watch import LIMIT, DeviceWatch, Open
from vllmd.daemon.dispatcher import Dispatcher
from vllmd.daemon.engine_keys import EngineKeys
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.homes import Homes
from vllmd.daemon.host import host_memory
from vllmd.daemon.launch_planner import LaunchPlanner, Paths
from vllmd.daemon.memory import Memory
from vllmd.daemon.ports import PortPool
from vllmd.daemon.preflight import Machine, Prospect, look, say
from vllmd.daemon.service import Daemon
from vllmd.daemon.specs import model_spec, replica_spec
from vllmd.engines.estimate import Estimate
from vllmd.errors import LauncherFailed
from vllmd.gpu import Devices, open_devices
from vllmd.launcher.client import LauncherClient
from vllmd.launcher.protocol import PROTOCOL

log = logging.getLogger("vllmd")

LAUNCHER_RETRY = 1.0  # seconds
OLDER_RETRY = 0.1
T = TypeVar("T")


async def start(daemon: Daemon) -> None:
    """Find the devices, the launcher and what runs already; then let requests through."""
    daemon.watch = DeviceWatch(
        opener(daemon.config, daemon.runtime.environment), lambda devices: take_devices(daemon, devices)
    )
    daemon.memory = Memory(await daemon.watch.begin(), files_of(daemon.config))
    say_devices(daemon)
    await asyncio.to_thread(daemon.learnt.load)
    prospects = await asyncio.to_thread(expect, daemon, daemon.engines, daemon.config, daemon.memory.inventory)
    daemon.dispatcher = Dispatcher(make_scheduler(daemon, prospects))
    daemon.launcher = await connect_launcher(daemon)
    daemon.backend = await known_backend(daemon)
    daemon.engine_manager = make_fleet(daemon, prospects)
    daemon.take = lambda config, still=lambda: True: _take(daemon, config, still)
    daemon.dispatcher.connect(daemon.engine_manager, daemon.admission_gate, daemon.control.instances.add)
    daemon.dispatcher.on_decision, daemon.dispatcher.on_change = daemon.control.note, daemon.control.stir
    devices = daemon.memory.devices
    if devices.trouble:
        daemon.dispatcher.post(events.DevicesChanged((), str(devices.trouble), devices.asking))
    if not daemon.broken:  # with a broken configuration nothing is known about them: a reload will adopt them
        await adopt_running(daemon)
    await daemon.look()  # before anything is placed it must be known what strangers hold
    daemon.opened.set()
    daemon.admission_gate.open(daemon)
    daemon.side_task(daemon.watch.run())
    daemon.dispatcher.post(events.TimePassed())


async def adopt_running(daemon: Daemon) -> None:
    """Take over, or end, every engine that an earlier daemon left."""
    known = {process.instance for process in daemon.engine_manager.processes.values()}
    running = [engine for engine in await answered(daemon.launcher.list) if engine.instance not in known]
    await adopt_all(daemon.engine_manager, running, daemon.engines, daemon.kinds, daemon.dispatcher.post)


def opener(config: Config, environment: Mapping[str, str]) -> Open:
    """Asks for the devices, as that configuration wants them."""
    return lambda known: open_devices(config, environment, known=known)


async def _take(daemon: Daemon, config: Config, still: Callable[[], bool]) -> dict[str, Any]:
    from vllmd.daemon.reload import take  # most daemons are never told to

    return await take(daemon, config, still)


def files_of(config: Config) -> dict[int, Path]:
    """The files in which stand-ins keep who holds how much of declared devices."""
    return {index: device.file for index, device in enumerate(config.devices or ()) if device.file}


def say_devices(daemon: Daemon) -> None:
    """Into the log: an error where they do not answer."""
    if daemon.memory.devices.trouble:
        log.error("the devices do not answer (models without devices are served): %s", daemon.memory.trouble)
    else:
        log.info("devices: %s", daemon.memory.source)


async def take_devices(daemon: Daemon, devices: Devices) -> None:
    """Go on with what is known of the devices now: sizes are reckoned anew, and whoever waited for one is told."""
    if devices is daemon.memory.devices:
        await daemon.look()
        return
    async with daemon.control.runtime_models.changing:  # a reload reckons with the devices, too
        if devices is not daemon.watch.current:  # it has taken others meanwhile
            return
        daemon.memory.take(devices, files_of(daemon.config))
        say_devices(daemon)
        if not devices.trouble:
            prospects = await asyncio.to_thread(expect, daemon, daemon.engines, daemon.config, devices.inventory())
            specs = specs_of(daemon.config.models, prospects)
            daemon.engine_manager.configure(daemon.engines, estimates(prospects))
            daemon.control.configure(specs)
            daemon.dispatcher.post(events.ModelsChanged(tuple(specs)))
        unknown = str(devices.trouble or "")
        daemon.dispatcher.post(events.DevicesChanged(devices.inventory(), unknown, devices.asking))
        await daemon.look()


async def known_backend(daemon: Daemon) -> str:
    """The launcher's backend, once it is not older than we are.

    In an upgrade the sockets may wake the new daemon a moment before the launcher is restarted: the old one could
    neither tell us whose its engines are, nor do what we may ask.
    """
    told = False
    while True:
        info = await answered(daemon.launcher.info)
        if info.protocol >= PROTOCOL:
            return info.backend
        if not told:
            log.warning("the launcher is that of an older version; waiting for `systemctl restart vllmd-launcher`")
        told = True
        await asyncio.sleep(OLDER_RETRY)


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """The launcher's answer, however long it takes: nothing can be decided without it, and requests wait meanwhile."""
    while True:
        try:
            return await ask()
        except LauncherFailed as error:
            log.error("%s; asking again", error)
            await asyncio.sleep(LAUNCHER_RETRY)


async def find_devices(config: Config, environment: Mapping[str, str]) -> Devices:
    """The devices, for whoever can wait for the answer."""
    return await DeviceWatch(opener(config, environment), _nobody).begin(LIMIT)


async def _nobody(devices: Devices) -> None:
    """Nobody watches on."""


def make_scheduler(daemon: Daemon, prospects: list[Prospect]) -> Scheduler:
    """The core with the models, the devices and what was learnt."""
    costs, specs = CostBook.from_dict(daemon.learnt.costs), specs_of(daemon.config.models, prospects)
    daemon.control.configure(specs)
    return Scheduler(specs, daemon.memory.inventory, settings_of(daemon.config), costs)


def settings_of(config: Config) -> Settings:
    """What the core is told of the machine's policy."""
    return Settings(config.policy, host_budget(config), config.server.queue_limit)


def expect(
    daemon: Daemon, models: Mapping[str, ModelConfig], config: Config, devices: Sequence[Device]
) -> list[Prospect]:
    """What the models will take by that configuration, told to the log as well; reads their files."""
    paths = paths_of(daemon, config)
    machine = Machine(tuple(devices), paths.homes, paths.run)
    prospects = look(models.values(), machine, daemon.kinds)
    say(prospects, machine)
    return prospects


def specs_of(models: Mapping[str, ModelConfig], prospects: list[Prospect]) -> list[ModelSpec]:
    """What the core knows of the models."""
    engines: dict[str, list[ReplicaSpec]] = {}
    for each in prospects:
        name = each.model.replica_of or each.model.name
        engines.setdefault(name, []).append(replica_spec(each.model, each.engine, each.told))
    return [model_spec(models[name], replicas) for name, replicas in engines.items()]


def paths_of(daemon: Daemon, config: Config) -> Paths:
    """Where engines that are started by that configuration live."""
    around = daemon.runtime
    homes = Homes(config.engines.home or around.home, around.homes, around.environment)
    return Paths(config.engines.run_dir or around.run_dir, homes)


def host_budget(config: Config) -> int:
    """Bytes of host memory for level-1 sleepers: as configured, or half of what there is."""
    if config.host_memory is not None:
        return config.host_memory
    return host_memory() // 2


async def connect_launcher(daemon: Daemon) -> LauncherClient:
    """The launcher's socket, or one of our own; tried again until it answers, requests wait meanwhile."""
    while True:
        try:
            return await _launcher_once(daemon)
        except (LauncherFailed, OSError) as error:
            log.error("cannot reach the launcher at %s: %s", daemon.runtime.launcher or "(private)", error)
            await asyncio.sleep(LAUNCHER_RETRY)


async def _launcher_once(daemon: Daemon) -> LauncherClient:
    def lost() -> None:
        log.warning("lost the launcher; engines run on, connecting again")

    def ended(report: Any) -> None:
        daemon.engine_manager.on_exit(report)

    def logged(instance: str, lines: list[str]) -> None:
        daemon.engine_manager.on_log(instance, lines)

    if daemon.runtime.launcher:
        return await LauncherClient.connect(daemon.runtime.launcher, ended, logged, lost)
    return await LauncherClient.spawn_private(ended, logged, lost)


def make_fleet(daemon: Daemon, prospects: list[Prospect]) -> EngineManager:
    """Who carries out what is decided about engines."""
    engines, around = daemon.config.engines, daemon.runtime
    paths, ports = paths_of(daemon, daemon.config), PortPool(engines.port_start, engines.port_end)
    launch_planner = LaunchPlanner(daemon.memory, paths, daemon.kinds, ports, EngineKeys(around.cache))
    engine_manager = EngineManager(daemon.launcher, daemon.control.take, daemon.memory, launch_planner, around.logs)
    engine_manager.configure(daemon.engines, estimates(prospects))
    engine_manager.on_ended = daemon.learnt.ended
    engine_manager.on_phase, engine_manager.look = daemon.control.stir, daemon.look
    engine_manager.usual = daemon.dispatcher.scheduler.costs.usual
    return engine_manager


def estimates(prospects: list[Prospect]) -> dict[str, Estimate]:
    """What each engine is told of the memory for it, such as the size of its cache: as estimated, never as measured."""
    return {each.model.name: each.told for each in prospects}
