"""What operators may have done: each is an event for the core, or a task of the daemon's. Nothing is read here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllmd.api.answers import Device, Killed, Probed, Reloaded, Suspended
from vllmd.core import events
from vllmd.daemon.current import Later
from vllmd.daemon.disabled import Disabled
from vllmd.daemon.instances import Instances
from vllmd.daemon.probing import probe
from vllmd.daemon.processes import kill
from vllmd.daemon.serializers import device as device_of
from vllmd.daemon.suspension import Suspension
from vllmd.errors import NotFound

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd


class OperatorCommands:
    """Implements ``vllmd.admin.control.Commands``. Every verb waits until devices and engines have been found."""

    def __init__(
        self,
        back: Later[BackEnd],
        instances: Instances,
        disabled: Disabled,
        engines_of: Callable[[str], Sequence[str]],
        reload: Callable[[], Awaitable[Reloaded]],
    ) -> None:
        self.reload = reload
        self.load_on = instances.load_on
        self.drop_instance = instances.drop
        self._back = back
        self._disabled = disabled
        self._engines_of = engines_of
        self._suspension = Suspension()

    async def post(self, event: str, fields: Mapping[str, object]) -> None:
        """Have the core decide on an event of ``vllmd.core.events`` of that name. Raises InternalError."""
        (await self._back.wait()).perform(getattr(events, event)(**fields))

    async def load(self, model: str) -> None:
        """Start or wake a model; of several replicas one by any means, the others where they fit.

        Raises ModelTooLarge for one that can never be.
        """
        await (await self._back.wait()).asked(events.LoadAsked(model))

    async def unload(self, model: str, *, force: bool, device: int | None = None) -> None:
        """Stop a model, or only its engines on that device; clears a failure."""
        (await self._back.wait()).perform(events.StopAsked(model, force, device))

    async def sleep(self, model: str, level: int) -> None:
        """Put a model to sleep, or stop it at level 3. Raises Conflict for a sleep of a model that is not loaded."""
        await (await self._back.wait()).asked(events.SleepAsked(model, level))

    async def disable(self, model: str, message: str | None) -> None:
        """Take a model out of use until it is enabled: clients get ``message``, engines are stopped.

        Raises Unavailable.
        """
        back = await self._back.wait()
        back.perform(await self._disabled.add(model, message or ""))

    async def enable(self, model: str) -> None:
        """Serve a model again, with all its replicas. Raises Unavailable."""
        back = await self._back.wait()
        await self._disabled.remove(model, *self._engines_of(model))
        back.perform(events.ModelEnabled(model))

    async def lease(self, model: str, lease: str, seconds: float | None) -> None:
        """Keep a model loaded for ``seconds``; of several replicas one that serves."""
        back = await self._back.wait()
        back.perform(events.LeaseTaken(lease, model, None if seconds is None else back.dispatcher.now() + seconds))

    async def release(self, model: str, lease: str, *, stop: bool) -> None:
        """Give a lease back before its deadline."""
        (await self._back.wait()).perform(events.LeaseReleased(lease, stop))

    async def probe(self, model: str, all: bool, *, limit: float | None) -> Probed:
        """Send each engine of the model that serves its probe, all at the same time."""
        return await probe(await self._back.wait(), model, limit, everybody=all)

    async def kill(self, pid: int, *, force: bool) -> Killed:
        """End the engine that has the process; with ``force`` any process on a GPU."""
        back = await self._back.wait()
        return Killed(pid, message=await kill(pid, back.engines, back.memory, force=force))

    async def suspend(self, suspended: bool) -> Suspended:
        """Have engines leave the devices before the machine sleeps, or give the devices back."""
        back = await self._back.wait()
        return await (self._suspension.begin(back) if suspended else self._suspension.end(back))

    async def drain(self, device: int, drained: bool) -> Device:
        """Take a device out of use, or give it back; returns its state then. Raises NotFound.

        One that is gone can be given back: until then it would be drained when it came back.
        """
        back = await self._back.wait()
        was_drained = device in back.activity().drained
        back.perform(events.DeviceDrained(device, drained))
        for view in back.activity().devices:
            if view.index == device:
                return device_of(view)
        if was_drained and not drained:
            return Device(device, wedged="it is not there any more")
        raise NotFound(f"there is no device {device}; vllmctl gpus lists those that there are")
