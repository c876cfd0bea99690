"""The core, the engines, the devices, the launcher: what is behind the listeners. ``startup`` builds it, whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import field

from vllmd.core import commands, events
from vllmd.core.types import ReplicaView, Snapshot, State
from vllmd.daemon.adapter_loader import provide
from vllmd.daemon.admission_gate import ERRORS
from vllmd.daemon.boot_clock import moments
from vllmd.daemon.device_readings import DeviceReadings
from vllmd.daemon.device_watch import DeviceWatch
from vllmd.daemon.dispatcher import Dispatcher
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.failures import failures_to_keep
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.memory import Memory
from vllmd.engines.base import Call, Listen
from vllmd.errors import EngineFailed
from vllmd.frozen import frozen
from vllmd.launcher.client import LauncherClient


@frozen
class BackEnd:
    """Implements ``daemon.admission_gate.BackEnd``. ``launched_by``: the launcher's way to start engines."""

    launched_by: str
    launcher: LauncherClient
    dispatcher: Dispatcher
    engines: EngineManager
    memory: Memory
    devices: DeviceWatch
    readings: DeviceReadings
    learnt: Learnt
    keeping: asyncio.Lock = field(default_factory=asyncio.Lock)  # one writes what was learnt at a time

    @property
    def post(self) -> Callable[[events.Event], None]:
        """Hands an event to the core."""
        return self.dispatcher.post

    @property
    def admit_at_once(self) -> Callable[[str, str], str | None]:
        """Tells the core of a request: the replica that has it now, or None: its arrival is to be posted."""
        return self.dispatcher.admit_at_once

    @property
    def finish_at_once(self) -> Callable[[str], bool]:
        """Tells the core that a request has ended well; False: its end is to be posted."""
        return self.dispatcher.finish_at_once

    @property
    def perform(self) -> Callable[[events.Event], None]:
        """Hands an operator's event to the core. Raises InternalError if the core fails at it."""
        return self.dispatcher.perform

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        """Hand an event to the core, and have ``answered`` called before anything that follows from it begins."""
        self.dispatcher.ask(event, answered)

    async def asked(self, event: events.Asking) -> commands.Answer:
        """Post an event and wait for the core's answer to it. Raises the VllmdError with which the core refused it."""
        heard: asyncio.Future[commands.Answer] = asyncio.get_running_loop().create_future()
        self.ask(event, lambda answer: None if heard.done() else heard.set_result(answer))
        answer = await heard
        if answer.refused:
            raise ERRORS[answer.error](answer.refused)
        return answer

    def snapshot(self, model: str = "") -> Snapshot:
        """A snapshot of all models, devices and decisions; ``model``: of that one alone, by its name or a replica's.

        It is computed anew at each call: call once and pass it on.
        """
        scheduler, now = self.dispatcher.scheduler, self.dispatcher.now()
        return scheduler.snapshot_of(model, now) if model else scheduler.snapshot(now)

    def activity(self) -> Snapshot:
        """A snapshot without models of which nothing runs, is wanted or has failed."""
        return self.dispatcher.scheduler.activity(self.dispatcher.now())

    def replicas_of(self, name: str) -> list[ReplicaView]:
        """How each engine of the model stands, or the one of that id; none if nothing is called so."""
        return self.dispatcher.scheduler.replicas_of(name, self.dispatcher.now())

    def address_of(self, replica: str) -> Listen | None:
        """Where the replica's engine listens; None if there is none."""
        process = self.engines.processes.get(replica)
        return process.listen if process else None

    async def provide(self, replica: str, adapter: str, waits: Callable[[], None], load: Call | None = None) -> None:
        """Have the replica's engine load the adapter, unless it has it. Raises EngineFailed."""
        process = self.engines.processes.get(replica)
        if process is None:
            raise EngineFailed(f"the engine of {replica} is gone")
        await provide(process, adapter, waits, load)

    def unreached(self, replica: str) -> None:
        """Nobody listens where the replica's engine should."""
        self.engines.note_answer(replica, 0, failed=True)

    def serves(self, model: str) -> bool:
        """Whether an engine of the model is awake."""
        return self.dispatcher.scheduler.foremost(model)[1] is State.READY

    def phase_of(self, model: str) -> str:
        """The phase that clients who wait are told: ``weights``, ``waking``, ...; "" while nothing is under way."""
        replica, state = self.dispatcher.scheduler.foremost(model)
        if state is State.WAKING:
            return str(state.value)
        if state is not State.STARTING:
            return ""
        process = self.engines.processes.get(replica)
        return str((process.phase_text if process else "") or state.value)

    async def note_idle(self) -> None:
        """Leave each engine's idle clock beside its cgroup, for the next daemon."""
        for view in self.activity().replicas:
            process = self.engines.processes.get(view.id)
            if process and view.idle is not None:
                await self.engines.annotate(process, **moments(idle_since=view.idle))

    async def keep_learnt(self) -> None:
        """Write down what was learnt of the models, and which of them have failed."""
        async with self.keeping:
            self.learnt.costs = self.dispatcher.scheduler.costs.to_dict()
            if known := self.engines.configured:  # with a broken configuration nothing is known of them
                self.learnt.failures = failures_to_keep(
                    self.activity(), known, self.learnt.failures, self.learnt.dates.of
                )
            await asyncio.to_thread(self.learnt.save)

    async def close(self) -> None:
        """Nothing more is decided, and the launcher is left alone."""
        self.dispatcher.close()
        with contextlib.suppress(OSError):
            await self.launcher.close()
