"""What the admin endpoints may ask: the daemon behind ``vllmd.admin.control.Control``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllmd
from vllmd.admin.control import Gauges
from vllmd.admin.counters import Counters
from vllmd.core import events
from vllmd.core.types import Decision, ModelSpec, ModelView, ReplicaView, Snapshot, State
from vllmd.daemon.discovery import hf_home
from vllmd.daemon.failure_text import places
from vllmd.daemon.instances import Instances
from vllmd.daemon.probing import probe
from vllmd.daemon.processes import gpus, kill
from vllmd.daemon.runtime_models import RuntimeModels
from vllmd.daemon.self_description import Descriptions
from vllmd.daemon.serializers import about, card, health, line, state_of
from vllmd.errors import (
    BadRequest,
    Conflict,
    ModelTooLarge,
    NotFound,
    Unavailable,
    UnknownModel,
    UpstreamFailed,
    VllmdError,
)
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.upstream import request

if TYPE_CHECKING:
    from vllmd.daemon.engine_process import EngineProcess
    from vllmd.daemon.service import Daemon

MOVING = frozenset({State.STARTING, State.WAKING, State.DRAINING, State.FALLING_ASLEEP, State.STOPPING})
LOADING = frozenset({State.STARTING.value, State.WAKING.value})
WATCH_BACKLOG = 1000  # news kept for a watcher that does not read; then the oldest are lost to it
SCRAPE_LIMIT = 5.0  # seconds for an engine to tell its metrics
SCRAPE_SAMPLE = 0.5  # seconds for the devices to be read; without an answer the last reading is shown
OUTCOMES: dict[type, tuple[str, bool]] = {  # what an engine's event ends, and whether it failed
    events.EngineReady: ("start", False),
    events.EngineStartFailed: ("start", True),
    events.EngineAwake: ("wake", False),
    events.EngineWakeFailed: ("wake", True),
    events.EngineAsleep: ("sleep", False),
    events.EngineSleepFailed: ("sleep", True),
    events.EngineStopped: ("stop", False),
    events.EngineExited: ("exit", True),
}
ENDINGS = frozenset({"stop", "exit"})  # changes after which the engine's process is gone


class DaemonControl:
    """Reads snapshots, posts events; keeps no state but who is watching."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.counters = Counters()
        self.runtime_models = RuntimeModels(daemon)
        self.instances = Instances(daemon)
        self._files: dict[str, str] | None = None  # repository -> kind of model, once asked for
        self._descriptions = Descriptions()
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._changed = asyncio.Event()
        self._followed = 0  # how many wait for a change

    async def opened(self) -> None:
        """Wait until devices and engines have been found."""
        await self._daemon.opened.wait()

    # -- reading ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """The core's own words; None until the daemon has found its devices and engines."""
        if not self._daemon.opened.is_set():
            return None
        dispatcher = self._daemon.dispatcher
        return dispatcher.scheduler.snapshot(dispatcher.now())

    async def models(self) -> list[dict[str, Any]]:
        """Every model for ``/v1/models``."""
        if self._files is None:
            self._files = await asyncio.to_thread(_kinds, self.cache())
        daemon, snapshot, files = self._daemon, self.snapshot(), self._files
        views = {view.name: view for view in snapshot.models} if snapshot else {}
        said = await self._descriptions.of(self._serving(snapshot)) if snapshot else {}
        cards = []
        for model in daemon.config.models.values():
            engines = self._engines(model.name)
            first = daemon.engines[engines[0]]
            own = next((said[engine] for engine in engines if engine in said), None)
            routes, files_kind = daemon.kinds(first).routes(first), files.get(model.source, "")
            cards.append(card(model, routes, views.get(model.name), files_kind, own))
        return [*cards, *daemon.admission_gate.offers.cards(cards)]

    def _serving(self, snapshot: Snapshot) -> list[EngineProcess]:
        """The engines that can be asked now without waking or delaying anything."""
        ready = {view.name for view in snapshot.models if view.state is State.READY}
        ready |= {each.id for view in snapshot.models for each in view.replicas if each.state is State.READY}
        return [process for name, process in self._daemon.engine_manager.processes.items() if name in ready]

    def cache(self) -> Path:
        """The engines' HF_HOME."""
        around, engines = self._daemon.runtime, self._daemon.config.engines
        return hf_home(around.environment, engines.home or around.home)

    def health(self) -> dict[str, Any]:
        """Whether we are well, with devices and models as P's document has them."""
        snapshot = self.snapshot()
        views, devices = (snapshot.models, snapshot.devices) if snapshot else ((), ())
        trouble = self._daemon.memory.trouble if snapshot else ""
        return health(views, devices, places(self._daemon.broken), trouble, ready=snapshot is not None)

    def status(self) -> dict[str, Any]:
        """Everything that ``vllmctl`` shows."""
        daemon, snapshot = self._daemon, self.snapshot()
        about = {
            "version": vllmd.__version__,
            "pid": os.getpid(),
            "uptime": time.time() - daemon.started,
            "policy": daemon.config.policy,
            "opened": snapshot is not None,
            "configuration": {"files": [str(path) for path in daemon.config.files], "error": daemon.broken},
            "requests": daemon.admission_gate.requests,
            "connections": daemon.listeners.connections,
        }
        if snapshot is None:
            return {**about, "backend": "", "source": "", "trouble": "", "devices": [], "models": [],
                    "host_memory": {"budget": 0, "promised": 0}}  # fmt: skip
        return {
            **about,
            "backend": daemon.backend,
            "source": daemon.memory.source,
            "trouble": daemon.memory.trouble,
            "devices": [{**asdict(device), **daemon.memory.about(device.index)} for device in snapshot.devices],
            "host_memory": {"budget": snapshot.host_memory, "promised": snapshot.host_promised},
            "models": [self._lines(view) for view in snapshot.models],
        }

    def _lines(self, view: ModelView) -> dict[str, Any]:
        """A model's line, with those of its replicas in it."""
        if not view.balanced:
            return self._line(view, view.replicas[0].id)
        lines = [self._of_replica(each, view.name) for each in view.replicas]
        leading = next((each["name"] for each in lines if each["state"] == state_of(view)), lines[0]["name"])
        told = {"replicas": lines, "serving": view.serving, "degraded": view.degraded, "replica_of": view.name}
        return {**self._line(view, leading), "config": self._about(view.name), **told}

    def _of_replica(self, view: ReplicaView, model: str) -> dict[str, Any]:
        return {**self._line(view, view.id), "replica_of": model}

    def _line(self, view: ModelView | ReplicaView, engine: str) -> dict[str, Any]:
        engines = self._daemon.engine_manager
        config, process = self._daemon.engines.get(engine), engines.processes.get(engine)
        watts = self._daemon.memory.power.watts.get(engine)
        shown = line(view, config, process, engines.last_start.get(engine), watts)
        if view.since is None and (runs := self._daemon.learnt.runs.get(engine)):  # an earlier daemon's engine
            shown["since"] = max(0.0, time.time() - runs[-1][1])
        return shown

    def _about(self, model: str) -> dict[str, Any]:
        config = self._daemon.config.models.get(model)
        return about(config) if config else {}

    def line(self, model: str) -> dict[str, Any]:
        """One model's line of ``status``, or one replica's. Raises Unavailable while the daemon opens, UnknownModel."""
        self._opened()
        snapshot = self.snapshot()
        for view in snapshot.models if snapshot else ():
            if view.name == model:
                return self._lines(view)
            for each in view.replicas:
                if each.id == model:
                    return self._of_replica(each, view.name)
        raise UnknownModel(f"the model {model!r} is no longer configured", param="model")

    def phase_of(self, model: str) -> str:
        """What clients who wait for the model are told: ``weights``, ``waking``, ...; "" while nothing is done."""
        try:
            line = self.line(model)
        except VllmdError:
            return ""
        return str(line["phase"] or line["state"]) if line["state"] in LOADING else ""

    def views(self, model: str) -> list[ReplicaView]:
        """How each engine of the model stands, or the one of that id; none until the daemon has found them."""
        snapshot = self.snapshot()
        views = [(view.name, each) for view in (snapshot.models if snapshot else ()) for each in view.replicas]
        return [each for name, each in views if model in (name, each.id)]

    def _engines(self, model: str) -> list[str]:
        """The ids of the engines that a model is to have, or the one id."""
        found = [name for name, engine in self._daemon.engines.items() if model in (name, engine.replica_of)]
        return found or [model]

    def _opened(self) -> Daemon:
        """The daemon, all its rooms open. Raises Unavailable."""
        if not self._daemon.opened.is_set():
            raise Unavailable("vllmd is still looking for its devices and engines; try again", retry_after=1)
        return self._daemon

    async def gauges(self) -> Gauges:
        """How things stand; the devices are read for it, if they answer soon."""
        daemon, snapshot = self._daemon, self.snapshot()
        now = Gauges(snapshot, daemon.listeners.connections, daemon.admission_gate.requests, valid=not daemon.broken)
        if snapshot is None:
            return now
        if not daemon.memory.hangs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(daemon.memory.sample(), SCRAPE_SAMPLE)
        sample, engine_manager = daemon.memory.last, daemon.engine_manager
        devices = sample.devices if sample and daemon.memory.readable else {}
        snapshot, starts = self.snapshot(), dict[str, float]()
        for engine, seconds in engine_manager.last_start.items():
            model = self._model_of(engine)
            starts[model] = max(seconds, starts.get(model, 0.0))  # of several replicas the slowest one's
        return replace(
            now,
            snapshot=snapshot,
            last_starts=starts,
            used={index: device.used for index, device in devices.items()},
            power={index: device.power for index, device in devices.items() if device.power is not None},
            load={i: device.utilisation / 100 for i, device in devices.items() if device.utilisation is not None},
            energy=dict(daemon.memory.power.device_joules),
            temperature={i: each.temperature for i, each in devices.items() if each.temperature is not None},
            throttled={index: bool(device.throttled) for index, device in devices.items()},
            model_power=self._by_model(daemon.memory.power.watts),
            model_energy=self._by_model(daemon.memory.power.joules),
        )

    def _by_model(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over each model's engines."""
        sums: dict[str, float] = {}
        for engine, value in values.items():
            model = self._model_of(engine)
            sums[model] = sums.get(model, 0.0) + value
        return sums

    async def gpus(self) -> list[dict[str, Any]]:
        """M's ``GPUInfo`` of every device."""
        await self._daemon.opened.wait()
        return await gpus(self._daemon.memory)

    async def scrape(self, model: str) -> bytes:
        """The engine's own metrics."""
        process = self._opened().engine_manager.processes.get(self._only(model))
        if process is None or process.ready_after is None:
            raise Conflict(f"{model} has no engine now that could tell its metrics")
        status, _, body = await request(process.listen, "GET", "/metrics", timeout=SCRAPE_LIMIT)
        if status != 200:
            raise UpstreamFailed(f"the engine of {model} answered /metrics with {status}")
        return body

    def resolve(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, or the id of a replica. Raises UnknownModel, Forbidden."""
        found = self._daemon.admission_gate.resolve_engine(name, caller)
        caller.check(self._model_of(found), name)
        return found

    def called(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, an adapter, a variant or a pool. Raises UnknownModel, Forbidden."""
        found = self._daemon.admission_gate.called(name, caller)
        caller.check(found, name)
        return found

    def _only(self, model: str) -> str:
        """The one engine that is meant. Raises BadRequest if there are several."""
        engines = self._engines(model)
        if len(engines) > 1:
            raise BadRequest(f"{model} has several engines, name one: {', '.join(engines)}", param="model")
        return engines[0]

    def types(self) -> list[str]:
        """The kinds of engines that there are."""
        from vllmd.engines import engine_names

        return engine_names()

    def decisions(self, model: str) -> list[dict[str, Any]]:
        """The last decisions, oldest first; about a model also the last ones of earlier daemons."""
        snapshot = self.snapshot()
        made = snapshot.decisions if snapshot else ()
        names = {model, *self._engines(model)}
        kept = [each for name in names for each in self._daemon.learnt.decisions.get(name, ())]
        before = sorted((each for each in kept if each["at"] < self._daemon.started), key=lambda each: each["at"])
        return [*before, *(self._dated(each) for each in made if not model or _concerns(each, names))]

    def _dated(self, decision: Decision) -> dict[str, Any]:
        """The decision with Unix time instead of the core's clock, about the replica where it is about one."""
        at = time.time() - self._daemon.dispatcher.now() + decision.at
        told = {"what": decision.what, "why": decision.why, "numbers": dict(decision.numbers)}
        return {**told, "model": decision.replica or decision.model, "at": at}

    def _model_of(self, engine: str) -> str:
        config = self._daemon.engines.get(engine)
        return (config.replica_of if config else "") or engine

    def _labels(self, engine: str) -> tuple[str, str]:
        """The model of an engine, and the engine's id if it is one of several, else ""."""
        model = self._model_of(engine)
        return model, engine if engine != model else ""

    # -- verbs -----------------------------------------------------------------------------

    async def load(self, model: str) -> None:
        """Have it started or woken; of several replicas one whatever it takes, the others where they fit.

        Raises ModelTooLarge for one that can never be.
        """
        await self._post(events.LoadAsked(model))
        views = self.views(model)
        if views and all(view.state is State.STOPPED and not view.waiting_for for view in views):
            for why in [view.failure for view in views if view.failure]:
                raise ModelTooLarge(why)

    async def unload(self, model: str, *, force: bool, device: int | None = None) -> None:
        """Have it stopped, or only its engines on that device; clears a failure."""
        await self._post(events.StopAsked(model, force, device))

    async def sleep(self, model: str, level: int) -> None:
        """Have it put to sleep, or stopped at 3."""
        await self._post(events.SleepAsked(model, level))

    async def pin(self, model: str, pinned: bool) -> None:
        """Pin or unpin it."""
        await self._post(events.PinSet(model, pinned))

    async def lease(self, lease: str, model: str, seconds: float | None) -> None:
        """Keep it for ``seconds``; of several replicas one that serves."""
        await self._daemon.opened.wait()
        deadline = None if seconds is None else self._daemon.dispatcher.now() + seconds
        await self._post(events.LeaseTaken(lease, model, deadline))

    async def release(self, lease: str, *, stop: bool) -> None:
        """Give a lease back."""
        await self._post(events.LeaseReleased(lease, stop))

    async def load_on(self, model: str, device: int) -> str:
        """Have one of its engines on that device, and say which; one more lasts until the next reload."""
        return await self.instances.load_on(model, device)

    async def drop_instance(self, name: str) -> None:
        """Forget an engine that was added."""
        await self.instances.drop(name)

    def configure(self, specs: Iterable[ModelSpec]) -> None:
        """Know what the core was told of the models of a new configuration."""
        self.instances.configure(specs)
        self._files = None

    async def probe(self, model: str, limit: float | None, *, everybody: bool) -> dict[str, Any]:
        """Ask each engine of it that serves its probe, all at the same time."""
        return await probe(self._daemon, model, limit, everybody=everybody)

    async def kill(self, pid: int, *, force: bool) -> str:
        """End the engine that has the process; with ``force`` a stranger on a GPU."""
        await self._daemon.opened.wait()
        return await kill(pid, self._daemon.engine_manager, self._daemon.memory, force=force)

    async def drain(self, device: int, drained: bool) -> dict[str, Any]:
        """Take a device out of use, or give it back; how it is then. Raises NotFound."""
        await self._post(events.DeviceDrained(device, drained))
        snapshot = self.snapshot()
        for view in snapshot.devices if snapshot else ():
            if view.index == device:
                return asdict(view)
        raise NotFound(f"there is no device {device}; vllmctl gpus lists those that there are")

    async def reload(self) -> dict[str, Any]:
        """Take the configuration anew. Raises ConfigError."""
        return await self._daemon.reload()

    async def _post(self, event: events.Event) -> None:
        await self._daemon.opened.wait()
        self._daemon.post(event)

    # -- following -------------------------------------------------------------------------

    def note(self, decision: Decision) -> None:
        """Count a decision, and hand it to whoever watches."""
        self.counters.decided(decision)
        dated = self._dated(decision)
        if dated["model"]:
            self._daemon.learnt.decided(dated)
        if self._watchers:
            self._tell(dated)

    def retried(self, engine: str) -> None:
        """Count a request that one of several replicas did not answer, and that goes to another one."""
        self.counters.retried(*self._labels(engine))

    def take(self, event: events.Event) -> None:
        """An engine's event on its way to the core: count it, and say what became of the model."""
        outcome = OUTCOMES.get(type(event))
        if outcome is None:
            self._daemon.post(event)
            return
        change, failed = outcome
        engine: str = getattr(event, "replica", "")
        view = self._view(engine)
        took = (view.since or 0.0) if view else 0.0
        self.counters.changed(self._model_of(engine), change, took, failed=failed)
        self._daemon.post(event)
        if change in ENDINGS:
            self._daemon.listeners.forget(engine)
        if self._watchers:
            why = getattr(event, "reason", "") or f"{change} done"
            now = self._view(engine)
            state = state_of(now) if now else ""
            what = f"{change} failed" if failed else change
            self._tell({"at": time.time(), "what": what, "model": engine, "why": why, "numbers": {}, "state": state})

    def _view(self, engine: str) -> ReplicaView | None:
        return next(iter(self.views(engine)), None)

    def _tell(self, news: dict[str, Any]) -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(news)

    def stir(self) -> None:
        """Something changed: wake whoever follows a model."""
        if self._followed:
            self._changed.set()
            self._changed = asyncio.Event()

    async def progress(self, model: str) -> AsyncIterator[dict[str, Any]]:
        """How it comes along, until it has come to rest."""
        began = time.monotonic()
        try:
            async for step in self._steps(model, began):
                yield step
            yield _at_rest(self.line(model), time.monotonic() - began)
        except UnknownModel as error:  # a reload removed it meanwhile
            yield {"error": {"message": error.message}, "done": True, "state": "removed"}

    async def _steps(self, model: str, began: float) -> AsyncIterator[dict[str, Any]]:
        shown = ("", "", "")
        self._followed += 1
        try:
            while self._moves(model):
                changed = self._changed  # taken before looking: a change while the reader is busy is not missed
                line = self.line(model)
                if (line["state"], line["phase"], line["detail"]) != shown:
                    shown = (line["state"], line["phase"], line["detail"])
                    yield {
                        "state": shown[0],
                        "phase": shown[1],
                        "detail": shown[2],
                        "elapsed": time.monotonic() - began,
                    }
                await changed.wait()
        finally:
            self._followed -= 1

    async def changed(self, limit: float) -> None:
        """Wait until something has happened, at most ``limit`` seconds."""
        self._followed += 1
        try:
            async with asyncio.timeout(limit):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._followed -= 1

    def _moves(self, model: str) -> bool:
        """Whether it is on its way somewhere, or about to be."""
        return any(view.state in MOVING or bool(view.waiting_for) for view in self.views(model))

    async def watch(self) -> AsyncIterator[dict[str, Any]]:
        """Decisions as they are made, and what became of them."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(WATCH_BACKLOG)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def log(self, model: str, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """The engine's last log lines, and what comes; of one that has ended its last ones."""
        await self._daemon.opened.wait()
        engine = self._only(model)
        process = self._daemon.engine_manager.processes.get(engine)
        if process is None:
            for text in await self._ended_log(engine, lines):
                yield text
            return
        async for text in self._daemon.engine_manager.log_of(process, lines, follow=follow):
            yield text

    async def _ended_log(self, engine: str, lines: int) -> list[str]:
        """What its last engine wrote at last. Raises Unavailable."""
        config, runs = self._daemon.engines.get(engine), self._daemon.learnt.runs.get(engine)
        if config is None or not runs:
            raise Unavailable(f"{engine} has no engine now, and none is known that has ended")
        instance, at = runs[-1]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        text = await self._daemon.engine_manager.log_of_ended(config, instance, lines)
        return [*text, f"-- its engine ended at {when} --"]


def _concerns(decision: Decision, names: Set[str]) -> bool:
    """Whether it is about one of them, or makes it leave."""
    victims = str(decision.numbers.get("victims", "")).split(",")
    return (decision.replica or decision.model) in names or any(v.rpartition(":")[0] in names for v in victims)


def _at_rest(line: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """The last line of a progress."""
    if line["state"] == State.FAILED.value:
        return {"error": {"message": line["failure"]}, "done": True, "state": line["state"]}
    return {"done": True, "state": line["state"], "seconds": elapsed}


def _kinds(cache: Path) -> dict[str, str]:
    """What each repository in the cache is for; reads their files."""
    from vllmd.hub import discover

    return {found.name: found.kind for found in discover(cache)}
