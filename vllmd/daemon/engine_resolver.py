"""Each model's engine. A kind that cannot be used (there is none, a plug-in that raises) fails its own models only."""

from __future__ import annotations

import logging
from collections.abc import Container

from vllmd.config.types import ModelConfig
from vllmd.engines import engine_kind, engine_of
from vllmd.engines.base import Engine
from vllmd.errors import ConfigError

log = logging.getLogger("vllmd.engines")


class EngineResolver:
    """``engine_of``, kept for each model, and without exceptions."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet  # the caller reports errors
        self._found: dict[str, tuple[ModelConfig, Engine]] = {}

    def __call__(self, model: ModelConfig) -> Engine:
        """The model's engine, or an ``Unusable`` that has the reason."""
        known = self._found.get(model.name)
        if known is None or known[0] is not model:
            known = self._found[model.name] = (model, self._usable(model))
        return known[1]

    def renew(self, names: Container[str]) -> None:
        """Make engines anew that are made of more than a model's settings, or could not be made.

        To be called when the configuration is read again: a remote's key is in a file of its own, and what an engine
        lacked may be there by now. The kinds' own objects, which nearly all models share, stay for the models of these
        ``names``; what others had is forgotten.
        """
        from vllmd.engines.unusable import Unusable

        self._found = {
            name: (model, engine)
            for name, (model, engine) in self._found.items()
            if name in names and not isinstance(engine, Unusable) and engine is engine_kind(model.engine)
        }

    def _usable(self, model: ModelConfig) -> Engine:
        try:
            return _tried(model)
        except ConfigError as error:
            if not self._quiet:
                log.error("%s: every request for it will fail: %s", model.name, error.message)
            reason = error
        except Exception as error:  # a kind of our own with a defect must not take the others down
            log.exception("%s: every request for it will fail", model.name)
            reason = ConfigError(f"the engine {model.engine!r} failed: {type(error).__name__}: {error}")
        from vllmd.engines.unusable import Unusable  # hardly ever needed, and not before the first client

        return Unusable(reason)


def _tried(model: ModelConfig) -> Engine:
    """An engine whose answers are kept: what its kind says now it says later, too. Raises ConfigError."""
    engine = engine_of(model)
    engine.sleep_levels(model)
    engine.routes(model)
    engine.served_name(model)
    engine.asleep()
    engine.busy()
    engine.headers()
    engine.device_count(model)
    engine.alive(model)
    return engine
