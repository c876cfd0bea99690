"""The answers to what clients and operators ask: pure functions of a ``StatusInput``, one moment of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import vllmd
from vllmd.admin.control import Gauges
from vllmd.api import answers
from vllmd.api.answers import Card, Decisions, GPUInfo, ModelLine
from vllmd.config.types import Config, ModelConfig
from vllmd.core import types as core
from vllmd.core.types import ModelView, ReplicaView, Snapshot, State
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.current import Current, Later, RuntimeEnvironment
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.event_loop import name_of
from vllmd.daemon.failure_text import places
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.processes import gpus
from vllmd.daemon.self_description import Descriptions
from vllmd.daemon.serializers import about, card, decision, health, line, state_of
from vllmd.errors import BadRequest, Conflict, Unavailable, UnknownModel, UpstreamFailed
from vllmd.frozen import frozen
from vllmd.place import memory_of_machine
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.upstream import request

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.daemon.engine_process import EngineProcess
    from vllmd.daemon.last_starts import Start
    from vllmd.daemon.standbys import StandbyProcess

AT_A_TIME = 100  # models of a list for which one turn of the event loop is used
DRAWN_AT_A_TIME = 1000  # models whose views are drawn in one
SCRAPE_LIMIT = 5.0  # seconds for an engine's metrics
SCRAPE_SAMPLE = 0.5  # seconds for a reading of the devices; after that the last reading is shown


@frozen
class StatusInput:
    """The daemon's state at one moment. ``snapshot`` and ``back`` are None until devices and engines are found.

    ``broken``: why the configuration cannot be used; ``refused``: why the last reload was; ``unwritten``: why use
    cannot be recorded; ``launcher_trouble``: why the launcher does nothing; "" where there is no reason.
    """

    config: Config
    engines: Mapping[str, ModelConfig]  # by id
    broken: str
    refused: str
    requests: int
    connections: int
    back: BackEnd | None
    snapshot: Snapshot | None
    event_loop: str = ""
    unwritten: str = ""
    unanswered: Mapping[str, float] = field(default_factory=dict)  # see ``Listeners.unanswered``
    launcher_trouble: str = ""


def status(seen: StatusInput, started: float, models: tuple[ModelLine, ...]) -> answers.Status:
    """The whole status. ``started``: by ``time.monotonic``. ``models``: each one's ``model_line``."""
    shown = answers.Status(
        version=vllmd.__version__,
        pid=os.getpid(),
        event_loop=seen.event_loop,
        uptime=time.monotonic() - started,
        policy=seen.config.policy,
        opened=seen.snapshot is not None,
        configuration=answers.Configuration(tuple(map(str, seen.config.files)), seen.broken, seen.refused),
        requests=seen.requests,
        connections=seen.connections,
        unwritten=seen.unwritten,
        launcher_trouble=seen.launcher_trouble,
    )
    if seen.snapshot is None or seen.back is None:
        return shown
    memory, snapshot = seen.back.memory, seen.snapshot
    return replace(
        shown,
        backend=seen.back.launched_by,
        source=memory.source,
        trouble=memory.trouble,
        devices=tuple(memory.about(device) for device in snapshot.devices),
        host_memory=answers.HostMemory(snapshot.host_memory, snapshot.host_promised, snapshot.host_standbys or None),
        standbys=tuple(map(standby_line, seen.back.engines.standbys.kept.values())) or None,
        models=models,
    )


def host(root: Path = Path("/")) -> answers.Host:
    """The machine as a whole, of which engines may be allowed a part."""
    machine = os.uname()
    total, available = memory_of_machine(root)
    load = None
    with contextlib.suppress(OSError):
        load = round(os.getloadavg()[0], 2)
    system = f"{machine.sysname} {machine.release}, {machine.machine}"
    return answers.Host(system, os.cpu_count() or 0, load, total, available)


def standby_line(process: StandbyProcess) -> answers.StandbyLine:
    """The status line of a standby."""
    state = "waiting" if process.ready else "importing"
    return answers.StandbyLine(process.instance, process.standby.program, state, process.memory)


def model_line(seen: StatusInput, view: ModelView) -> ModelLine:
    """The status line of a model, with the lines of its replicas in it.

    Of several replicas the model's line shows the engine of the first one that is in the model's state.
    """
    if not view.balanced:
        return _line(seen, view, view.replicas[0].id)
    lines = tuple(_line(seen, each, each.id, replica_of=view.name) for each in view.replicas)
    leading = next((each.name for each in lines if each.state == state_of(view)), lines[0].name)
    return _line(seen, view, leading, replica_of=view.name, replicas=lines)


