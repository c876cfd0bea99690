"""The engine of a model whose kind cannot be had: every start of it fails with the reason, nothing else is harmed."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Call, Failure, Launch, Place, Progress
from vllmd.engines.vllm import ROUTES
from vllmd.errors import ConfigError


class Unusable:
    """Takes the place of an engine that is not known, cannot be loaded, or refuses the model's settings."""

    kind = "unusable"

    def __init__(self, error: ConfigError) -> None:
        self.error = error

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """None."""
        return frozenset()

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """Raises the ConfigError."""
        raise self.error

    def ready(self, model: ModelConfig) -> Call:
        """Raises the ConfigError."""
        raise self.error

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """Raises the ConfigError."""
        raise self.error

    def wake(self, level: int) -> Sequence[Call]:
        """Raises the ConfigError."""
        raise self.error

    def asleep(self) -> Call | None:
        """It cannot be asked."""
        return None

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """Those of the kind that serves most: let through to the start, each client hears the reason."""
        return ROUTES

    def served_name(self, model: ModelConfig) -> str:
        """Its own."""
        return model.name

    def progress(self, line: str) -> Progress | None:
        """Nothing."""
        return None

    def failure(self, lines: Sequence[str]) -> Failure:
        """The reason."""
        return Failure(self.error.message, permanent=True)

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """Nothing."""
        return None
