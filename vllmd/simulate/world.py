"""The clock: hands events to the production Scheduler in order, and carries out its commands in virtual time.

A discrete-event simulation with four sources of what happens next: the next arrival of the trace, the end of an
engine's first request (which moves with its batch, so each engine is asked), the answer to a command of the scheduler
(in a heap, as its duration is drawn when it is given), and the scheduler's own timer. The earliest of the four happens;
of two at the same instant the arrival comes first, then an end, an answer, the timer: all policies meet the same order.

A stop may overtake a command under way. Its answer stays in the heap and is void when it comes: each command that is
given takes a new number for its engine (``_owed``), and an answer with another number is dropped.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count

from vllmd.core import commands as cmd
from vllmd.core import events as ev
from vllmd.core.costs import CostBook
from vllmd.core.policy import Policy
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, ModelSpec, Placement, ReplicaSpec, Settings, State
from vllmd.errors import VllmdError
from vllmd.frozen import frozen
from vllmd.simulate.engine import Engine, Job
from vllmd.simulate.physics import A100, Physics
from vllmd.simulate.report import Report, Sample, summary
from vllmd.simulate.trace import Row

SAMPLES = 240  # looks at the memory over the length of a trace
CALLED_OFF_AFTER = 4 * 3600.0  # seconds after the last arrival when a run is called off: some request is never served


class Warm(enum.Enum):
    """How the machine is found when the trace begins."""

    STOPPED = "stopped"  # nothing runs
    ASLEEP = "asleep"  # every engine that can sleeps: at level 1 while host memory lasts, else at 2


@frozen
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
            names = ", ".join(map(repr, sorted(known)))
            raise VllmdError(f"the trace asks for {row.model!r}, which is not one of the models: {names}")
    world = World(machine, trace, policy, scheduler)
    world.run()
    return summary(name or policy.name, machine.devices, world.jobs, world.swaps, world.samples, world.busy)


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
        self._owed = dict.fromkeys(self._engines, 0)  # the number of the answer that is owed: others are void
        self._order = count()
        self._open = 0
        self.now = 0.0

    def run(self) -> None:
        """From the first arrival until nothing is left to do."""
        if self.machine.warm is Warm.ASLEEP:
            for spec, placement, level in asleep(self.machine):
                self._where[spec.id] = placement.devices
                self._handle(ev.EngineAdopted(spec.id, placement, State.SLEEPING, level))
        arrivals = iter(zip(self.jobs, self._keys, strict=True))
        coming = next(arrivals, None)
        length = self.jobs[-1].arrived if self.jobs else 0.0
        every, looked = max(length / self.machine.samples, 1.0) if self.machine.samples else math.inf, 0.0
        while coming or self._open:
            at, happen = self._next(coming)
            while looked <= at and looked <= length and self.machine.samples:
                self._sample(looked)
                looked += every
            if at > length + CALLED_OFF_AFTER:
                for job in [job for job in self.jobs if job.ended < 0]:
                    job.ended, job.error = self.now, job.error or "never served"
                return
            self._pass(at)
            if happen is not None:
                happen()
            elif coming:
                job, key = coming
                self._open += 1
                self._handle(ev.RequestArrived(job.id, job.model, key))
                coming = next(arrivals, None)

    def _pass(self, at: float) -> None:
        """Let time pass, and note which devices worked meanwhile."""
        if at > self.now:
            working = [name for name, engine in self._engines.items() if engine.on and engine.batch]
            for index in {index for name in working for index in self._where.get(name, ())}:
                self.busy[index] += at - self.now
        self.now = at

    def _next(self, coming: tuple[Job, str] | None) -> tuple[float, Callable[[], None] | None]:
        """The next instant and what happens then; None: the arrival does."""
        at = coming[0].arrived if coming else math.inf
        first: Callable[[], None] | None = None
        for engine in self._engines.values():
            end = engine.next_end()
            if end < at:
                at, first = end, lambda engine=engine: self._finish(engine.end(self.now))
        if self._planned and self._planned[0][0] < at:
            at, first = self._planned[0][0], self._answer
        timer = self._scheduler.next_timer()
        if timer is not None and timer < at:
            at, first = timer, lambda: self._handle(ev.TimePassed())
        if at == math.inf:
            raise VllmdError(f"the simulation is stuck at {self.now:.3f} s with {self._open} requests open")
        return max(at, self.now), first

    def _finish(self, job: Job) -> None:
        job.ended = self.now
        self._open -= 1
        self._handle(ev.RequestFinished(job.id))

    def _answer(self) -> None:
        """Post the answer that is due to a command, unless a stop has overtaken the command."""
        _, number, model, event = heappop(self._planned)
        if number != self._owed[model]:
            return
        if isinstance(event, ev.EngineReady | ev.EngineAwake):
            self._engines[model].resume(self.now)
            self.swaps[model] += 1
        self._handle(event)

    def _handle(self, event: ev.Event) -> None:
        for command in self._scheduler.handle(event, self.now):
            if isinstance(command, cmd.Admit | cmd.Reject | cmd.CutRequest):
                self._serve(command)
            else:
                self._move(command)

    def _serve(self, c: cmd.Admit | cmd.Reject | cmd.CutRequest) -> None:
        """Carry out a command about a request."""
        job = self._by_id[c.request]
        match c:
            case cmd.Admit():
                engine = self._runs_in[c.request] = self._engines[c.replica]
                engine.admit(job, self.now)
            case cmd.Reject():
                job.ended, job.error = self.now, c.error
                self._open -= 1
            case cmd.CutRequest():
                self._runs_in[c.request].drop(job, self.now)
                job.error = "cut"
                self._finish(job)

    def _move(self, c: cmd.Command) -> None:
        """Carry out a command to an engine, whose answer comes after a time; of the others nothing is simulated."""
        match c:
            case cmd.StartEngine():
                self._where[c.replica] = c.placement.devices
                self.answer_later(c.replica, "start", ev.EngineReady(c.replica))
            case cmd.WakeEngine():
                self.answer_later(c.replica, f"wake{c.level}", ev.EngineAwake(c.replica))
            case cmd.SleepEngine():
                self._engines[c.replica].freeze(self.now)
                self.answer_later(c.replica, f"sleep{c.level}", ev.EngineAsleep(c.replica, c.level))
            case cmd.ProveFreeze():
                self.answer_later(c.replica, "proof", ev.FreezeProved(c.replica, survived=True))
            case cmd.StopEngine():
                self._engines[c.replica].freeze(self.now)
                self.answer_later(c.replica, "stop", ev.EngineStopped(c.replica))
            case cmd.Record() | cmd.ReadAhead() | cmd.StopReadAhead():
                pass  # a decision is the journal's, and what reading ahead saves is in no trace
            case _:
                raise VllmdError(f"the simulation cannot carry out {c}")

    def answer_later(self, model: str, kind: str, event: ev.Event) -> None:
        """Answer a command by ``event``, after as long as this engine's next ``kind`` takes."""
        count = self._counts[model, kind] = self._counts.get((model, kind), 0) + 1
        number = self._owed[model] = next(self._order)
        seconds = self.machine.physics.transfer(self._engines[model].spec, kind, count)
        heappush(self._planned, (self.now + seconds, number, model, event))

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