def _line(
    seen: StatusInput,
    view: ModelView | ReplicaView,
    engine: str,
    replica_of: str = "",
    replicas: tuple[ModelLine, ...] = (),
) -> ModelLine:
    """The status line of a model or of a replica, with what is known of its engine."""
    config = about(seen.config.models.get(view.name) if replicas else seen.engines.get(engine))
    if seen.back is None or seen.snapshot is None:
        return line(view, config, replica_of=replica_of, replicas=replicas)
    engines, since, changed_at = seen.back.engines, view.since, None
    if since is not None:
        changed_at = seen.back.learnt.dates.of(seen.snapshot.at - since)
    elif runs := seen.back.learnt.runs.get(engine):  # its last engine was an earlier daemon's
        changed_at = runs[-1][1]
        ago = time.time() - changed_at
        since = ago if ago >= 0 else None  # negative: the clock has been set back
    return line(
        view,
        config,
        engines.processes.get(engine),
        since=since,
        changed_at=changed_at,
        silent=_silence(seen, engine) if not replicas else None,
        last_start=seen.back.learnt.starts.get(engine),
        power=seen.back.memory.power.watts.get(engine),
        unused=seen.back.memory.power.since_used.get(engine),
        replica_of=replica_of,
        replicas=replicas,
    )


def _silence(seen: StatusInput, engine: str) -> float | None:
    """Seconds for which an engine has answered nothing, though a request waits in it; None where none does.

    Of several engines of a model each is judged by its answers (``core.health``), and that is shown.
    """
    asked, process = seen.unanswered.get(engine), seen.back.engines.processes.get(engine) if seen.back else None
    if asked is None or process is None or process.ready_after is None or process.model.replica_of:
        return None
    return time.monotonic() - max(asked, process.health.heard)


def line_of(seen: StatusInput, model: str) -> ModelLine:
    """The status line of a model or a replica. Raises UnknownModel."""
    for view in seen.snapshot.models if seen.snapshot else ():
        if view.name == model:
            return model_line(seen, view)
        for each in view.replicas:
            if each.id == model:
                return _line(seen, each, each.id, replica_of=view.name)
    raise UnknownModel(f"the model {model!r} is no longer configured", param="model")


def of_caller(status: answers.Status, caller: Caller) -> answers.Status:
    """The status without models that the caller may not use, and without what tells of them."""
    if caller.models is None:
        return status
    lines = [line for line in status.models if caller.may_use(line.name)]
    own = tuple(replace(line, waiting_for="room") if line.waiting_for else line for line in lines)  # it names others
    error = status.configuration.error and "invalid"
    return replace(status, standbys=None, models=own, configuration=replace(status.configuration, error=error))


def concerns(decision: core.Decision, names: Set[str]) -> bool:
    """Whether a decision is about one of these models or replicas, or evicts it."""
    victims = str(decision.numbers.get("victims", "")).split(",")
    return (decision.replica or decision.model) in names or any(v.rpartition(":")[0] in names for v in victims)


