"""A third party's engine behind a seam: what it raises becomes a ConfigError that names it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Call, Engine, Failure, Launch, Place, Progress
from vllmd.errors import ConfigError, VllmdError

log = logging.getLogger("vllmd.engines")

_METHODS = (
    "sleep_levels",
    "launch",
    "ready",
    "sleep",
    "wake",
    "asleep",
    "routes",
    "served_name",
    "progress",
    "failure",
    "footprint",
)


def missing_methods(kind: object) -> list[str]:
    """The methods of the contract that an object lacks."""
    return [name for name in _METHODS if not callable(getattr(kind, name, None))]


class Guarded:
    """The contract, carried out by somebody else's object."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.kind = name
        self._engine = engine

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        return frozenset(self._ask("sleep_levels", model))

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        launch: Launch = self._ask("launch", model, place)
        return launch

    def ready(self, model: ModelConfig) -> Call:
        call: Call = self._ask("ready", model)
        return call

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        return tuple(self._ask("sleep", level, freeze=freeze))

    def wake(self, level: int) -> Sequence[Call]:
        return tuple(self._ask("wake", level))

    def asleep(self) -> Call | None:
        call: Call | None = self._ask("asleep")
        return call

    def routes(self, model: ModelConfig) -> frozenset[str]:
        return frozenset(self._ask("routes", model))

    def served_name(self, model: ModelConfig) -> str:
        return str(self._ask("served_name", model))

    def progress(self, line: str) -> Progress | None:
        progress: Progress | None = self._read("progress", line)
        return progress

    def failure(self, lines: Sequence[str]) -> Failure:
        failure: Failure | None = self._read("failure", lines)
        return failure or Failure(lines[-1] if lines else "it said nothing")

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        footprint: Footprint | None = self._read("footprint", lines)
        return footprint

    def _ask(self, method: str, *args: Any, **more: Any) -> Any:
        try:
            return getattr(self._engine, method)(*args, **more)
        except VllmdError:
            raise
        except Exception as error:
            log.exception("engine plug-in %s: %s failed", self.kind, method)
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"the engine plug-in {self.kind!r} failed in {method}: {what}") from error

    def _read(self, method: str, lines: str | Sequence[str]) -> Any:
        """Reading a log is a courtesy: where it fails, the start goes on without it."""
        try:
            return getattr(self._engine, method)(lines)
        except Exception:
            log.exception("engine plug-in %s: %s failed", self.kind, method)
            return None
