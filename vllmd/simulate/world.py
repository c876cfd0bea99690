"""The clock: hands events to the production Scheduler in order, and carries out its commands in virtual time."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from typing import Any

from vllmd.core import commands as cmd
from vllmd.core import events as ev
from vllmd.core.costs import CostBook
from vllmd.core.policy import Policy
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, ModelSpec, Placement, ReplicaSpec, Settings, State
from vllmd.errors import VllmdError
from vllmd.simulate.engine import Engine, Job
from vllmd.simulate.physics import A100, Physics
from vllmd.simulate.report import Report, Sample, summary
from vllmd.simulate.trace import Row

SAMPLES = 240  # looks at the memory over the length of a trace
PATIENCE = 4 * 3600.0  # seconds after the last arrival when a run is called off: somebody starves


class Warm(enum.Enum):
    """How the machine is found when the trace begins."""

    STOPPED = "stopped"  # nothing runs
    ASLEEP = "asleep"  # every engine that can sleeps: at level 1 while host memory lasts, else at 2


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated: models, devices, settings, and how fast the hardware is."""

    specs: Sequence[ModelSpec]
    devices: Sequence[Device]
    settings: Settings
    physics: Physics = A100
    warm: Warm = Warm.STOPPED
    costs: CostBook | None = None  # what the scheduler already knows
    samples: int = SAMPLES  # 0: the memory is not looked at, which takes half the time


def simulate(
    machine: Machine, trace: Sequence[Row], policy: Policy, name: str = "", scheduler: type[Scheduler] = Scheduler
) -> Report:
    """Run the whole trace, until the last request has ended. Raises VllmdError if the trace names unknown models."""
    known = {spec.name for spec in machine.specs}
    for row in trace:
        if row.model not in known:
            raise VllmdError(f"the trace asks for {row.model!r}, which is not one of the models: {_listed(known)}")
    world = World(machine, trace, policy, scheduler)
    world.run()
    return summary(name or policy.name, machine.devices, world.jobs, world.swaps, world.samples, world.busy)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


