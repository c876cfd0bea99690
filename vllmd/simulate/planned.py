"""From a configuration to what is simulated: the same specifications, devices and estimates that the daemon has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from vllmd.config.loader import load
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device, ModelSpec, ReplicaSpec, Settings, single
from vllmd.engines import engine_of
from vllmd.engines.estimate import Estimate, estimate, too_large
from vllmd.errors import ConfigError
from vllmd.gpu import gpus, open_devices
from vllmd.hub import cache_of
from vllmd.simulate.physics import Physics
from vllmd.simulate.world import Machine, Warm

CORE = {field.name for spec in (ModelSpec, ReplicaSpec) for field in fields(spec)} - {"replicas"}
SAME = CORE & {field.name for field in fields(ModelConfig)}


def read_config(path: str | None, devices: Sequence[str] = (), host_memory: str = "") -> Config:
    """The configuration; ``devices`` (sizes such as 80GiB) and ``host_memory`` replace its own. Raises ConfigError."""
    overrides: dict[str, object] = {}
    if devices:
        overrides["devices"] = [{"memory": size} for size in devices]
    if host_memory:
        overrides["host_memory"] = host_memory
    config = load(path, overrides=overrides, strict=True)
    if not config.models:
        raise ConfigError("the configuration has no models to simulate")
    return config


def machine_of(
    config: Config, physics: Physics, warm: Warm, env: Mapping[str, str] = os.environ, cache: Path | None = None
) -> Machine:
    """The models and devices of a configuration. ``cache``: the engines', if it is not the user's own.

    Raises ConfigError if a model can never fit, or there is no device to plan for.
    """
    devices = open_devices(config, env)
    try:
        inventory = gpus(devices.inventory())
    finally:
        devices.close()
    if not inventory and config.devices is None:
        raise ConfigError(f"there is no device to plan for ({devices.note}); say which, for example: --devices 80GiB")
    specs = [spec_of(model, inventory, cache or cache_of(env)) for model in config.models.values()]
    settings = Settings(config.policy, host_budget(config), config.server.queue_limit)
    return Machine(specs, inventory, settings, physics, warm)


def spec_of(model: ModelConfig, devices: Sequence[Device], home: Path) -> ModelSpec:
    """The core's view of a configured model. Raises ConfigError if it can never fit.

    The devices planned for are GPUs, whether or not this machine has any: so engines sleep unless they are told not to.
    """
    if model.sleep_mode is None and devices:
        model = replace(model, sleep_mode=True)
    expected = _estimated(model, devices, home)
    why = too_large(model, expected, devices)
    if why:
        where = f"{model.where}: " if model.where else ""
        raise ConfigError(f"{where}{why}")
    return single(
        footprint=expected.footprint,
        weights=expected.weights,
        device_count=engine_of(model).device_count(model),
        sleep_levels=engine_of(model).sleep_levels(model),
        pinned=model.pin,
        **{name: getattr(model, name) for name in SAME},
    )


def _estimated(model: ModelConfig, devices: Sequence[Device], home: Path) -> Estimate:
    usable = [device.memory for device in devices if not model.devices or device.index in model.devices]
    return estimate(model, home, min(usable, default=0))


def names_of(config: Config) -> dict[str, str]:
    """What each model may be called in a trace: its name, its aliases, what it is loaded from."""
    names: dict[str, str] = {}
    for model in config.models.values():
        for name in (model.source, *model.aliases):
            names.setdefault(name, model.name)
    return names | {name: name for name in config.models}


def host_budget(config: Config) -> int:
    """Bytes of host memory for level-1 sleepers: as configured, or half of what this machine has."""
    if config.host_memory is not None:
        return config.host_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
