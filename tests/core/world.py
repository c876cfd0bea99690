"""A world for the core to decide about: engines and clients as data, and every promise of the core checked.

``World`` executes commands as the daemon does, but nothing happens by itself:
a test says which engine answers when. It keeps its own books, apart from the
core's, and fails with the whole story as a script that can be pasted into a
test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from vllmd.core.commands import (
    AddReplica,
    Admit,
    Answer,
    Command,
    CutRequest,
    ProbeReplica,
    ProveFreeze,
    ReadAhead,
    Record,
    Reject,
    RenameReplica,
    SleepEngine,
    StartEngine,
    StopEngine,
    StopReadAhead,
    WakeEngine,
)
from vllmd.core.costs import CostBook
from vllmd.core.events import (
    DeviceDrained,
    DevicesChanged,
    DevicesTroubled,
    EngineAdopted,
    EngineAsleep,
    EngineAwake,
    EngineReady,
    EngineStopped,
    Event,
    FreezeProved,
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    MemorySampled,
    ModelDisabled,
    ModelEnabled,
    ModelsChanged,
    ProbeAsked,
    ReplicaProbed,
    RequestArrived,
    RequestFinished,
    RequestGone,
    StopAsked,
    TimePassed,
)
from vllmd.core.lifecycle import MOVING, Kind
from vllmd.core.planner import RECENT
from vllmd.core.policy import Policy
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import CPU, Device, ModelSpec, ReplicaSpec, ReplicaView, Settings, Snapshot, State
from vllmd.core.views import _model
from vllmd.sizes import GiB


def said(commands: Iterable[Command]) -> list[Command]:
    """The commands without the journal's records, and without what only saves time."""
    return [c for c in commands if not isinstance(c, Record | ReadAhead | StopReadAhead)]


def brief(spec: ModelSpec) -> str:
    """The specification as one would write it: without what is default anyway."""
    engines = ", ".join(_brief(each) for each in spec.replicas)
    return f"ModelSpec({spec.name!r}, ({engines},){_unusual(spec, ModelSpec(spec.name, spec.replicas))})"


def _brief(spec: ReplicaSpec) -> str:
    f, rest = spec.footprint, _unusual(spec, ReplicaSpec(spec.id, spec.footprint))
    return f"ReplicaSpec({spec.id!r}, Footprint({f.starting}, {f.awake}, {f.asleep}, {f.host}){rest})"


def _unusual(spec: ModelSpec | ReplicaSpec, plain: ModelSpec | ReplicaSpec) -> str:
    names = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)]
    return "".join(f", {name}={getattr(spec, name)!r}" for name in names)


def told(event: Event) -> str:
    """The event as one would write it."""
    if isinstance(event, ModelsChanged):
        return f"ModelsChanged(({', '.join(map(brief, event.models))},), {event.restart!r})"
    return repr(event)


JOBS: dict[State, frozenset[Kind | None]] = {  # what a replica can be about to do in each state, once an event is over
    State.STOPPED: frozenset({None, Kind.START}),
    State.FAILED: frozenset({None, Kind.START}),
    State.STARTING: frozenset({Kind.START}),
    State.READY: frozenset({None}),
    State.DRAINING: frozenset({Kind.SLEEP, Kind.STOP, Kind.PROVE}),
    State.FALLING_ASLEEP: frozenset({Kind.SLEEP, Kind.PROVE}),
    State.SLEEPING: frozenset({None, Kind.WAKE, Kind.SLEEP, Kind.STOP}),
    State.WAKING: frozenset({Kind.WAKE, Kind.SLEEP}),
    State.STOPPING: frozenset({Kind.STOP}),
}


def check_jobs(scheduler: Scheduler) -> None:
    """The state and the job of a replica tell the same story."""
    for r in scheduler.core.replicas.values():
        assert (r.job.kind if r.job else None) in JOBS[r.state], f"{r.id} is {r.state.value}, its job {r.job}"
        assert r.job is None or r.job.target is None or r.job.leaves
        assert r.loaded or not r.removed, f"{r.id} was to be forgotten"


