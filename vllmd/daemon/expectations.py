"""What a configuration means on this machine: where engines live, what they take, what the core is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device, ModelSpec, ReplicaSpec, Settings
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.device_watch import LIMIT, DeviceWatch, Open
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.homes import Homes
from vllmd.daemon.host import host_memory
from vllmd.daemon.launch_planner import Paths
from vllmd.daemon.preflight import Machine, Prospect, look, say
from vllmd.daemon.specs import model_spec, replica_spec
from vllmd.engines.estimate import Estimate
from vllmd.gpu import Devices, open_devices


def expect(
    models: Mapping[str, ModelConfig], paths: Paths, devices: Sequence[Device], resolver: EngineResolver
) -> list[Prospect]:
    """What the models will take, told to the log as well; reads their files."""
    machine = Machine(tuple(devices), paths.homes, paths.run)
    prospects = look(models.values(), machine, resolver)
    say(prospects, machine)
    return prospects


def specs_of(models: Mapping[str, ModelConfig], prospects: list[Prospect]) -> list[ModelSpec]:
    """What the core knows of the models."""
    engines: dict[str, list[ReplicaSpec]] = {}
    for each in prospects:
        name = each.model.replica_of or each.model.name
        engines.setdefault(name, []).append(replica_spec(each.model, each.engine, each.told))
    return [model_spec(models[name], replicas) for name, replicas in engines.items()]


def estimates(prospects: list[Prospect]) -> dict[str, Estimate]:
    """What each engine is told of the memory for it, such as the size of its cache: as estimated, never as measured."""
    return {each.model.name: each.told for each in prospects}


def kinds(prospects: list[Prospect]) -> dict[str, str]:
    """What each engine's model is for, as its files tell."""
    return {each.model.name: each.kind for each in prospects}


def paths_of(config: Config, runtime: RuntimeEnvironment) -> Paths:
    """Where engines that are started by that configuration live."""
    homes = Homes(config.engines.home or runtime.home, runtime.homes, runtime.environment)
    return Paths(config.engines.run_dir or runtime.run_dir, homes)


def settings_of(config: Config) -> Settings:
    """What the core is told of the machine's policy."""
    return Settings(config.policy, host_budget(config), config.server.queue_limit)


def host_budget(config: Config) -> int:
    """Bytes of host memory for level-1 sleepers: as configured, or half of what there is."""
    if config.host_memory is not None:
        return config.host_memory
    return host_memory() // 2


def files_of(config: Config) -> dict[int, Path]:
    """The files in which stand-ins keep who holds how much of declared devices."""
    return {index: device.file for index, device in enumerate(config.devices or ()) if device.file}


def opener(config: Config, environment: Mapping[str, str]) -> Open:
    """Asks for the devices, as that configuration wants them."""
    return lambda known: open_devices(config, environment, known=known)


async def find_devices(config: Config, environment: Mapping[str, str]) -> Devices:
    """The devices, for whoever can wait for the answer."""
    return await DeviceWatch(opener(config, environment)).begin(LIMIT)
