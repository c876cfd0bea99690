"""What operators may have done: each is an event for the core, or a task of the daemon's. Nothing is read here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllmd.core import events
from vllmd.daemon.current import Later
from vllmd.daemon.instances import Instances
from vllmd.daemon.probing import probe
from vllmd.daemon.processes import kill
from vllmd.errors import NotFound

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd


class OperatorCommands:
    """Implements ``vllmd.admin.control.Commands``. Every verb waits until devices and engines have been found."""

    def __init__(
        self, back: Later[BackEnd], instances: Instances, reload: Callable[[], Awaitable[dict[str, Any]]]
    ) -> None:
        self.reload = reload
        self.load_on = instances.load_on
        self.drop_instance = instances.drop
        self._back = back

    async def load(self, model: str) -> None:
        """Have it started or woken; of several replicas one whatever it takes, the others where they fit.

        Raises ModelTooLarge for one that can never be.
        """
        await (await self._back.wait()).asked(events.LoadAsked(model))

    async def unload(self, model: str, *, force: bool, device: int | None = None) -> None:
        """Have it stopped, or only its engines on that device; clears a failure."""
        (await self._back.wait()).post(events.StopAsked(model, force, device))

    async def sleep(self, model: str, level: int) -> None:
        """Have it put to sleep, or stopped at 3."""
        (await self._back.wait()).post(events.SleepAsked(model, level))

    async def pin(self, model: str, pinned: bool) -> None:
        """Pin or unpin it."""
        (await self._back.wait()).post(events.PinSet(model, pinned))

    async def lease(self, lease: str, model: str, seconds: float | None) -> None:
        """Keep it for ``seconds``; of several replicas one that serves."""
        back = await self._back.wait()
        back.post(events.LeaseTaken(lease, model, None if seconds is None else back.dispatcher.now() + seconds))

    async def release(self, lease: str, *, stop: bool) -> None:
        """Give a lease back."""
        (await self._back.wait()).post(events.LeaseReleased(lease, stop))

    async def probe(self, model: str, limit: float | None, *, everybody: bool) -> dict[str, Any]:
        """Ask each engine of it that serves its probe, all at the same time."""
        return await probe(await self._back.wait(), model, limit, everybody=everybody)

    async def kill(self, pid: int, *, force: bool) -> str:
        """End the engine that has the process; with ``force`` any process on a GPU."""
        back = await self._back.wait()
        return await kill(pid, back.engines, back.memory, force=force)

    async def drain(self, device: int, drained: bool) -> dict[str, Any]:
        """Take a device out of use, or give it back; how it is then. Raises NotFound."""
        back = await self._back.wait()
        back.post(events.DeviceDrained(device, drained))
        for view in back.activity().devices:
            if view.index == device:
                return asdict(view)
        raise NotFound(f"there is no device {device}; vllmctl gpus lists those that there are")