def check_kept(scheduler: Scheduler) -> None:
    """What is kept from event to event is what a look at everything would find."""
    core = scheduler.core
    engines, replicas = core.engines, list(core.replicas.values())
    assert set(replicas) == {r for m in core.models.values() for r in (*m.replicas, *m.retired)}
    out = {r for r in replicas if r.leaving and r.state in (State.DRAINING, State.SLEEPING)}
    assert set(engines.leaving) == out, "who is on his way out"
    moved = {index: r for r in replicas if r.state in MOVING for index in r.placement.devices}
    assert engines.moving == moved, "on which devices a command is under way"
    if not engines.ledger.unknown:
        waits = {r for r in replicas if r.demand and r.state in (State.STOPPED, State.SLEEPING) and not r.leaving}
        assert set(core.waiting) == waits, "who waits for the policy"
    assert core.timers.due == min((r.due for r in replicas), default=math.inf)
    active = {r for r in replicas if r.state is not State.STOPPED or r.demand}
    assert set(core.active) == active, "what the daemon looks at once a second"
    assert all(r in core.active for r in replicas if engines.ledger.held(r)), "who holds memory"
    assert all(r.state is State.SLEEPING for r in engines.displaced), "who sleeps because another one needed his place"
    for r in replicas:
        assert r.due <= scheduler.due_of(r), f"a timer of {r.id} is lost"
    for index, account in engines.ledger.accounts.items():
        assert account.promised == sum(engines.ledger.held(r).get(index, 0) for r in replicas), "what is promised"
    assert engines.ledger.host_promised == sum(map(engines.ledger.host_held, replicas)), "what is promised of the host"
    assert core.balanced == [model for model in core.models.values() if model.rules], "whose replicas share by rules"
    assert scheduler.is_quiet == (not scheduler.anything_to_begin() and not engines.displaced), "the short way is open"
    for model in core.models.values():
        assert model.unused_view in (None, _model(core, model, core.now, lambda r: "")), "how an unused model is shown"


