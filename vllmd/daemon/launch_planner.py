"""Prepares starts: the place of an engine, its launch, and the order to the launcher, before anything is done.

A start has three authors. The core gives the placement and the memory. The engine kind makes of the model's settings
and of the place (``engines.base.Place``) a command, an environment and an address. And this file adds what is the
machine's: the run directory, a port where the kind needs one, the key of this start, the CPUs near the devices, the
user, limits, and the notes that a later daemon needs to adopt the engine. Whatever is wrong with settings is found
here, before a process is started. It is a ConfigError, by which a start fails for good: the next try would fail alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path

from vllmd.config.engine_kinds import one_name
from vllmd.config.names import instance_name
from vllmd.config.types import ModelConfig
from vllmd.core import commands
from vllmd.core.types import Device
from vllmd.daemon.boot_clock import dated
from vllmd.daemon.engine_keys import EngineKeys
from vllmd.daemon.engine_process import EngineProcess, environment_now, fingerprint
from vllmd.daemon.homes import Homes, ordered_user
from vllmd.daemon.memory import Memory
from vllmd.daemon.ports import PortPool
from vllmd.engines import compile_caches, environments
from vllmd.engines.base import Engine, Launch, Listen, Place
from vllmd.engines.estimate import Estimate
from vllmd.engines.standby import CanStandBy, Standby, early
from vllmd.errors import ConfigError, VllmdError
from vllmd.frozen import frozen
from vllmd.gpu import environment, gpus
from vllmd.launcher.client import StartOrder
from vllmd.launcher.protocol import ProtocolError
from vllmd.place import Cpus, cpus

LONGEST_STOP = 3600.0  # seconds between SIGTERM and SIGKILL that the launcher accepts


@frozen
class Paths:
    """Where engines live: run directories (sockets) and their homes (caches)."""

    run: Path
    homes: Homes = field(default_factory=Homes)


def without_key(listen: Listen) -> dict[str, object]:
    """An engine's address for files that others may read: its key is replaced by whether there is one."""
    return {**asdict(listen), "key": "yes" if listen.key else "", "owner": None}


