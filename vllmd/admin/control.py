"""What the endpoints may ask of the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from vllmd.core.types import Snapshot


class Control(Protocol):
    """The daemon, as the admin endpoints see it. Verbs raise UnknownModel for a name that is none."""

    def models(self) -> list[dict[str, Any]]:
        """Every configured model: ``id``, ``aliases``, ``state``, ``max_model_len``, ``routes``, ``engine``."""

    def health(self) -> dict[str, Any]:
        """``status`` (``ok`` or what is wrong), devices, and the state of every model."""

    def status(self) -> dict[str, Any]:
        """Everything that ``vllmctl ps``, ``info`` and ``gpus`` show; bytes and seconds."""

    def snapshot(self) -> Snapshot | None:
        """The core's own words; None until the daemon has found its devices and engines."""

    def resolve(self, name: str) -> str:
        """The configured name of what the operator calls a model."""

    async def load(self, model: str) -> None:
        """Have it started or woken; returns at once."""

    async def unload(self, model: str, *, force: bool) -> None:
        """Have it stopped, after its requests unless ``force``; clears a failure."""

    async def sleep(self, model: str, level: int) -> None:
        """Have it put to sleep at level 1 or 2, or stopped at 3, after its requests."""

    async def pin(self, model: str, pinned: bool) -> None:
        """Keep it loaded once it is, or do so no more."""

    async def lease(self, lease: str, model: str, seconds: float | None) -> None:
        """Keep it for ``seconds`` (None: until released)."""

    async def release(self, lease: str, *, stop: bool) -> None:
        """Give a lease back; ``stop``: the last one to go stops the model."""

    def progress(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """``{state, phase, detail, elapsed}`` now and at each change until it has come to rest.

        The last one is ``{done: true, state, seconds}`` or ``{error: {message}}``.
        """

    def decisions(self, model: str) -> list[dict[str, Any]]:
        """The last decisions (``at`` in Unix time), oldest first; all of them, or one model's."""

    def watch(self) -> AsyncIterator[dict[str, Any]]:
        """Decisions as they are made, until the caller stops."""

    def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and with ``follow`` what comes."""

    async def reload(self) -> dict[str, Any]:
        """Take the configuration anew; ``{changed, added, removed, warnings}``. Raises ConfigError."""
