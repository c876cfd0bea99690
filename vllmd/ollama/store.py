"""What can be done to the models themselves: fetched, deleted, given another name; the daemon's store does it.

``Store`` is all that ``endpoints`` asks of one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from vllmd.admin.control import Control
from vllmd.api.answers import Pulled
from vllmd.errors import Unavailable, Unsupported

CONFIGURED = "models are those of the configuration; an operator adds them with vllmctl add, or in vllmd.yaml"


class Store(Protocol):
    """Each raises VllmdError for what it cannot do."""

    def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Fetch it; how far it is: ``{"status", "digest", "total", "completed"}``."""

    async def delete(self, model: str) -> None:
        """Take a model out, and its files. Raises UnknownModel, Conflict, Unsupported."""

    async def copy(self, model: str, name: str) -> None:
        """Serve it under another name as well."""


class NoStore:
    """Refuses everything, with who can do it."""

    async def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Always raises Unsupported: there is no store here."""
        raise Unsupported(f"{model!r} is not here and cannot be pulled: {CONFIGURED}")
        yield {}

    async def delete(self, model: str) -> None:
        """Always raises Unsupported: there is no store here."""
        raise Unsupported(f"{model!r} cannot be deleted here: {CONFIGURED}")

    async def copy(self, model: str, name: str) -> None:
        """Always raises Unsupported: there is no store here."""
        raise Unsupported(f"{model!r} cannot be copied here: {CONFIGURED}")


class DaemonStore:
    """Has the daemon do it; who may was asked before."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def pull(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """Fetch it and serve it. Whoever leaves ends it, unless somebody else waits for the same model."""
        async with contextlib.aclosing(self._control.store.pull(model, add=True, detached=False)) as lines:
            async for line in lines:
                if line.error:
                    raise Unavailable(line.error.message)
                if line.done:
                    yield {"status": "success"}
                elif line.phase == "downloading" and line.total:
                    yield _progress(line)
                else:
                    yield {"status": "pulling manifest"}

    async def delete(self, model: str) -> None:
        """Serve it no more, and remove its files where nothing else needs them."""
        await self._control.store.remove(model, files=True, dry=False)

    async def copy(self, model: str, name: str) -> None:
        """Serve it under another name as well."""
        await self._control.store.copy(model, name)


def _progress(line: Pulled) -> dict[str, Any]:
    """How far a download is. Ollama's own program has a bar for each digest, and takes its letters 7 to 19 for a name;

    ours is of the source, for the files are several.
    """
    digest = "sha256:" + hashlib.sha256(line.source.encode()).hexdigest()
    progress = {"digest": digest, "total": line.total, "completed": line.completed}
    return {"status": f"pulling {digest[7:19]}", **progress}
