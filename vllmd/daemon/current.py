"""What all parts of the daemon share: its environment, the configuration in force, the back end once it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from vllmd.api.answers import Reloaded
from vllmd.config.replicas import engines_of
from vllmd.config.types import Config, ModelConfig
from vllmd.frozen import frozen

T = TypeVar("T")


class ApplyConfiguration(Protocol):
    """Goes on with another configuration. Raises Conflict if the core finds one of ``unless_used`` in use then."""

    def __call__(self, config: Config, unless_used: frozenset[str] = ..., /) -> Awaitable[Reloaded]:
        """The answer has what changed."""


@frozen
class RuntimeEnvironment:
    """Where this daemon runs, from its environment."""

    launcher: str = ""  # socket path; "" makes a private launcher that takes its engines along
    run_dir: Path = Path("/run/vllmd-engine")
    home: Path | None = None  # of the engines
    homes: Path | None = None  # where those of models with a user of their own are
    cache: Path | None = None
    learnt: Path | None = None  # the file of figures that are kept over restarts; None: none are
    keys: Path | None = None  # the file of keys that were made with vllmctl; None: none can be
    disabled: Path | None = None  # the file of models that operators have disabled; None: it ends with the daemon
    usage: Path | None = None  # the file in which use is recorded; None: use is not recorded
    logs: Path | None = None
    sessions: Path | None = None  # the file of the page's sessions; None: they end with the daemon
    activated: bool = False  # listeners came from systemd: exit when idle
    environment: Mapping[str, str] = field(default_factory=dict)


class Current:
    """The configuration in force. A reload replaces it as a whole, so a setting is read here each time it is needed."""

    def __init__(self, config: Config, broken: str = "") -> None:
        self.broken = broken  # why the configuration cannot be used; "" if it can
        self.refused = ""  # why the last reload was refused: the files are not what is in force
        self.config = config
        self.changes = 0  # how often it was replaced
        self._take_engines(config)

    def apply(self, config: Config) -> None:
        """This configuration is in force from now on."""
        self.config, self.broken, self.refused = config, "", ""
        self.changes += 1
        self._take_engines(config)

    def _take_engines(self, config: Config) -> None:
        self.engines: Mapping[str, ModelConfig] = engines_of(config.models)  # by the id that the core knows each by
        self._replicas: dict[str, list[str]] = {}  # the ids of the engines of models that have several
        for name, engine in self.engines.items():
            if engine.replica_of:
                self._replicas.setdefault(engine.replica_of, []).append(name)

    def model_of(self, engine: str) -> str:
        """The model of an engine."""
        config = self.engines.get(engine)
        return (config.replica_of if config else "") or engine

    def engines_of(self, model: str) -> list[str]:
        """The ids of the engines that a model is to have, or the one id."""
        return list(self._replicas.get(model, (model,)))


class Later(Generic[T]):
    """One thing that is there once, later: the back end, while the front end serves already."""

    def __init__(self) -> None:
        self.now: T | None = None
        self._there = asyncio.Event()

    async def wait(self) -> T:
        """Wait for ``set``; returns what was set."""
        await self._there.wait()
        if self.now is None:
            raise RuntimeError("a part was announced and is not there")
        return self.now

    def set(self, thing: T) -> None:
        """Have the thing from now on, and wake everything that waits for it."""
        self.now = thing
        self._there.set()
