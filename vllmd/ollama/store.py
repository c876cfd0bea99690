"""What can be done to the models themselves: fetched, deleted, made of others. Until there is a store, nothing.

``Store`` is all that ``endpoints`` asks of one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from vllmd.errors import Unsupported

CONFIGURED = "models are those of the configuration; an operator adds them to vllmd.yaml"


class Store(Protocol):
    """Each raises VllmdError for what it cannot do."""

    def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Fetch it; how far it is: ``{"status", "digest", "total", "completed"}``."""

    async def delete(self, model: str) -> None:
        """Delete it."""


class NoStore:
    """Refuses everything, with who can do it."""

    async def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Raises Unsupported."""
        raise Unsupported(f"{model!r} is not here and cannot be pulled: {CONFIGURED}")
        yield {}

    async def delete(self, model: str) -> None:
        """Raises Unsupported."""
        raise Unsupported(f"{model!r} cannot be deleted here: {CONFIGURED}")
