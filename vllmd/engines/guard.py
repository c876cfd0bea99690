"""A seam around a third party's engine: what it raises becomes a ConfigError that names it.

So does an answer of the wrong type; and optional methods that it lacks have defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Adapter, Bindable, Call, Engine, Failure, Launch, Place, Progress
from vllmd.engines.options import wrong_setting
from vllmd.engines.plain import Plain, usual_api
from vllmd.errors import ConfigError, VllmdError

T = TypeVar("T")

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


class GuardedKind:
    """A third party's kind that makes an engine for each model."""

    def __init__(self, name: str, kind: Bindable) -> None:
        self.kind = name
        self._kind = kind

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model, guarded as well. Raises ConfigError."""
        engine = attempt(self.kind, "bind", lambda: self._kind.bind(model), model)
        if missing := missing_methods(engine):
            what = f"made a {type(engine).__name__} in bind, which lacks {', '.join(missing)}"
            raise _wrong(self.kind, f"{what}; see vllmd.engines.base.Engine", model)
        return Guarded(self.kind, engine)


class Guarded:
    """The contract of ``base.Engine``, carried out by a plug-in's object."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.kind = name
        self._engine = engine

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        return attempt(self.kind, "sleep_levels", lambda: frozenset(self._engine.sleep_levels(model)), model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        return self._checked(Launch, "launch", lambda: self._engine.launch(model, place), model)

    def ready(self, model: ModelConfig) -> Call:
        return self._checked(Call, "ready", lambda: self._engine.ready(model), model)

    def alive(self, model: ModelConfig) -> Call:
        if not hasattr(self._engine, "alive"):
            return self.ready(model)
        return self._checked(Call, "alive", lambda: self._engine.alive(model), model)

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        if not hasattr(self._engine, "own_api"):
            return usual_api(self.routes(model))
        return attempt(self.kind, "own_api", lambda: frozenset(self._engine.own_api(model)), model)

    def busy(self) -> Call | None:
        if not hasattr(self._engine, "busy"):
            return None
        return attempt(self.kind, "busy", self._engine.busy)

    def device_count(self, model: ModelConfig) -> int:
        if not hasattr(self._engine, "device_count"):
            return Plain().device_count(model)
        return self._checked(int, "device_count", lambda: self._engine.device_count(model), model)

    def headers(self) -> Sequence[tuple[str, str]]:
        if not hasattr(self._engine, "headers"):
            return ()
        return attempt(self.kind, "headers", lambda: tuple(self._engine.headers()))

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        return attempt(self.kind, "sleep", lambda: tuple(self._engine.sleep(level, freeze=freeze)))

    def wake(self, level: int) -> Sequence[Call]:
        return attempt(self.kind, "wake", lambda: tuple(self._engine.wake(level)))

    def asleep(self) -> Call | None:
        return attempt(self.kind, "asleep", self._engine.asleep)

    def routes(self, model: ModelConfig) -> frozenset[str]:
        return attempt(self.kind, "routes", lambda: frozenset(self._engine.routes(model)), model)

    def served_name(self, model: ModelConfig) -> str:
        return str(attempt(self.kind, "served_name", lambda: self._engine.served_name(model), model))

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        if not hasattr(self._engine, "adapters"):
            return {}
        return attempt(self.kind, "adapters", lambda: dict(self._engine.adapters(model)), model)

    def progress(self, line: str) -> Progress | None:
        return self._read("progress", lambda: self._engine.progress(line))

    def failure(self, lines: Sequence[str]) -> Failure:
        failure = self._read("failure", lambda: self._engine.failure(lines))
        return failure or Failure(lines[-1] if lines else "it said nothing")

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        return self._read("footprint", lambda: self._engine.footprint(lines))

    def _checked(self, kind: type[T], method: str, ask: Callable[[], T], model: ModelConfig) -> T:
        answer = attempt(self.kind, method, ask, model)
        if not isinstance(answer, kind):
            what = f"returned {answer!r} in {method} instead of a {kind.__name__}"
            raise _wrong(self.kind, f"{what}; see vllmd.engines.base.Engine", model)
        return answer

    def _read(self, method: str, ask: Callable[[], T]) -> T | None:
        """The phase of a log line. Where the plug-in fails at it, the start goes on without."""
        try:
            return ask()
        except (Exception, SystemExit):
            log.exception("engine plug-in %s: %s failed", self.kind, method)
            return None


def attempt(name: str, method: str, ask: Callable[[], T], model: ModelConfig | None = None) -> T:
    """The plug-in's answer. Raises ConfigError for whatever it raises, an exit of the process included.

    ``model``: the one whose setting ``engine`` names the plug-in, if the call is about one.
    """
    try:
        return ask()
    except VllmdError:
        raise
    except (Exception, SystemExit) as error:
        log.exception("engine plug-in %s: %s failed", name, method)
        what = f"{type(error).__name__}: {error}"
        raise _wrong(name, f"failed in {method}: {what}", model) from error


def _wrong(name: str, what: str, model: ModelConfig | None) -> ConfigError:
    plug_in = f"the engine plug-in {name!r} {what}"
    return wrong_setting(model, "engine", plug_in) if model else ConfigError(plug_in)
