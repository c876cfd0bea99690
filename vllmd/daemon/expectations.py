"""What a configuration means on this machine: engines' paths, their footprints, and the core's view of the models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllmd.config.replicas import engines_of
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device, ModelSpec, ReplicaSpec, Settings
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.device_watch import LIMIT, DeviceWatch, Open
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.homes import Homes
from vllmd.daemon.launch_planner import Paths
from vllmd.daemon.preflight import Machine, look, say
from vllmd.daemon.specs import model_spec, replica_spec
from vllmd.engines.estimate import Estimate
from vllmd.frozen import frozen
from vllmd.gpu import Devices, open_devices, the_cpu
from vllmd.place import host_memory


@frozen
class Expectations:
    """What a configuration comes to on these devices.

    ``specs``: what the core knows of the models. ``estimates``: what each engine is told of the memory for it, such as
    the size of its cache: as estimated, never as measured, and without the words, which have been logged. ``kinds``:
    what each engine's model is for, as its files tell. ``problems``: why a model can never be loaded here, by model.
    """

    paths: Paths
    engines: Mapping[str, ModelConfig]  # by the id that the core knows each by
    specs: tuple[ModelSpec, ...]
    estimates: Mapping[str, Estimate]
    kinds: Mapping[str, str]
    problems: Mapping[str, str]


async def expect(
    config: Config,
    runtime: RuntimeEnvironment,
    devices: Sequence[Device],
    resolver: EngineResolver,
    known: Mapping[str, ModelSpec] | None = None,
) -> Expectations:
    """The models' footprints, which are logged as well; reads the models' files.

    ``known``: the specifications that the core has; an equal one is that same object, which the core need not compare.
    """
    engines, paths = engines_of(config.models), paths_of(config, runtime)
    machine = Machine(tuple(devices), paths.homes, paths.run)

    def reckon() -> Expectations:
        prospects, cpu = look(engines.values(), machine, resolver), the_cpu(machine.devices)
        say(prospects, machine)
        replicas: dict[str, list[ReplicaSpec]] = {}
        estimates: dict[str, Estimate] = {}
        equal: dict[Estimate, Estimate] = {}  # one object for each: of ten thousand models most take what others take
        for each in prospects:
            name, estimate = each.model.replica_of or each.model.name, each.estimate.in_numbers()
            estimates[each.model.name] = estimate = equal.setdefault(estimate, estimate)
            replicas.setdefault(name, []).append(replica_spec(each.model, each.engine, estimate, cpu))
        specs = []
        for name, of in replicas.items():
            spec = model_spec(config.models[name], of)
            before = known.get(name) if known else None
            specs.append(before if before == spec else spec)
        kinds = {each.model.name: each.kind for each in prospects}
        problems = {each.model.replica_of or each.model.name: each.problem for each in prospects if each.problem}
        return Expectations(paths, engines, tuple(specs), estimates, kinds, problems)

    return await asyncio.to_thread(reckon)


def paths_of(config: Config, runtime: RuntimeEnvironment) -> Paths:
    """Where engines that are started by that configuration live."""
    homes = Homes(config.engines.home or runtime.home, runtime.homes, runtime.environment)
    return Paths(config.engines.run_dir or runtime.run_dir, homes)


def settings_of(config: Config, devices: Sequence[Device] = ()) -> Settings:
    """The settings of the core."""
    return Settings(config.policy, host_budget(config, devices), config.server.queue_limit)


def host_budget(config: Config, devices: Sequence[Device] = ()) -> int:
    """Bytes of host memory for level-1 sleepers: as configured, or half of what there is.

    None where the devices' memory is the host's (GB10, Jetson): a model that slept at level 1 would free nothing.
    """
    if config.host_memory is not None:
        return config.host_memory
    return 0 if any(device.shared for device in devices) else host_memory() // 2


def files_of(config: Config) -> dict[int, Path]:
    """The files in which stand-ins write how much they hold of declared devices."""
    return {index: device.file for index, device in enumerate(config.devices or ()) if device.file}


def opener(config: Config, environment: Mapping[str, str]) -> Open:
    """Asks for the devices, as that configuration wants them."""
    wanted = Config(devices=config.devices, reserve=config.reserve)  # kept as long as nothing changes in these
    return lambda known: open_devices(wanted, environment, known=known)


async def find_devices(config: Config, environment: Mapping[str, str]) -> Devices:
    """The devices, for a caller that can wait for the answer."""
    return await DeviceWatch(opener(config, environment)).begin(LIMIT)