class World:
    """One run. Everything happens at an instant of a virtual clock; ties go in the order they were planned."""

    def __init__(
        self, machine: Machine, trace: Sequence[Row], policy: Policy, scheduler: type[Scheduler] = Scheduler
    ) -> None:
        self.machine = machine
        self.jobs = [Job(n, f"r{n}", row.model, row.prompt, row.output, row.time) for n, row in enumerate(trace)]
        self.swaps = dict.fromkeys((spec.id for spec in engines_of(machine)), 0)
        self.samples: list[Sample] = []
        self.busy = dict.fromkeys((device.index for device in machine.devices), 0.0)  # seconds with work
        self._keys = [row.key for row in trace]
        self._scheduler = scheduler(machine.specs, machine.devices, machine.settings, machine.costs, policy)
        self._engines = {spec.id: Engine(spec, machine.physics) for spec in engines_of(machine)}
        self._where: dict[str, tuple[int, ...]] = {}
        self._by_id = {job.id: job for job in self.jobs}
        self._runs_in: dict[str, Engine] = {}  # a request -> its engine
        self._counts: dict[tuple[str, str], int] = {}
        self._planned: list[tuple[float, int, str, ev.Event]] = []  # heap; the model whose command it answers
        self._token = dict.fromkeys(self._engines, 0)  # which answer is owed: older ones are void
        self._order = count()
        self._open = 0
        self.now = 0.0

    def run(self) -> None:
        """From the first arrival until nothing is left to do."""
        self._adopt()
        arrivals = iter(zip(self.jobs, self._keys, strict=True))
        coming = next(arrivals, None)
        length = self.jobs[-1].arrived if self.jobs else 0.0
        every, looked = max(length / self.machine.samples, 1.0) if self.machine.samples else math.inf, 0.0
        while coming or self._open:
            at, happen = self._next(coming)
            while looked <= at and looked <= length and self.machine.samples:
                self._sample(looked)
                looked += every
            if at > length + PATIENCE:
                self._call_off()
                return
            self._pass(at)
            if coming and happen is None:
                self._arrive(*coming)
                coming = next(arrivals, None)
            elif happen is not None:
                happen()

    # -- what comes next

    def _next(self, coming: tuple[Job, str] | None) -> tuple[float, Callable[[], None] | None]:
        """The next instant and what happens then; None: the arrival does."""
        at, happen = (coming[0].arrived, None) if coming else (math.inf, None)
        best: Callable[[], None] | None = happen
        for engine in self._engines.values():
            end = engine.next_end()
            if end < at:
                at, best = end, lambda engine=engine: self._end(engine)
        if self._planned and self._planned[0][0] < at:
            at, best = self._planned[0][0], self._answer
        timer = self._scheduler.next_timer()
        if timer is not None and timer < at:
            at, best = timer, self._tick
        if at == math.inf:
            raise VllmdError(f"the simulation is stuck at {self.now:.3f} s with {self._open} requests open")
        return max(at, self.now), best

    def _pass(self, at: float) -> None:
        """Let time pass, and note which devices worked meanwhile."""
        if at > self.now:
            working = [name for name, engine in self._engines.items() if engine.on and engine.batch]
            for index in {index for name in working for index in self._at(name)}:
                self.busy[index] += at - self.now
        self.now = at

    def _at(self, model: str) -> tuple[int, ...]:
        return self._where.get(model, ())

    # -- what happens

    def _arrive(self, job: Job, key: str) -> None:
        self._open += 1
        self._handle(ev.RequestArrived(job.id, job.model, key))

    def _end(self, engine: Engine) -> None:
        self._finish(engine.end(self.now))

    def _finish(self, job: Job) -> None:
        job.ended = self.now
        self._open -= 1
        self._handle(ev.RequestFinished(job.id))

    def _answer(self) -> None:
        _, token, model, event = heappop(self._planned)
        if token != self._token[model]:
            return  # a stop has overtaken the command that this answers
        engine = self._engines[model]
        if isinstance(event, ev.EngineReady | ev.EngineAwake):
            engine.resume(self.now)
            self.swaps[model] += 1
        self._handle(event)

    def _tick(self) -> None:
        self._handle(ev.TimePassed())

    def _handle(self, event: ev.Event) -> None:
        for command in self._scheduler.handle(event, self.now):
            _EXECUTE[type(command)](self, command)

    def _call_off(self) -> None:
        for job in self.jobs:
            if job.ended < 0:
                job.ended, job.error = self.now, job.error or "never served"

    # -- the commands

    def _start(self, c: cmd.StartEngine) -> None:
        self._where[c.replica] = c.placement.devices
        self._later(c.replica, "start", ev.EngineReady(c.replica))

    def _pass_over(self, c: cmd.Command) -> None:
        """Nothing is simulated of it."""

    def _wake(self, c: cmd.WakeEngine) -> None:
        self._later(c.replica, f"wake{c.level}", ev.EngineAwake(c.replica))

    def _sleep(self, c: cmd.SleepEngine) -> None:
        self._engines[c.replica].freeze(self.now)
        self._later(c.replica, f"sleep{c.level}", ev.EngineAsleep(c.replica, c.level))

    def _prove(self, c: cmd.ProveFreeze) -> None:
        self._later(c.replica, "proof", ev.FreezeProved(c.replica, survived=True))

    def _stop(self, c: cmd.StopEngine) -> None:
        self._engines[c.replica].freeze(self.now)
        self._later(c.replica, "stop", ev.EngineStopped(c.replica))

    def _later(self, model: str, kind: str, event: ev.Event) -> None:
        number = self._counts[model, kind] = self._counts.get((model, kind), 0) + 1
        token = self._token[model] = next(self._order)
        took = self.machine.physics.transfer(self._engines[model].spec, kind, number)
        heappush(self._planned, (self.now + took, token, model, event))

    def _admit(self, c: cmd.Admit) -> None:
        engine = self._runs_in[c.request] = self._engines[c.replica]
        engine.admit(self._by_id[c.request], self.now)

    def _reject(self, c: cmd.Reject) -> None:
        job = self._by_id[c.request]
        job.ended, job.error = self.now, c.error
        self._open -= 1

    def _cut(self, c: cmd.CutRequest) -> None:
        job = self._by_id[c.request]
        self._runs_in[c.request].drop(job, self.now)
        job.error = "cut"
        self._finish(job)

    def _record(self, c: cmd.Record) -> None:
        """A decision is the journal's; nothing happens in the world."""

    # -- around it

    def _adopt(self) -> None:
        if self.machine.warm is not Warm.ASLEEP:
            return
        for spec, placement, level in asleep(self.machine):
            self._where[spec.id] = placement.devices
            self._handle(ev.EngineAdopted(spec.id, placement, State.SLEEPING, level))

    def _sample(self, at: float) -> None:
        s = self._scheduler.snapshot(at)
        promised = {d.index: d.promised for d in s.devices}
        self.samples.append(Sample(at, promised, s.host_promised, sum(m.queued for m in s.models)))


def engines_of(machine: Machine) -> list[ReplicaSpec]:
    """Every engine of its models."""
    return [spec for model in machine.specs for spec in model.replicas]


def asleep(machine: Machine) -> Iterator[tuple[ReplicaSpec, Placement, int]]:
    """Every engine that can sleep, spread over the devices, at level 1 while host memory lasts."""
    host = machine.settings.host_memory
    turn = 0
    for spec in engines_of(machine):
        if not spec.sleep_levels or not spec.device_count or not machine.devices:
            continue
        level = 1 if 1 in spec.sleep_levels and spec.footprint.host <= host else max(spec.sleep_levels)
        host -= spec.footprint.host if level == 1 else 0
        usable = [d.index for d in machine.devices if not spec.devices or d.index in spec.devices]
        if len(usable) >= spec.device_count:
            places = sorted(usable[(turn + n) % len(usable)] for n in range(spec.device_count))
            turn += spec.device_count
            yield spec, Placement(tuple(places)), level


def freezing(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """The same models with ``preempt: true`` where they can sleep."""
    return [
        replace(model, replicas=tuple(replace(r, preempt=bool(r.sleep_levels)) for r in model.replicas))
        for model in specs
    ]


_EXECUTE: dict[type, Callable[[World, Any], None]] = {
    cmd.StartEngine: World._start,
    cmd.ReadAhead: World._pass_over,  # what it saves is in no trace
    cmd.StopReadAhead: World._pass_over,
    cmd.WakeEngine: World._wake,
    cmd.SleepEngine: World._sleep,
    cmd.ProveFreeze: World._prove,
    cmd.StopEngine: World._stop,
    cmd.Admit: World._admit,
    cmd.Reject: World._reject,
    cmd.CutRequest: World._cut,
    cmd.Record: World._record,
}
