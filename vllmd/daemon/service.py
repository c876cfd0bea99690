"""The daemon from its first to its last breath, as lists of bounded steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmd.config.types import Config, ModelConfig
from vllmd.core import events
from vllmd.core.costs import CostBook
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, ModelSpec, Settings, State
from vllmd.daemon.adoption import adopt_all
from vllmd.daemon.control import DaemonControl
from vllmd.daemon.doors import Doors
from vllmd.daemon.fleet import Fleet, Paths, PortPool, fingerprint
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.loop import Heart
from vllmd.daemon.memory import Memory
from vllmd.daemon.specs import spec_of
from vllmd.daemon.turnstile import Turnstile
from vllmd.engines import engine_of
from vllmd.engines.base import Listen
from vllmd.engines.estimate import estimate, merged
from vllmd.errors import ConfigError, LauncherFailed, Unavailable
from vllmd.gpu import Devices, NoDevices, in_thread, open_devices
from vllmd.launcher.client import ExitReport, LauncherClient
from vllmd.systemd.notify import Notifier

log = logging.getLogger("vllmd")

SAMPLE_INTERVAL = 5.0  # seconds between looks at the devices while an engine is loaded
STATUS_INTERVAL, SHORTEST_TICK = 1.0, 0.05  # seconds
SHORTEST_LIFE = 1.0  # seconds; faster activations would look like a crash loop to systemd's start limit
DEVICES_LIMIT = 30.0  # seconds for the driver to say what there is
STOP_ENGINES_LIMIT = 60.0


@dataclass(frozen=True)
class Surroundings:
    """Where this daemon runs, from its environment."""

    launcher: str = ""  # socket path; "" makes a private launcher that takes its engines along
    run_dir: Path = Path("/run/vllmd-engine")
    home: Path | None = None  # of the engines
    cache: Path | None = None
    activated: bool = False  # listeners came from systemd: exit when idle
    environment: Mapping[str, str] = field(default_factory=dict)


class Daemon:
    """Holds the rooms together; decides nothing about models itself."""

    def __init__(self, config: Config, surroundings: Surroundings, reload: Callable[[], Config]) -> None:
        self.config = config
        self.surroundings = surroundings
        self.broken = ""  # why the configuration cannot be used, if it cannot
        self.started = time.time()
        self.heart: Heart
        self.fleet: Fleet
        self.memory: Memory
        self.launcher: LauncherClient
        self.learnt = Learnt(surroundings.cache and surroundings.cache / "learnt.json")
        self.opened = asyncio.Event()
        self.notify = Notifier()
        self.control = DaemonControl(self)
        self.turnstile = Turnstile(self.post, self._where, engine_of, self.opened)
        self._side_tasks: set[asyncio.Task[None]] = set()
        self.doors: Doors
        self.backend = ""
        self._reload = reload
        self._stopping = asyncio.Event()
        self._idle_since = time.monotonic()
        self._status = ""

    # -- a life ----------------------------------------------------------------------------

    async def run(self, listeners: Mapping[str, Sequence[socket.socket]]) -> None:
        """Serve until told to stop, or until there has been nothing to do for long enough."""
        self.turnstile.configure(self.config.models)
        self.doors = Doors(self.config, self.turnstile, self.control, listeners)
        self._on_signals()
        self.doors.open()
        self.notify.ready("looking for devices and engines")
        chores = [asyncio.ensure_future(chore) for chore in (self._open(), self._tick())]
        try:
            await self._stopping.wait()
        finally:
            await self.shut_down()
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)

    async def _open(self) -> None:
        """Find the devices, the launcher and what runs already; then let requests through."""
        self.memory = Memory(await self._find_devices())
        log.info("devices: %s", self.memory.source)
        await asyncio.to_thread(self.learnt.load)
        self.heart = Heart(await self._scheduler())
        self.launcher = await self._connect_launcher()
        self.backend = (await self.launcher.info()).backend
        self.fleet = self._fleet()
        self.heart.connect(self.fleet, self.turnstile)
        self.heart.on_decision, self.heart.on_change = self.control.note, self.control.stir
        running = [] if self.broken else await self.launcher.list()
        await adopt_all(self.fleet, running, self.config.models, engine_of, self.heart.post)
        self.opened.set()
        self.heart.post(events.TimePassed())

    async def shut_down(self) -> None:
        """Stop, each step bounded; engines under systemd are systemd's to stop, if it wants them stopped."""
        limit = self.config.server.drain_timeout
        self.notify.stopping(f"finishing {self.turnstile.open} requests")
        self.doors.stop_accepting()
        await self._drain(limit)
        self.turnstile.reject_waiting("vllmd is shutting down; try again in a few seconds")
        await self._stop_engines()
        await self._note_idle()
        await self._keep_learnt()
        await self.doors.close(limit=5.0)
        if self.opened.is_set():
            self.heart.close()
            await self.launcher.close()

    def stop(self) -> None:
        """Ask it to shut down."""
        self._stopping.set()

    async def _find_devices(self) -> Devices:
        """The devices; a driver that does not answer counts as having none, and is said."""
        finding = in_thread(lambda: open_devices(self.config, self.surroundings.environment))
        try:
            return await asyncio.wait_for(finding, DEVICES_LIMIT)
        except TimeoutError:
            why = f"the GPU driver did not answer within {DEVICES_LIMIT:.0f} s"
            log.error("%s: continuing without devices", why)
            return NoDevices(why)

    # -- opening ---------------------------------------------------------------------------

    async def _scheduler(self) -> Scheduler:
        specs = await asyncio.to_thread(self.specs, self.config.models)
        settings = Settings(self.config.policy, self._host_budget(), self.config.server.queue_limit)
        return Scheduler(specs, self.memory.inventory, settings, CostBook.from_dict(self.learnt.costs))

    def specs(self, models: Mapping[str, ModelConfig]) -> list[ModelSpec]:
        """What the core knows of the models; reads their files."""
        return [self._spec(model) for model in models.values()]

    def _spec(self, model: ModelConfig) -> ModelSpec:
        smallest = min((device.memory for device in self._allowed(model)), default=0)
        told = estimate(model, self._hf_home(), smallest)
        footprint = merged(told.footprint, self.learnt.footprints.get(fingerprint(model)))
        return spec_of(model, engine_of(model), footprint, told.weights)

    def _allowed(self, model: ModelConfig) -> list[Device]:
        return [device for device in self.memory.inventory if not model.devices or device.index in model.devices]

    def _hf_home(self) -> Path:
        environment = self.surroundings.environment
        if "HF_HOME" in environment:
            return Path(environment["HF_HOME"])
        home = self.surroundings.home or Path(environment.get("HOME", "/"))
        return home / ".cache" / "huggingface"

    def _host_budget(self) -> int:
        if self.config.host_memory is not None:
            return self.config.host_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    async def _connect_launcher(self) -> LauncherClient:
        """The launcher's socket, or one of our own; tried again until it answers, requests wait meanwhile."""
        while True:
            try:
                return await self._launcher_once()
            except (LauncherFailed, OSError) as error:
                log.error("cannot reach the launcher at %s: %s", self.surroundings.launcher or "(private)", error)
                await asyncio.sleep(1.0)

    async def _launcher_once(self) -> LauncherClient:
        if self.surroundings.launcher:
            path = self.surroundings.launcher
            return await LauncherClient.connect(path, self._on_exit, self._on_log, self._on_lost)
        return await LauncherClient.spawn_private(self._on_exit, self._on_log, self._on_lost)

    def _fleet(self) -> Fleet:
        ports = PortPool(self.config.engines.port_start, self.config.engines.port_end)
        paths = Paths(self.config.engines.run_dir or self.surroundings.run_dir,
                      self.config.engines.home or self.surroundings.home)  # fmt: skip
        fleet = Fleet(self.launcher, self._post_engine, self.memory, paths, engine_of, ports)
        fleet.models = self.config.models
        fleet.on_phase = self.control.stir
        return fleet

    # -- events ----------------------------------------------------------------------------

    def post(self, event: events.Event) -> None:
        """Hand an event to the core."""
        self.heart.post(event)

    def _post_engine(self, event: events.Event) -> None:
        """An engine's event: what it measured is kept."""
        if isinstance(event, events.EngineReady) and event.footprint:
            model = self.config.models.get(event.model)
            if model:
                self.learnt.footprints[fingerprint(model)] = event.footprint
        self.heart.post(event)

    def _where(self, model: str) -> Listen | None:
        member = self.fleet.members.get(model)
        return member.listen if member else None

    def _on_exit(self, report: ExitReport) -> None:
        self.fleet.on_exit(report)

    def _on_log(self, instance: str, lines: list[str]) -> None:
        self.fleet.on_log(instance, lines)

    def _on_lost(self) -> None:
        log.warning("lost the launcher; engines run on, reconnecting")

    # -- chores ----------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Once a second (more often for a shorter idle exit): watchdog, status line, idle exit; now and then a sample."""
        next_sample = 0.0
        while True:
            self.notify.watchdog()
            self._say_status()
            if self._may_exit():
                log.info("nothing is loaded and nobody is connected: exiting until the next connection")
                self.stop()
            if time.monotonic() >= next_sample and self.opened.is_set() and self.fleet.members:
                next_sample = time.monotonic() + SAMPLE_INTERVAL
                await self._sample()
            await asyncio.sleep(min(STATUS_INTERVAL, max(self.config.server.idle_exit or 0.0, SHORTEST_TICK)))

    async def _sample(self) -> None:
        views = self.heart.scheduler.snapshot(self.heart.now()).models
        expected = {(view.name, index): view.memory for view in views for index in view.devices}
        sampled = await self.memory.report(self.fleet.members, expected)
        if sampled:
            self.heart.post(sampled)
        await self._note_idle()
        await self._keep_learnt()

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
        return f"{len(self.config.models)} models configured; {loaded}; {self.turnstile.open} requests"

    def _states(self) -> dict[str, str]:
        if not self.opened.is_set():
            return {}
        views = self.heart.scheduler.snapshot(self.heart.now()).models
        return {view.name: view.state.value for view in views if view.state not in (State.STOPPED, State.FAILED)}

    def _may_exit(self) -> bool:
        """Whether the idle exit is due: activated, nothing loaded or asked for, nobody connected, for long enough."""
        after = self.config.server.idle_exit
        busy = (
            not self.surroundings.activated
            or after is None
            or not self.opened.is_set()
            or time.time() - self.started < SHORTEST_LIFE
            or self.fleet.members
            or self.turnstile.open
            or self.doors.connections
        )
        if busy:
            self._idle_since = time.monotonic()
            return False
        return time.monotonic() - self._idle_since >= (after or 0)

    async def _note_idle(self) -> None:
        """Leave each engine's idle clock beside its cgroup, for the next daemon."""
        if not self.opened.is_set():
            return
        now = time.time()
        for view in self.heart.scheduler.snapshot(self.heart.now()).models:
            member = self.fleet.members.get(view.name)
            if member and view.idle is not None:
                await self.fleet.annotate(member, idle_since=f"{now - view.idle:.0f}")

    async def _keep_learnt(self) -> None:
        if self.opened.is_set():
            self.learnt.costs = self.heart.scheduler.costs.to_dict()
            await asyncio.to_thread(self.learnt.save)

    # -- endings ---------------------------------------------------------------------------

    async def _drain(self, limit: float) -> None:
        """Let the requests that have begun come to their end, within ``limit`` seconds."""
        deadline = time.monotonic() + limit
        while self.turnstile.open and time.monotonic() < deadline:
            self.notify.extend_timeout(10.0)
            self.notify.status(f"stopping: waiting for {self.turnstile.open} requests")
            self.notify.watchdog()
            await self.turnstile.emptied(1.0)

    async def _stop_engines(self) -> None:
        """Without systemd nobody else would: end every engine."""
        if self.surroundings.launcher or not self.opened.is_set():
            return
        deadline = time.monotonic() + STOP_ENGINES_LIMIT
        for name in list(self.fleet.members):
            self.heart.post(events.StopAsked(name, force=True))
        while self.fleet.members and time.monotonic() < deadline:
            await self.control.changed(deadline - time.monotonic())

    # -- signals and reload ----------------------------------------------------------------

    def refuse(self, broken: str) -> None:
        """Answer every request with what is wrong with the configuration, until a reload repairs it."""
        self.broken = broken
        self.turnstile.refusal = Unavailable(f"vllmd's configuration is invalid, tell its administrator:\n{broken}")

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self) -> None:
        self._side_task(self._reload_logged())

    async def _reload_logged(self) -> None:
        with contextlib.suppress(ConfigError):
            await self.reload()

    async def reload(self) -> dict[str, Any]:
        """Take a changed configuration; an invalid one changes nothing. Raises ConfigError."""
        await self.opened.wait()
        self.notify.reloading()
        try:
            config = await asyncio.to_thread(self._reload)
            specs = await asyncio.to_thread(self.specs, config.models)
        except ConfigError as error:
            log.error("not reloaded, the configuration is invalid:\n%s", error.message)
            raise
        finally:
            self.notify.ready("")
        return self._take(config, specs)

    def _take(self, config: Config, specs: list[ModelSpec]) -> dict[str, Any]:
        was = self.config.models
        kept = config.models.keys() & was.keys()
        changed = {name for name in kept if fingerprint(config.models[name]) != fingerprint(was[name])}
        added, removed = sorted(config.models.keys() - was.keys()), sorted(was.keys() - config.models.keys())
        self.config, self.broken, self.turnstile.refusal = config, "", None
        self.fleet.models = config.models
        self.turnstile.configure(config.models)
        self.heart.post(events.ModelsChanged(tuple(specs), frozenset(changed)))
        log.info("configuration reloaded: %d models, added %s, removed %s, changed %s",
                 len(config.models), added or "none", removed or "none", sorted(changed) or "none")  # fmt: skip
        return {"models": len(config.models), "added": added, "removed": removed, "changed": sorted(changed),
                "restarted": sorted(changed), "warnings": list(config.warnings)}  # fmt: skip

    def _side_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