class World:
    """The daemon's side of the contract, with a clock that stands still."""

    def __init__(
        self,
        models: Iterable[ModelSpec],
        devices: Iterable[Device],
        settings: Settings | None = None,
        costs: CostBook | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.devices = {device.index: device for device in devices}
        self.settings = settings or Settings(host_memory=64 * GiB)
        models = tuple(models)
        self.configure(models)
        self.scheduler = Scheduler(models, self.devices.values(), self.settings, costs, policy)
        self.now = 0.0
        self.short_way = True  # of a request that nothing else follows from (``Scheduler.admit_at_once``)
        self.shortened = 0  # events that went it
        self.raw: list[Command] = []  # that the last event led to
        self.script: list[str] = []
        self.pending: dict[str, Command] = {}  # model -> the command it has to answer
        self.engines: dict[str, str] = {}  # model -> "on", "asleep" or "moving"
        self.placed: dict[str, tuple[int, ...]] = {}
        self.queued: dict[str, str] = {}  # request -> model
        self.running: dict[str, str] = {}
        self.cut: set[str] = set()
        self.frozen: set[str] = set()
        self.orphans: set[str] = set()  # running in an engine that is gone: their end is still to be told
        self.rejected: dict[str, Reject] = {}
        self.probes: dict[str, str] = {}  # the daemon's own requests to replicas -> model; they run, too
        self.there = frozenset(self.devices)
        self.unknown = ""  # why nobody knows which devices there are
        self.unusable: dict[int, str] = {}  # devices whose driver speaks ill of them
        self.drains: dict[tuple[str, str], int] = {}  # the drained devices, there or not, and the last index of each
        self.disturbed = False  # measurements contradicted the books: promises may exceed what there is
        self.external: dict[int, int] = {}  # bytes per device, as last sampled
        self.looked: dict[int, float] = {}
        self.came: dict[str, float] = {}  # request -> when
        self.wished = {name for name, spec in self.specs.items() if spec.preload}  # wanted without a request, once
        self.disabled: set[str] = set()  # models and replicas that an operator has taken out of use
        self._forced: set[str] = set()

    def configure(self, models: Iterable[ModelSpec]) -> None:
        """What the machine is to have from now on."""
        models = tuple(models)
        self.specs = {spec.id: spec for model in models for spec in model.replicas}
        self.model_of = {**getattr(self, "model_of", {}), **{r.id: m.name for m in models for r in m.replicas}}
        self.several = {model.name for model in models if model.balancing}

    # -- events

    def do(self, event: Event) -> list[Command]:
        """Post one event, execute the commands, check every promise. Returns the commands, records left out."""
        self.script.append(f"s.handle({told(event)}, now={self.now!r})")
        if isinstance(event, DevicesChanged | DevicesTroubled | DeviceDrained):
            self._devices_told(event)
        if isinstance(event, ModelDisabled | ModelEnabled):
            self._disable(event)
        self._before(event)
        commands = self.raw = self._handle(event)
        try:
            for command in commands:
                self._execute(command)
            self._after(event)
        except AssertionError as broken:
            raise AssertionError(f"{broken}\nThe story:\n" + "\n".join(self.script)) from None
        return said(commands)

    def _handle(self, event: Event) -> list[Command]:
        """As the daemon does it: by the short way where there is one."""
        s, commands = self.scheduler, None
        if self.short_way and isinstance(event, RequestArrived):
            replica = s.admit_at_once(event.request, event.model, self.now)
            commands = None if replica is None else [Admit(event.request, replica)]
        elif self.short_way and isinstance(event, RequestFinished) and not event.failed:
            commands = [] if s.finish_at_once(event.request, self.now) else None
        self.shortened += commands is not None
        return s.handle(event, self.now) if commands is None else commands

    def at(self, now: float, event: Event) -> list[Command]:
        """Post ``event`` at ``now``."""
        self.now = now
        return self.do(event)

    def ask(self, request: str, model: str, key: str = "") -> list[Command]:
        """A client's request arrives."""
        return self.do(RequestArrived(request, model, key))

    def finish(self, request: str) -> list[Command]:
        """A running request ends; a probe passes."""
        return self.do(ReplicaProbed(request, 0.1) if request in self.probes else RequestFinished(request))

    def probed(self, model: str, seconds: float | None = 0.1) -> list[Command]:
        """The probe of this replica comes back after so many seconds, or (None) fails."""
        request = next(request for request, m in self.probes.items() if m == model)
        return self.do(ReplicaProbed(request, seconds, "" if seconds is not None else "no answer"))

    def answer(self, model: str) -> list[Command]:
        """The model's engine does what it was told."""
        return self.do(self.good_answer(model))

    def good_answer(self, model: str) -> Event:
        """The event by which the outstanding command succeeds."""
        command = self.pending[model]
        if isinstance(command, StartEngine):
            return EngineReady(model)
        if isinstance(command, WakeEngine):
            return EngineAwake(model)
        if isinstance(command, SleepEngine):
            return EngineAsleep(model, command.level)
        if isinstance(command, ProveFreeze):
            return FreezeProved(model, survived=True)
        return EngineStopped(model)

    def load(self, *models: str) -> None:
        """Have these serve, with nothing running."""
        for model in models:
            self.ask(f"load-{model}", model)
            self.answer(model)
            self.finish(f"load-{model}")

    def pass_time(self, until: float) -> list[Command]:
        """Let the timers ring, as the daemon does, until ``until``. Returns all commands."""
        commands: list[Command] = []
        rings, moment = 0, self.now
        while (due := self.scheduler.next_timer()) is not None and due <= until:
            commands += self.at(max(due, self.now), TimePassed())
            rings, moment = (rings + 1, moment) if self.now == moment else (1, self.now)
            assert rings < 1000, f"timers ring without an end at {moment}"
        self.now = until
        return commands

    @property
    def seen(self) -> Snapshot:
        """The core's snapshot now."""
        return self.scheduler.snapshot(self.now)

    def state(self, model: str) -> State:
        """The engine's state."""
        return self.view(model).state

    def view(self, name: str) -> ReplicaView:
        """The core's view of that replica now."""
        return next(r for r in self.engines_seen if r.id == name)

    @property
    def engines_seen(self) -> list[ReplicaView]:
        """The core's views of all replicas now."""
        return [r for m in self.seen.models for r in m.replicas]

    def settle(self, limit: float = 3600.0) -> None:
        """Everybody behaves: engines answer, requests end, time goes on until nobody waits any more."""
        end = self.now + limit
        while self.pending or self.running or self.queued:
            if self.pending:
                self.now += 1.0
                self.answer(next(iter(self.pending)))
            elif awake := [r for r in self.running if r not in self.frozen]:
                self.now += 0.5
                self.finish(awake[0])
            else:
                due = self.scheduler.next_timer()
                assert due is not None, self._tell(f"{self.queued or self.running} wait, and no timer is set")
                assert due <= end, self._tell(f"{self.queued or self.running} wait for ever")
                self.at(max(due, self.now), TimePassed())

    def _tell(self, what: str) -> str:
        return f"{what}\nThe story:\n" + "\n".join(self.script)

    # -- the daemon's side

    def _before(self, event: Event) -> None:
        if isinstance(event, RequestArrived):
            self.queued[event.request] = event.model
            self.came[event.request] = self.now
        elif isinstance(event, MemorySampled):
            self._sampled(event)
        elif isinstance(event, ModelsChanged):
            wished = {self.model_of[name] for name in self.wished if name in self.model_of}
            self.configure(event.models)
            self.disabled &= {*self.specs, *(model.name for model in event.models)}
            self.wished |= {name for name, spec in self.specs.items() if spec.preload}
            # A model that gets replicas or loses them keeps its first one's engine, and what is wanted of it.
            self.wished |= {spec.replicas[0].id for spec in event.models if spec.name in wished}
        elif isinstance(event, LoadAsked):
            self.wished |= {name for name in self.specs if event.model in (name, self.model_of[name])}
        elif isinstance(event, ProbeAsked) and self.engines.get(event.replica) == "on":
            self.probes[event.request] = self.running[event.request] = event.replica
        elif isinstance(event, RequestFinished | ReplicaProbed):
            self.probes.pop(event.request, None)
            self.running.pop(event.request)
            self.frozen.discard(event.request)
            self.orphans.discard(event.request)
        elif isinstance(event, RequestGone):
            self.queued.pop(event.request)
        elif isinstance(event, StopAsked) and event.force:
            self._forced |= {name for name in self.engines if event.model in (name, self.model_of[name])}
        elif hasattr(event, "replica") and type(event).__name__.startswith(("Engine", "FreezeProved")):
            self._engine_told(event, event.replica)

    def _disable(self, event: ModelDisabled | ModelEnabled) -> None:
        if isinstance(event, ModelDisabled):
            self.disabled.add(event.model)
        else:
            self.disabled -= {event.model, *(name for name in self.specs if self.model_of[name] == event.model)}

    def _devices_told(self, event: DevicesChanged | DevicesTroubled | DeviceDrained) -> None:
        if isinstance(event, DeviceDrained):
            known = event.device in self.scheduler.core.engines.ledger.accounts
            if not event.drained:
                self.drains = {
                    device: index
                    for device, index in self.drains.items()
                    if event.device != index and (not known or device != self._identity(event.device))
                }
            elif known:  # of one that is not there it is told that there is none
                self.drains[self._identity(event.device)] = event.device
        elif isinstance(event, DevicesTroubled):
            self.unusable = {i: why for i, why in {**event.ill, **event.lost}.items() if i in self.there}
        else:
            now = {device.index: device for device in event.devices}
            same = {i for i in self.there if i in now and (now[i].id, now[i].runtime) == self._identity(i)}
            for index in {*self.looked, *self.external, *self.unusable} - same:  # what was known of it is of another
                for book in (self.looked, self.external, self.unusable):
                    book.pop(index, None)  # type: ignore[attr-defined]
            self.disturbed = self.disturbed or any(now.get(i) != self.devices[i] for i in self.there)
            self.devices.update(now)
            self.there, self.unknown = frozenset(now), event.unknown
            self.drains |= {self._identity(i): i for i in self.there if self._identity(i) in self.drains}

    def _identity(self, index: int) -> tuple[str, str]:
        known = self.devices.get(index)
        return (known.id, known.runtime) if known else (str(index), "")

    @property
    def drained(self) -> set[int]:
        """The indices of the drained devices that are there."""
        return {index for index in self.there if self._identity(index) in self.drains}

    def _sampled(self, event: MemorySampled) -> None:
        for index in event.failed:
            self.looked.pop(index, None)
        for index, size in event.external.items():
            if index in self.there and index not in event.failed:
                self.external[index] = min(max(0, size), self.devices[index].memory)
                self.looked[index] = self.now
                if self.devices[index].runtime == CPU:  # others' share of it is bounded, so that any engine fits alone
                    largest = max(
                        (r.booking for r in self.scheduler.core.replicas.values() if r.spec.device_count), default=0
                    )
                    room = self.scheduler.core.engines.ledger.accounts[index].capacity - largest
                    self.external[index] = min(self.external[index], max(0, room))

    def _engine_told(self, event: Event, model: str) -> None:
        kind = type(event).__name__
        self.pending.pop(model, None)
        if kind in ("EngineReady", "EngineAwake") or (kind == "FreezeProved" and event.survived):  # type: ignore[union-attr]
            self.engines[model] = "on"
            self.frozen -= {r for r, m in self.running.items() if m == model}
        elif kind == "EngineAsleep":
            self.engines[model] = "asleep"
        elif kind == "EngineAdopted":
            self._engine_found(event, model)  # type: ignore[arg-type]
        elif kind in ("EngineSleepFailed", "EngineWakeFailed", "FreezeProved"):
            self.engines[model] = "broken"
        else:
            self.engines.pop(model, None)
            self.placed.pop(model, None)
            self._forced.discard(model)
            self.orphans |= self._runs(model)
            self.frozen -= self.orphans

    def _engine_found(self, event: EngineAdopted, model: str) -> None:
        self.engines[model] = {State.SLEEPING: "asleep", State.STARTING: "moving"}.get(event.state, "on")
        self.placed[model] = event.placement.devices
        if event.state is State.STARTING:
            self.pending[model] = StartEngine(model, event.placement, 0)

    def _execute(self, command: Command) -> None:
        if isinstance(command, Admit):
            self._admit(command)
        elif isinstance(command, Reject):
            assert self.queued.pop(command.request, None) is not None, f"{command} of a request that does not wait"
            self.rejected[command.request] = command
        elif isinstance(command, CutRequest):
            assert command.request in self.running, f"{command} of a request that does not run"
            self.cut.add(command.request)
        elif isinstance(command, ProbeReplica):
            assert self.engines.get(command.replica) == "on", f"{command}, but the engine is not on"
            assert command.limit > 0
            self.probes[command.request] = self.running[command.request] = command.replica
        elif isinstance(command, AddReplica | Answer):
            pass  # a test answers the first with ModelsChanged or ReplicaRefused, and reads the second
        elif isinstance(command, RenameReplica):
            self._rename(command.replica, command.now)
        elif not isinstance(command, Record | ReadAhead | StopReadAhead):
            self._tell_engine(command)

    def _rename(self, was: str, now: str) -> None:
        for book in (self.pending, self.engines, self.placed):
            if was in book:
                book[now] = book.pop(was)  # type: ignore[attr-defined]
        for book in (self.running, self.probes):
            book.update((request, now) for request, name in book.items() if name == was)
        self._forced = {now if name == was else name for name in self._forced}

    def _admit(self, command: Admit) -> None:
        asked, model = self.queued.pop(command.request, None), command.replica
        assert self.model_of[model] not in self.disabled, f"{command}, but the model is disabled"
        assert asked == self.model_of[model], f"{command} of a request that does not wait for it"
        assert self.engines.get(model) == "on", f"{command}, but the engine is {self.engines.get(model)}"
        self.running[command.request] = model

    def _tell_engine(self, command: StartEngine | WakeEngine | SleepEngine | StopEngine | ProveFreeze) -> None:
        model = command.replica
        if not isinstance(command, StopEngine):
            assert model not in self.pending, f"{command} while {self.pending[model]} is outstanding"
        if isinstance(command, StartEngine):
            assert model not in self.engines, f"{command}, but it runs already"
            assert self.disabled.isdisjoint({model, self.model_of[model]}), f"{command}, but it is disabled"
            self.placed[model] = command.placement.devices
        for other in self.pending:
            shared = set(self.placed.get(other, ())) & set(self.placed[model])
            assert other == model or not shared, f"{command} while {other} is moved on device {shared}"
        self._check_state(command)
        self.pending[model] = command
        self.engines[model] = "moving"

    def _check_state(self, command: Command) -> None:
        if isinstance(command, StartEngine | WakeEngine):
            self._check_books(command)
            self._check_usable(command)
            if isinstance(command, StartEngine):
                self._check_room(command)
                self._check_vacancy(command)
        elif isinstance(command, SleepEngine):
            assert self.engines[command.replica] == "on", f"{command} of one that is {self.engines[command.replica]}"
            running = self._runs(command.replica)
            assert command.freeze or not running, f"{command} with {running} in flight"
            self.frozen.update(running)
        elif isinstance(command, StopEngine):
            alive = self._runs(command.replica) - self.cut
            assert not alive or command.kill, f"{command} with {alive} in flight"
        elif isinstance(command, ProveFreeze):
            assert not self._runs(command.replica), f"{command} with requests in flight"

    def _runs(self, model: str) -> set[str]:
        return {request for request, m in self.running.items() if m == model} - self.orphans

    def _check_usable(self, command: StartEngine | WakeEngine) -> None:
        """Nothing is put on a device that is not known to be there, or that is not to be used."""
        on = self.placed[command.replica]
        assert not on or not self.unknown, f"{command}, but {self.unknown}"
        assert self.there.issuperset(on), f"{command}, but there are only {sorted(self.there)}"
        assert self.unusable.keys().isdisjoint(on), f"{command}, but {self.unusable}"
        assert self.drained.isdisjoint(on), f"{command}, but {self.drained} are drained"

    def _check_books(self, command: Command) -> None:
        if not self.disturbed:
            for d in self.seen.devices:
                room = d.memory - d.reserve - d.external
                assert d.promised <= room, f"{command}: {d.promised} promised of {room} on device {d.index}"

    def _check_room(self, command: StartEngine) -> None:
        """However the books stand elsewhere: nothing starts where there is no room for it."""
        for d in self.seen.devices:
            if d.index in command.placement.devices:
                room = d.memory - d.reserve - d.external
                assert d.promised <= room, f"{command}: {d.promised} promised of {room} on device {d.index}"

    def _check_vacancy(self, command: StartEngine) -> None:
        """``when_free``: no device that others use too much of, and no share that was not free."""
        rule = self.specs[command.replica].when_free
        if rule is None:
            return
        for index in command.placement.devices:
            others, memory = (
                self.external.get(index, 0) + self._kept_on(index, command.replica),
                self.devices[index].memory,
            )
            assert others < rule.used_below, f"{command} where others hold {others}"
            least = min(self.devices[each].memory for each in command.placement.devices)  # one figure for all of them
            fit = {math.ceil(share * least) for free, share in rule.shares.items() if free <= 1 - others / memory}
            assert not rule.shares or command.memory in fit, f"{command} where others hold {others} of {memory}"
            name = self.model_of[command.replica]
            came = min((self.came[r] for r, m in self.queued.items() if m == name), default=self.now)
            if name in self.several:  # brought up beside others, by what was last seen
                came = min(came, self.now - RECENT)
            looked = self.looked.get(index, -math.inf if self.devices[index].read else came)
            assert looked > -math.inf, f"{command}, but nobody knows what others hold of device {index}"
            old = command.replica not in self.wished and looked < came
            assert not old, f"{command} by a sample of {looked}, but the first request is from {came}"

    def _check_idle_devices(self) -> None:
        """Nobody waits for a device on which there is nobody, and which has room for him."""
        core = self.scheduler.core
        accounts = core.engines.ledger.accounts
        used = {index for name in self.engines for index in self.placed[name]}
        used |= {index for target in core.swaps.targets() for index in core.swaps.get(target).devices}  # type: ignore[union-attr]
        idle = self.there - used - self.drained - self.unusable.keys()
        for r in core.waiting:
            if r in core.swaps or r.state is not State.STOPPED or r.spec.when_free or self.unknown:
                continue
            good = [i for i in idle if i in (r.devices or idle) and not accounts[i].missing]
            good = [i for i in good if accounts[i].free >= r.booking]
            assert len(good) < r.spec.device_count, f"{r.id} waits, and {good} are idle"

    def _kept_on(self, index: int, newcomer: str) -> int:
        kept = [r for r in self.engines_seen if (r.pinned or r.leases) and r.devices == (index,) and r.id != newcomer]
        return sum(m.memory for m in kept)

    def _after(self, event: Event) -> None:
        seen = self.seen
        assert seen.host_promised <= seen.host_memory or self.disturbed, "more host memory promised than there is"
        queued = sum(m.queued for m in seen.models)
        assert queued == len(self.queued), f"{queued} requests queued in the core, {len(self.queued)} outside"
        if isinstance(event, TimePassed):
            due = self.scheduler.next_timer()
            assert due is None or due > self.now, f"a timer for {due} rings at {self.now} again"
        if isinstance(event, LeaseTaken | LeaseReleased):
            held = [lease for m in seen.models for lease in m.leases]
            assert len(held) == len(set(held)), "a lease is held twice"
        self._check_idle_devices()
        for view in seen.replicas[len(self.script) % 7 : len(self.script) % 7 + 1]:
            alone = self.scheduler.replicas_of(view.id, self.now)  # of all, if the model is called so as well
            assert view in alone, f"{view.id} alone is not what the snapshot says"
        check_kept(self.scheduler)
        check_jobs(self.scheduler)
