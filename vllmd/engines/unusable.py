"""The engine of a model whose kind cannot be loaded: every start fails with the reason, and nothing else is harmed."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Call, Failure, Launch, Place
from vllmd.engines.plain import Plain
from vllmd.engines.vllm import ROUTES
from vllmd.errors import ConfigError


class Unusable(Plain):
    """Takes the place of an engine that is not known, cannot be loaded, or refuses the model's settings."""

    kind = "unusable"
    ROUTES = ROUTES  # of the kind that serves most: let through to the start, each client hears the reason

    def __init__(self, error: ConfigError) -> None:
        self.error = error

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """Raises the ConfigError that made the kind unusable."""
        raise self.error

    def ready(self, model: ModelConfig) -> Call:
        """Raises the ConfigError that made the kind unusable."""
        raise self.error

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """Raises the ConfigError that made the kind unusable."""
        raise self.error

    def wake(self, level: int) -> Sequence[Call]:
        """Raises the ConfigError that made the kind unusable."""
        raise self.error

    def failure(self, lines: Sequence[str]) -> Failure:
        """The ConfigError's message, as a permanent failure."""
        return Failure(self.error.message, permanent=True)
