"""Everything that a start needs, decided before anything is done: the place, the launch, the order to the launcher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vllmd.config.names import instance_name
from vllmd.config.types import ModelConfig
from vllmd.core import commands
from vllmd.daemon.member import Member, fingerprint
from vllmd.daemon.memory import Memory
from vllmd.daemon.ports import PortPool
from vllmd.engines.base import Engine, Launch, Place
from vllmd.errors import ConfigError
from vllmd.launcher.client import StartOrder
from vllmd.launcher.protocol import ProtocolError

LONGEST_STOP = 3600.0  # seconds between SIGTERM and SIGKILL that the launcher accepts


@dataclass(frozen=True)
class Paths:
    """Where engines live: run directories (sockets) and their home (caches)."""

    run: Path
    home: Path | None = None


class Orders:
    """Writes the orders for the launcher."""

    def __init__(
        self, memory: Memory, paths: Paths, engine_of: Callable[[ModelConfig], Engine], ports: PortPool
    ) -> None:
        self._models: Mapping[str, ModelConfig] = {}
        self._kv_caches: Mapping[str, int] = {}
        self._memory = memory
        self._paths = paths
        self._engine_of = engine_of
        self._ports = ports

    def configure(self, models: Mapping[str, ModelConfig], kv_caches: Mapping[str, int]) -> None:
        """Start engines by these settings from now on. ``kv_caches``: bytes per device, by model; 0: its own choice."""
        self._models, self._kv_caches = models, kv_caches

    def muster(self, command: commands.StartEngine) -> tuple[Member, StartOrder | None]:
        """Everything a start needs, decided before anything is done. Raises ConfigError.

        No order comes with a server that is not ours to start.
        """
        model = self._models[command.model]
        engine = self._engine_of(model)
        instance = instance_name(model.name)
        run_dir = self._paths.run / instance
        place = self._place(command, run_dir)
        port = 0
        try:
            launch = engine.launch(model, place)
            port = launch.listen.port
        finally:
            if port != place.port:
                self._ports.release(place.port)
        member = Member(model, engine, instance, launch.listen, command.placement, fingerprint(model))
        member.stop, member.stop_signal, member.self_managed = launch.stop, launch.stop_signal, launch.self_managed
        member.watch = launch.watch
        try:
            return member, self._order(member, launch, run_dir) if launch.argv else None
        except ProtocolError as error:
            raise ConfigError(f"{model.where}: models.{model.name}: {error}".removeprefix(": ")) from None

    def _place(self, command: commands.StartEngine, run_dir: Path) -> Place:
        devices = self._memory.devices_of(command.placement)
        return Place(
            run_dir=run_dir,
            device_ids=tuple(device.id for device in devices),
            memory=command.memory if devices else 0,
            device_memory=min((device.memory for device in devices), default=0),
            port=self._ports.reserve(),
            device_files=self._memory.files_of(command.placement),
            kv_cache=self._kv_caches.get(command.model, 0),
        )

    def _order(self, member: Member, launch: Launch, run_dir: Path) -> StartOrder:
        home = {"HOME": str(self._paths.home)} if self._paths.home else {}
        return StartOrder(
            instance=member.instance,
            argv=launch.argv,
            env={**home, **launch.env, **member.model.env},
            cwd=launch.cwd,
            run_dir=str(run_dir),
            listen_uds=launch.listen.uds,
            stop_timeout=min(max(member.model.stop_timeout, 1.0), LONGEST_STOP),
            limits={key: value for key, value in asdict(member.model.limits).items() if value is not None},
            metadata={
                "model": member.model.name,
                "listen": json.dumps(asdict(member.listen)),
                "devices": json.dumps(member.placement.devices),
                "fingerprint": member.fingerprint,
                "state": "starting",
                "level": "0",
                "run_dir": str(run_dir),
                "ending": json.dumps([member.stop, member.stop_signal, member.self_managed]),
            },
        )

    def stop_order(self, member: Member, instance: str) -> StartOrder:
        """The order for the stop command of an engine that has one."""
        home = {"HOME": str(self._paths.home)} if self._paths.home else {}
        return StartOrder(
            instance=instance,
            argv=member.stop,
            env={**home, **member.model.env},
            run_dir=str(self._paths.run / instance),
        )

    def release(self, member: Member) -> None:
        """The engine is gone: its port is free, unless it is somebody else's."""
        if member.ordered or member.running:
            self._ports.release(member.listen.port)