class Status:
    """Implements ``vllmd.admin.control.Status``: gathers a ``StatusInput`` and answers from it; changes nothing."""

    def __init__(
        self,
        current: Current,
        runtime: RuntimeEnvironment,
        resolver: EngineResolver,
        gate: AdmissionGate,
        learnt: Learnt,
        back: Later[BackEnd],
        connections: Callable[[], int],
        downloads: Callable[[], list[answers.Download]] = list,
        unwritten: Callable[[], str] = str,
        unanswered: Callable[[], Mapping[str, float]] = dict,
        launcher_trouble: Callable[[], str] = str,
    ) -> None:
        self._current = current
        self._runtime = runtime
        self._resolver = resolver
        self._gate = gate
        self._learnt = learnt
        self._back = back
        self._connections = connections
        self._downloads = downloads
        self._unwritten = unwritten
        self._unanswered = unanswered
        self._launcher_trouble = launcher_trouble
        self._started = time.monotonic()
        self._descriptions = Descriptions()
        self._kinds = -1, dict[str, str]()  # as of that change: repository -> kind of model, once it was needed

    def status_input(self, model: str = "", *, for_lines: bool = False) -> StatusInput:
        """The core's snapshot, counts and the configuration, all of the same moment.

        ``model``: the snapshot is of that model, or the model of that replica, alone. ``for_lines``: model lines are
        drawn from it, which tell of silent engines; to find those takes a look at every request under way.
        """
        current, back = self._current, self._back.now
        return StatusInput(
            current.config, current.engines, current.broken, current.refused, self._gate.requests, self._connections(),
            back, back.snapshot(model) if back else None, name_of(asyncio.get_running_loop()), self._unwritten(),
            self._unanswered() if for_lines else {}, self._launcher_trouble(),
        )  # fmt: skip

    async def _draw_ahead(self) -> None:
        """Make a snapshot of all models cheap, in turns of the loop; it is of one moment all the same."""
        if (back := self._back.now) is not None:
            for _ in back.dispatcher.scheduler.draw_ahead(DRAWN_AT_A_TIME):
                await asyncio.sleep(0)

    async def opened(self) -> None:
        """Wait until devices and engines have been found."""
        await self._back.wait()

    async def status(self, caller: Caller = ANYBODY) -> answers.Status:
        """The whole status, of the models that the caller may use."""
        await self._draw_ahead()
        seen, lines = self.status_input(for_lines=True), list[ModelLine]()
        for number, view in enumerate(seen.snapshot.models if seen.snapshot else (), 1):
            if number % AT_A_TIME == 0:  # with 10,000 models the list takes time that streams need
                await asyncio.sleep(0)
            lines.append(model_line(seen, view))
        shown = replace(of_caller(status(seen, self._started, tuple(lines)), caller), host=host())
        return replace(shown, downloads=tuple(self._downloads())) if caller.models is None else shown

    async def health(self) -> answers.Health:
        """Whether the daemon is healthy, with devices and models."""
        await self._draw_ahead()
        seen = self.status_input()
        views, devices = (seen.snapshot.models, seen.snapshot.devices) if seen.snapshot else ((), ())
        trouble = seen.back.memory.trouble if seen.back else ""
        return health(views, devices, places(seen.broken), trouble, ready=seen.snapshot is not None)

    def line(self, model: str) -> ModelLine:
        """One model's line of ``status``, or one replica's. Raises Unavailable while the daemon opens, UnknownModel."""
        self._opened()
        return line_of(self.status_input(model, for_lines=True), model)

    def settings(self, model: str) -> Iterator[str]:
        """The configuration in force, or one model's part, as lines of YAML with each setting's origin; no secrets."""
        from vllmd.config.present import of_config  # seldom needed

        return of_config(self._current.config, model)

    def decisions(self, model: str) -> Decisions:
        """The last decisions, oldest first, including those of earlier daemons."""
        back, names = self._back.now, {model, *self._current.engines_of(model)}
        earlier = [each for name, last in self._learnt.earlier.items() if not model or name in names for each in last]
        earlier.sort(key=lambda each: each.at)
        if back is None:
            return Decisions(tuple(earlier))
        date, made = self._learnt.dates.of, back.activity().decisions
        told = (decision(each, date(each.at)) for each in made if not model or concerns(each, names))
        return Decisions((*earlier, *told))

    async def models(self) -> list[Card]:
        """Every model for ``/v1/models``. Raises the gate's refusal while there is one, as every request does."""
        return await self._cards(self._current.config.models)

    async def model(self, name: str) -> Card | None:
        """The card of one model, adapter, variant or pool; None if there is none of that name. Raises as ``models``."""
        bases = [self._gate.base_of(each) for each in self._gate.offers.pool(name) or (name,)]
        return next((card for card in await self._cards(dict.fromkeys(bases)) if card.id == name), None)

    async def _cards(self, names: Collection[str]) -> list[Card]:
        """The cards of these models, and of what else is offered of them."""
        if self._gate.refusal:
            raise self._gate.refusal.with_traceback(None)
        if self._kinds[0] != (changes := self._current.changes):
            self._kinds = changes, await asyncio.to_thread(_kinds, self.cache())
        kinds = self._kinds[1]
        if len(names) > 1:
            await self._draw_ahead()
        # All of one moment: a reload may come while the engines are asked.
        seen = self.status_input(next(iter(names)) if len(names) == 1 else "")
        engines_of = {name: self._current.engines_of(name) for name in names if name in seen.config.models}
        views = {view.name: view for view in seen.snapshot.models} if seen.snapshot else {}
        running = seen.back.engines.processes.values() if seen.back else ()
        descriptions = await self._descriptions.of(_serving(seen), running)
        cards = []
        for number, (name, engines) in enumerate(engines_of.items(), 1):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            model, first = seen.config.models[name], seen.engines[engines[0]]
            description = next((descriptions[engine] for engine in engines if engine in descriptions), None)
            routes, kind = self._resolver(first).routes(first), kinds.get(model.source, "")
            cards.append(card(model, routes, views.get(model.name), kind, description))
        return [*cards, *self._gate.offers.cards(cards)]

    def cache(self) -> Path:
        """The engines' Hugging Face cache."""
        from vllmd.hub import cache_of  # no client's first request waits for this import

        return cache_of(self._runtime.environment, self._current.config.engines.home or self._runtime.home)

    async def gauges(self) -> Gauges:
        """The values for ``/metrics``; the devices are read for it, if they answer soon."""
        back = self._back.now
        if back is not None and not back.memory.hangs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(back.memory.sample(), SCRAPE_SAMPLE)
        await self._draw_ahead()
        seen = self.status_input()
        if back is None:
            return Gauges(seen.snapshot, seen.connections, seen.requests, valid=not seen.broken)
        memory = back.memory
        starts: dict[str, Start] = {}
        devices = memory.last.devices if memory.last and memory.readable else {}
        for engine, start in back.learnt.starts.items():
            if engine not in self._current.engines:  # it was removed, and may come back
                continue
            model = self._current.model_of(engine)
            if model not in starts or start.seconds > starts[model].seconds:  # of several replicas the slowest start
                starts[model] = start
        return Gauges(
            seen.snapshot,
            seen.connections,
            seen.requests,
            valid=not seen.broken,
            last_starts={model: start.seconds for model, start in starts.items()},
            last_phases={model: start.phases for model, start in starts.items()},
            last_loaders={model: start.loader for model, start in starts.items() if start.loader},
            used={index: device.used for index, device in devices.items()},
            power={index: device.power for index, device in devices.items() if device.power is not None},
            load={i: device.utilisation / 100 for i, device in devices.items() if device.utilisation is not None},
            energy=dict(memory.power.device_joules),
            temperature={i: each.temperature for i, each in devices.items() if each.temperature is not None},
            throttled={index: bool(device.throttled) for index, device in devices.items()},
            model_power=self._by_model(memory.power.watts),
            model_energy=self._by_model(memory.power.joules),
            unused_energy=self._by_model(memory.power.unused_joules),
        )

    def _by_model(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over each model's engines."""
        sums: dict[str, float] = {}
        for engine, value in values.items():
            model = self._current.model_of(engine)
            sums[model] = sums.get(model, 0.0) + value
        return sums

    async def gpus(self) -> list[GPUInfo]:
        """The ``GPUInfo`` of every device."""
        return await gpus((await self._back.wait()).memory)

    async def scrape(self, model: str) -> bytes:
        """The metrics of the model's own engine. Raises Conflict where none serves, BadRequest, UpstreamFailed."""
        process = self._opened().engines.processes.get(self.only(model))
        if process is None or process.ready_after is None:
            raise Conflict(f"{model} has no engine now, so there are no metrics of one")
        status, _, body = await request(process.listen, "GET", "/metrics", timeout=SCRAPE_LIMIT)
        if status != 200:
            raise UpstreamFailed(f"the engine of {model} answered GET /metrics with {status}")
        return body

    def resolve(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, or the id of a replica. Raises UnknownModel, Forbidden."""
        configured = self._gate.resolve_engine(name, caller)
        caller.check(self._current.model_of(configured), name)
        return configured

    def called(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, an adapter, a variant or a pool. Raises UnknownModel, Forbidden."""
        configured = self._gate.called(name, caller)
        caller.check(configured, name)
        return configured

    def only(self, model: str) -> str:
        """The id of the model's one engine. Raises BadRequest if it has several."""
        engines = self._current.engines_of(model)
        if len(engines) > 1:
            raise BadRequest(f"{model} has several engines, name one: {', '.join(engines)}", param="model")
        return engines[0]

    def types(self) -> list[str]:
        """The names of the engine kinds that there are."""
        from vllmd.engines import engine_names

        return engine_names()

    def _opened(self) -> BackEnd:
        """The back end. Raises Unavailable while it is not there."""
        if self._back.now is None:
            raise Unavailable("vllmd is still looking for its devices and engines; try again", retry_after=1)
        return self._back.now


def _serving(seen: StatusInput) -> list[EngineProcess]:
    """The engines that serve now, so that a question wakes and delays nothing."""
    if seen.back is None or seen.snapshot is None:
        return []
    ready = {view.name for view in seen.snapshot.models if view.state is State.READY}
    ready |= {each.id for each in seen.snapshot.replicas if each.state is State.READY}
    return [process for name, process in seen.back.engines.processes.items() if name in ready]


def _kinds(cache: Path) -> dict[str, str]:
    """The engine kind of each repository in the cache, read from its files."""
    from vllmd.hub import discover

    return {repository.name: repository.kind for repository in discover(cache)}
