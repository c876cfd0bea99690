"""The daemon from its first to its last breath, as lists of bounded steps; ``opening`` has what is in between."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllmd.config.replicas import engines_of, is_this_host, meant_here
from vllmd.config.types import Config, ModelConfig
from vllmd.core import events
from vllmd.core.types import ReplicaView, State
from vllmd.daemon.adapter_loader import provide
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.control import DaemonControl
from vllmd.daemon.discovery import with_discovered
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.failure_text import places
from vllmd.daemon.idle_exit import IdleExit
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.listeners import Listeners
from vllmd.daemon.offers import ORDER
from vllmd.daemon.quotas import Quotas
from vllmd.daemon.runtime_models import addresses
from vllmd.daemon.serializers import state_of
from vllmd.engines.base import Listen
from vllmd.errors import ConfigError, EngineFailed, Unavailable
from vllmd.systemd.notify import Notifier

if TYPE_CHECKING:
    from vllmd.daemon.device_watch import DeviceWatch
    from vllmd.daemon.dispatcher import Dispatcher
    from vllmd.daemon.engine_manager import EngineManager
    from vllmd.daemon.memory import Memory
    from vllmd.launcher.client import LauncherClient

log = logging.getLogger("vllmd")

SAMPLE_INTERVAL = 5.0  # seconds between looks at the devices while an engine is loaded
WAIT_INTERVAL = 1.0  # the same while a model waits for room: strangers may leave any moment
STATUS_INTERVAL, SHORTEST_TICK = 1.0, 0.05  # seconds
STOP_ENGINES_LIMIT = 60.0
ANSWERS_LIMIT = 5.0  # for answers that clients are still taking
NOTES_LIMIT = 2.0  # for notes that the next daemon can do without; a launcher that has died cannot take them
DRAIN_LOOK = 0.05  # seconds between looks at who is still there
QUIET = 0.3  # seconds without a request after which kept connections count as unused
LAUNCHER_LIMIT = 5.0  # seconds that a shutdown waits for a launcher: systemd may start none before we have gone
SHUTTING_DOWN = "vllmd is shutting down; try again in a few seconds"


@dataclass(frozen=True)
class RuntimeEnvironment:
    """Where this daemon runs, from its environment."""

    launcher: str = ""  # socket path; "" makes a private launcher that takes its engines along
    run_dir: Path = Path("/run/vllmd-engine")
    home: Path | None = None  # of the engines
    homes: Path | None = None  # where those of models with a user of their own are
    cache: Path | None = None
    learnt: Path | None = None  # the file of figures that are kept over restarts; None: none are
    logs: Path | None = None
    activated: bool = False  # listeners came from systemd: exit when idle
    environment: Mapping[str, str] = field(default_factory=dict)


class Take(Protocol):
    """Goes on with another configuration, if that is ``still`` right when the core is told. Raises Conflict if not."""

    def __call__(self, config: Config, still: Callable[[], bool] = ..., /) -> Awaitable[dict[str, Any]]:
        """The answer has what changed."""


class Daemon:
    """Holds the rooms together; decides nothing about models itself."""

    def __init__(self, config: Config, runtime: RuntimeEnvironment, reload: Callable[[], Config]) -> None:
        self.config = config
        self.engines: Mapping[str, ModelConfig] = {}  # of its models, by the id that the core knows each by
        self.runtime = runtime
        self.broken = ""  # why the configuration cannot be used, if it cannot
        self.started = time.time()
        self.dispatcher: Dispatcher
        self.engine_manager: EngineManager
        self.memory: Memory
        self.launcher: LauncherClient
        self.learnt = Learnt(runtime.learnt)
        self.opened = asyncio.Event()
        self.notify = Notifier()
        self.kinds = EngineResolver()
        self.control = DaemonControl(self)
        self.quotas = Quotas(config.auth.keys)
        self.admission_gate = AdmissionGate(self.kinds, self.quotas, self.control.counters)
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._sampling = asyncio.Lock()
        self.watch: DeviceWatch
        self._trouble = ""  # what the core was last told of the devices
        self._avoided: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {})
        self.listeners: Listeners
        self.take: Take  # goes on with another configuration
        self.backend = ""
        self.failed = False
        self._reload = reload
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()
        self._idle_exit = IdleExit(time.monotonic())
        self._status = ""

    # -- a life ----------------------------------------------------------------------------

    async def run(self, listeners: Mapping[str, Sequence[socket.socket]]) -> None:
        """Serve until told to stop, or until there has been nothing to do for long enough."""
        self.config = await self._ours(self.config)
        self.engines = engines_of(self.config.models)
        self._offer(self.config)
        self.control.runtime_models.listen = addresses(listeners.get("http", ()))
        self.listeners = Listeners(self.config, self.admission_gate, self.quotas, self.control, listeners)
        self.listeners.on_outcome = self._outcome
        self._on_signals()
        self.listeners.open()
        self.notify.ready("looking for devices and engines")
        chores = [asyncio.ensure_future(chore) for chore in (self._open(), self._tick())]
        try:
            await self._stopping.wait()
        finally:
            await self.shut_down()
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)

    async def _ours(self, config: Config) -> Config:
        """``config`` without what is meant for other machines, and with the models of the cache, if it wants them."""
        config, elsewhere = meant_here(config, is_this_host)
        if elsewhere:
            log.info("left out, for they are meant for other machines: %s", ", ".join(elsewhere))
        return await self._with_discovered(config)

    async def _with_discovered(self, config: Config) -> Config:
        """``config`` with the models of the cache, if it wants them."""
        return await asyncio.to_thread(with_discovered, config, self.control.cache()) if config.discover else config

    async def _open(self) -> None:
        """Find the devices, the launcher and what runs already; then let requests through.

        The rooms that this takes are entered only now, in a thread: the first client need not wait for them.
        """
        try:
            opening = await asyncio.to_thread(importlib.import_module, "vllmd.daemon.startup")
            await opening.start(self)
        except Exception:  # a defect, and nothing can be served: the next start may fare better
            log.exception("vllmd cannot open")
            self.failed = True
            self.stop()

    async def shut_down(self) -> None:
        """Stop, each step bounded; engines under systemd are systemd's to stop, if it wants them stopped."""
        self.notify.stopping(f"finishing {self.admission_gate.requests} requests")
        last = not self.runtime.activated  # nobody comes after us whom clients could wait for
        self.listeners.drain(turn_away=last)
        if last:
            self._turn_away()
        await self._drain(self.config.server.drain_timeout)
        self._turn_away()
        self.listeners.refuse_unread(Unavailable(SHUTTING_DOWN, retry_after=5))
        await self._stop_engines()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._note_idle(), NOTES_LIMIT)
        await self._keep_learnt()
        await self.listeners.close(limit=0.0 if self._hurry.is_set() else ANSWERS_LIMIT)
        if self.opened.is_set():
            self.dispatcher.close()
            await self.launcher.close()

    def stop(self) -> None:
        """Ask it to shut down; asked a second time it waits for nobody any more."""
        if self._stopping.is_set():
            log.warning("told to stop once more: breaking off what is under way")
            self._hurry.set()
        self._stopping.set()

    # -- events ----------------------------------------------------------------------------

    def post(self, event: events.Event) -> None:
        """Hand an event to the core."""
        self.dispatcher.post(event)

    def address_of(self, replica: str) -> Listen | None:
        """Where the replica's engine listens; None if there is none."""
        process = self.engine_manager.processes.get(replica)
        return process.listen if process else None

    def _offer(self, config: Config) -> None:
        """Have the gate know what clients may ask for."""
        self.admission_gate.configure(config.models, self.engines, config.server.keep_alive_limit, config.pools)

    async def provide(self, replica: str, adapter: str, waits: Callable[[], None]) -> None:
        """Have the replica's engine load the adapter, unless it has it. Raises EngineFailed."""
        process = self.engine_manager.processes.get(replica)
        if process is None:
            raise EngineFailed(f"the engine of {replica} is gone")
        await provide(process, adapter, waits)

    def nearest(self, models: Sequence[str]) -> str:
        """Of these models the one that will answer soonest, by its state; of several that run the least busy one."""
        views = {view.name: view for view in self.dispatcher.scheduler.snapshot(self.dispatcher.now()).models}

        def distance(name: str) -> tuple[int, int]:
            view = views.get(name)
            state = state_of(view) if view else ""
            return ORDER.get(state, len(ORDER)), view.in_flight + view.queued if view and state == "running" else 0

        return min(models, key=distance)

    def phase_of(self, model: str) -> str:
        """What clients who wait for the model are told; "" while nothing is done."""
        return self.control.phase_of(model)

    def unreached(self, replica: str) -> None:
        """Nobody listens where the replica's engine should."""
        self.engine_manager.answered(replica, 0, failed=True)

    def retried(self, replica: str) -> None:
        """A request goes from this replica to another one."""
        self.control.retried(replica)

    def _outcome(self, model: str, status: int, failed: bool) -> None:
        """What became of a request; of several replicas the scheduler itself judges."""
        config = self.config.models.get(model)
        if self.opened.is_set() and config and not config.replicas:
            self.engine_manager.answered(model, status, failed=failed)

    # -- chores ----------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Once a second, or as often as the idle exit wants: watchdog, status, idle exit; now and then a sample."""
        looked = kept = -SAMPLE_INTERVAL
        while True:
            self.notify.watchdog()
            self._say_status()
            if self._may_exit():
                log.info("nothing is loaded and nobody is connected: exiting until the next connection")
                self.stop()
            now = time.monotonic()
            if self.opened.is_set() and now >= looked + self._look_interval():
                keep, looked = now >= kept + SAMPLE_INTERVAL, now
                kept = now if keep else kept
                self.side_task(self._sample(keep=keep))
            await asyncio.sleep(min(STATUS_INTERVAL, max(self.config.server.idle_exit or 0.0, SHORTEST_TICK)))

    async def _sample(self, *, keep: bool) -> None:
        """A side task: neither a stuck driver nor a stuck launcher may hold up the watchdog.

        ``keep``: what a later daemon must know is written down as well.
        """
        if self._sampling.locked():
            return
        async with self._sampling:
            await self.look()
            if keep:
                self.dispatcher.flush_log()
                await self._note_idle()
                await self._keep_learnt()

    async def look(self) -> None:
        """Tell the core what the devices hold now, if they say."""
        expected = {(view.id, index): view.memory for view in self._replicas() for index in view.devices}
        sampled = await self.memory.report(self.engine_manager.processes, expected)
        if sampled is None and self.memory.readable:  # the driver hangs: nobody knows what others hold
            unread = {device.index: "no answer" for device in self.memory.inventory}
            sampled = events.MemorySampled({}, {}, unread)
        if sampled:
            self.dispatcher.post(sampled)
        self._tell_trouble()

    def _tell_trouble(self) -> None:
        """Tell the core once whether the devices answer at all, and which of them must not be used."""
        memory = self.memory
        if memory.readable and memory.trouble != self._trouble:
            if self._trouble:
                log.info("the devices answer again")
            self.dispatcher.post(events.DevicesChanged(memory.inventory, memory.trouble))
        self._trouble = memory.trouble
        ill, lost = (memory.last.ill, memory.last.lost) if memory.last else ({}, {})
        if (ill, lost) != self._avoided:
            self._avoided = (dict(ill), dict(lost))
            self.dispatcher.post(events.DevicesTroubled(dict(ill), dict(lost)))

    def _look_interval(self) -> float:
        """How often it matters what the devices hold: something waits for room, is loaded, or has not come back."""
        seen = self.dispatcher.scheduler.snapshot(self.dispatcher.now())
        if any(view.waiting_for and view.state in (State.STOPPED, State.SLEEPING) for view in self._replicas()):
            return WAIT_INTERVAL
        in_use = self.memory.trouble or (
            self.engine_manager.processes
            or self.admission_gate.requests
            or any(device.wedged for device in seen.devices)
        )
        return SAMPLE_INTERVAL if in_use else math.inf

    def _awaited(self) -> bool:
        """Whether a model is to be loaded, by request or by an operator's word."""
        return any(view.waiting_for for view in self._replicas())

    def _replicas(self) -> list[ReplicaView]:
        """How each engine stands."""
        seen = self.dispatcher.scheduler.snapshot(self.dispatcher.now())
        return [view for model in seen.models for view in model.replicas]

    def _drained(self) -> bool:
        """Whether an operator has taken a device out of use, which nobody but us remembers."""
        return any(device.drained for device in self.dispatcher.scheduler.snapshot(self.dispatcher.now()).devices)

    def _say_status(self) -> None:
        status = self.status_line()
        if status != self._status:
            self._status = status
            self.notify.status(status)

    def status_line(self) -> str:
        """What ``systemctl status vllmd`` shows."""
        if self.broken:
            return f"configuration invalid, serving errors: {self.broken.splitlines()[0]}"
        loaded = ", ".join(f"{name} {state}" for name, state in self._states().items()) or "none loaded"
        return f"{len(self.config.models)} models configured; {loaded}; {self.admission_gate.requests} requests"

    def _states(self) -> dict[str, str]:
        if not self.opened.is_set():
            return {}
        off = (State.STOPPED, State.FAILED)
        return {view.id: view.state.value for view in self._replicas() if view.state not in off}

    def _may_exit(self) -> bool:
        """Whether the idle exit is due: activated, nothing loaded or asked for, nobody connected, for long enough."""
        busy = bool(
            not self.runtime.activated
            or not self.opened.is_set()
            or self.engine_manager.processes
            or self.admission_gate.requests
            or self.listeners.connections
            or self._awaited()
            or self._drained()
        )
        after, accepted = self.config.server.idle_exit, self.listeners.accepted
        return self._idle_exit.due(time.monotonic(), after, busy=busy, accepted=accepted)

    async def _note_idle(self) -> None:
        """Leave each engine's idle clock beside its cgroup, for the next daemon."""
        if not self.opened.is_set():
            return
        now = time.time()
        for view in self._replicas():
            process = self.engine_manager.processes.get(view.id)
            if process and view.idle is not None:
                await self.engine_manager.annotate(process, idle_since=f"{now - view.idle:.0f}")

    async def _keep_learnt(self) -> None:
        if self.opened.is_set():
            self.learnt.costs = self.dispatcher.scheduler.costs.to_dict()
            await asyncio.to_thread(self.learnt.save)

    # -- endings ---------------------------------------------------------------------------

    def _turn_away(self) -> None:
        """Whoever waits or comes is told to come back; answers that have begun go on."""
        self.admission_gate.refusal = Unavailable(SHUTTING_DOWN, retry_after=5)
        self.admission_gate.reject_waiting(SHUTTING_DOWN)

    async def _drain(self, limit: float) -> None:
        """Let the requests that have begun come to their end, within ``limit`` seconds.

        A request counts from its first byte on. Clients whose connections are kept, and could not be told yet that
        they end, get the time to send what they are about to.
        """
        began = quiet = connected = time.monotonic()
        told = -math.inf
        while (now := time.monotonic()) < began + limit and not self._hurry.is_set():
            if self.admission_gate.requests or self.listeners.busy:
                quiet = now
            if now - quiet >= QUIET or not (self.listeners.clients or self.admission_gate.requests):
                break
            connected = now if self.opened.is_set() and self.launcher.connected else connected
            if now - connected >= LAUNCHER_LIMIT:
                self._turn_away()
            if now - told >= STATUS_INTERVAL:
                told = now
                self.notify.extend_timeout(10.0)
                self.notify.status(
                    f"stopping: waiting for {self.admission_gate.requests or self.listeners.busy} requests"
                )
                self.notify.watchdog()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), DRAIN_LOOK)

    async def _stop_engines(self) -> None:
        """Without systemd nobody else would: end every engine."""
        if self.runtime.launcher or not self.opened.is_set():
            return
        deadline = time.monotonic() + STOP_ENGINES_LIMIT
        for name in list(self.engine_manager.processes):
            self.dispatcher.post(events.StopAsked(name, force=True))
        while self.engine_manager.processes and time.monotonic() < deadline and not self._hurry.is_set():
            changed = asyncio.ensure_future(self.control.changed(deadline - time.monotonic()))
            hurried = asyncio.ensure_future(self._hurry.wait())
            await asyncio.sleep(0)  # both listen from here on; engines elsewhere have stopped by now, and say so once
            if self.engine_manager.processes:
                await asyncio.wait({changed, hurried}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            hurried.cancel()

    # -- signals and reload ----------------------------------------------------------------

    def accept(self, config: Config) -> None:
        """Serve by this configuration from now on."""
        self.config, self.broken = config, ""
        logging.getLogger().setLevel(config.log_level.upper())
        self.admission_gate.refusal = None
        self.engines = engines_of(config.models)
        self._offer(config)
        self.listeners.configure(config)

    def refuse(self, broken: str) -> None:
        """Answer every request with where the configuration is wrong, until a reload repairs it.

        What is wrong there is for those who may read it: operators, and the log.
        """
        self.broken = broken
        self.admission_gate.refusal = Unavailable(
            f"vllmd's configuration is invalid, tell its administrator: {places(broken)}"
        )

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        ends_with_terminal = _terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as under nohup
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, ends_with_terminal)

    def _on_hangup(self, ends_with_terminal: bool) -> None:
        """Somebody wants a reload; or the terminal was closed that we run at."""
        if ends_with_terminal and not _terminal():
            self.stop()
        else:
            self.side_task(self._reload_logged())

    async def _reload_logged(self) -> None:
        with contextlib.suppress(ConfigError):
            await self.reload()

    async def reload(self) -> dict[str, Any]:
        """Take a changed configuration; an invalid one changes nothing. Raises ConfigError."""
        await self.opened.wait()
        self.notify.reloading()
        try:
            config = await self._ours(await asyncio.to_thread(self._reload))
            async with self.control.runtime_models.changing:
                return await self.take(self.control.runtime_models.added_to(config))
        except ConfigError as error:
            log.error("not reloaded, the configuration is invalid:\n%s", error.message)
            raise
        finally:
            self.notify.ready()

    def side_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)


def _terminal() -> bool:
    """Whether this process belongs to a terminal that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