class LaunchPlanner:
    """Writes the orders for the launcher."""

    def __init__(
        self,
        memory: Memory,
        paths: Paths,
        engine_of: Callable[[ModelConfig], Engine],
        ports: PortPool,
        keys: EngineKeys | None = None,
    ) -> None:
        self._models: Mapping[str, ModelConfig] = {}
        self._estimates: Mapping[str, Estimate] = {}
        self._memory = memory
        self._paths = paths
        self._engine_of = engine_of
        self.ports = ports
        self.keys = keys or EngineKeys(None)

    def configure(self, models: Mapping[str, ModelConfig], estimates: Mapping[str, Estimate]) -> None:
        """Start engines by these settings from now on. ``estimates``: what each is expected to take, by model."""
        self._models, self._estimates = models, estimates

    def relocate(self, paths: Paths, first_port: int, last_port: int) -> None:
        """Start engines beneath these paths, on ports of that range, from now on; running engines stay."""
        self._paths = paths
        self.ports.take(first_port, last_port)

    def renamed(self, model: ModelConfig, name: str) -> ModelConfig:
        """The settings of an engine whose replica has another id now."""
        known = self._models.get(name)
        return replace(model, name=name, replica_of=known.replica_of if known else model.replica_of)

    def prepare(self, command: commands.StartEngine) -> tuple[EngineProcess, StartOrder | None]:
        """Everything a start needs, decided before anything is done. Raises ConfigError.

        No order comes with a server that is not ours to start.
        """
        model = self._models[command.replica]
        engine = self._engine_of(model)
        instance = instance_name(model.name)
        run_dir = self._paths.run / instance
        place = replace(self._place(command, run_dir), hub=self._paths.homes.hub(model))
        port = 0
        try:
            launch = engine.launch(model, place)
            port = launch.listen.port
        finally:
            if port != place.port:
                self.ports.release(place.port)
        process = EngineProcess(model, engine, instance, launch.listen, command.placement, fingerprint(model))
        process.stop, process.stop_signal, process.self_managed = launch.stop, launch.stop_signal, launch.self_managed
        process.watch, process.environment = launch.watch, environment_now(model)
        process.standby = self._standby(model, engine, launch)
        try:
            return process, self._order(process, launch, run_dir) if launch.argv else None
        except ProtocolError as error:
            raise ConfigError(f"{model.where}: models.{model.name}: {error}".removeprefix(": ")) from None

    def _place(self, command: commands.StartEngine, run_dir: Path) -> Place:
        devices = self._memory.devices_of(command.placement)
        estimate = self._estimates.get(command.replica)
        here = self._cpus(self._models[command.replica], devices)
        return Place(
            run_dir=run_dir,
            device_ids=tuple(device.id for device in devices),
            memory=command.memory if devices else 0,
            device_memory=min((device.memory for device in devices), default=0),
            port=self.ports.reserve(),
            device_files=self._memory.files_of(command.placement),
            kv_cache=estimate.kv_cache if estimate else 0,
            context=estimate.context if estimate else 0,
            visible=environment(devices),
            cpus=here.count if here.count < here.machine else 0,
            quota=here.quota is not None and here.count < here.machine,
            key=self.keys.of(run_dir.name),
        )

    def standby_of(self, model: ModelConfig) -> Standby | None:
        """The kind of standby that an engine of the model could be made of now; None where there is none."""
        engine = self._engine_of(model)
        if not isinstance(engine, CanStandBy):
            return None
        devices = gpus(self._memory.inventory)[: engine.device_count(model)]
        here = self._cpus(model, devices)
        place = Place(
            run_dir=self._paths.run / instance_name(model.name),
            device_ids=tuple(device.id for device in devices),
            port=1,
            hub=self._paths.homes.hub(model),
            visible=environment(devices),
            cpus=here.count if here.count < here.machine else 0,
            quota=here.quota is not None and here.count < here.machine,
        )
        try:
            return self._standby(model, engine, engine.launch(model, place))
        except VllmdError:  # its start will say
            return None

    def _standby(self, model: ModelConfig, engine: Engine, launch: Launch) -> Standby | None:
        """None also for an engine with a user of its own: standbys are the shared user's.

        What a device can do is read at import.
        """
        alike = len({device.name for device in self._memory.inventory}) <= 1
        special = model.user or launch.cwd or launch.stop or not launch.argv
        if special or not alike or not isinstance(engine, CanStandBy):
            return None
        standby = engine.standby(model, launch)
        return standby and replace(standby, env=early(self._variables(model, launch), standby.late))

    def _variables(self, model: ModelConfig, launch: Launch) -> dict[str, str]:
        try:
            used = environments.chosen(model)
        except ConfigError:  # which its start says
            used = None
        caches = compile_caches.variables(used, self._paths.homes.at(model), one_name(model.engine))
        return {**self._paths.homes.variables(model), **caches, **launch.env, **model.env}

    def needs(self, model: ModelConfig) -> int:
        """Bytes of host memory that its engine is expected to take."""
        estimate = self._estimates.get(model.name)
        return estimate.host_running if estimate else 0

    def _cpus(self, model: ModelConfig, devices: Sequence[Device]) -> Cpus:
        here = cpus().within(model.limits.cpu_quota)
        near = near_cpus(model, devices)
        return replace(here, count=min(here.count, len(near))) if near else here

    def _order(self, process: EngineProcess, launch: Launch, run_dir: Path) -> StartOrder:
        devices = self._memory.devices_of(process.placement)
        near = near_cpus(process.model, devices)
        return StartOrder(
            instance=process.instance,
            argv=launch.argv,
            env=self._variables(process.model, launch),
            user=ordered_user(process.model),
            cwd=launch.cwd,
            run_dir=str(run_dir),
            listen_uds=launch.listen.uds,
            stop_timeout=min(max(process.model.stop_timeout, 1.0), LONGEST_STOP),
            limits={key: value for key, value in asdict(process.model.limits).items() if value is not None},
            cpus=near,
            node=(devices[0].node or 0) if near else -1,
            metadata={
                "model": process.model.name,
                "listen": json.dumps(without_key(process.listen)),
                "devices": json.dumps(process.placement.devices),
                "fingerprint": process.fingerprint,
                "environment": process.environment or "",
                "state": "starting",
                "level": "0",
                **dated("since", "started"),
                "run_dir": str(run_dir),
                "ending": json.dumps([process.stop, process.stop_signal, process.self_managed]),
            },
        )

    def stop_order(self, process: EngineProcess, instance: str) -> StartOrder:
        """The order for the stop command of an engine that has one."""
        return StartOrder(
            instance=instance,
            argv=process.stop,
            env={**self._paths.homes.variables(process.model), **process.model.env},
            user=ordered_user(process.model),
            run_dir=str(self._paths.run / instance),
        )

    def release(self, process: EngineProcess) -> None:
        """Free the port of an engine that is gone, unless the port belongs to a remote server."""
        if process.ordered or process.running:
            self.ports.release(process.listen.port)


def near_cpus(model: ModelConfig, devices: Sequence[Device]) -> tuple[int, ...]:
    """The CPUs of the NUMA node of all its devices; none where they are of several nodes, or ``numa`` is off."""
    nodes = {device.node for device in devices}
    return devices[0].cpus if model.numa and len(nodes) == 1 and None not in nodes else ()
