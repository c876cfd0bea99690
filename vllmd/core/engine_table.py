"""The engines: each step of a life changes state, job, ledger and learnt costs together, and says its command.

This is the only file that changes an engine's state and its job. It decides nothing; it
holds three rules: one command is outstanding per engine, one per device, and what
is asked of an engine is merged into its job by the table in ``lifecycle.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from vllmd.core.commands import (
    AddReplica,
    Admit,
    Answer,
    Command,
    CutRequest,
    ProbeReplica,
    ProveFreeze,
    Record,
    Reject,
    RejectReason,
    RenameReplica,
    SleepEngine,
    StartEngine,
    StopEngine,
    WakeEngine,
)
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import (
    BY_HAND,
    LOADED,
    MOVING,
    UP,
    Job,
    Kind,
    LifecycleError,
    Reason,
    Step,
    follow,
    merge,
    unwanted,
    wanted,
)
from vllmd.core.model import INFINITY, Model, Replica, Run, Start
from vllmd.core.types import Decision, Placement, State

DECISIONS_KEPT = 1000
SETTLED = 2.0  # seconds after a change of state from which a sample surely shows the new one
ADOPTIONS = {
    State.READY: Step.ADOPTED_AWAKE,
    State.SLEEPING: Step.ADOPTED_ASLEEP,
    State.STARTING: Step.ADOPTED_STARTING,
}


class EngineTable:
    """All engines, the ledger, and the commands of the event being handled."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.now = 0.0
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self._out: list[Command] = []
        self.calibrations = 0  # how often a time that was learnt changed what is expected of other engines
        self._busy: dict[int, Replica] = {}  # device -> whose command runs there
        self.leaving: dict[Replica, None] = {}  # gate closed, or asleep and to be stopped, and no command out yet
        self.displaced: dict[Replica, None] = {}  # asleep because another one needed their place

    # -- what goes out

    def collect(self) -> list[Command]:
        """The commands since last asked, in order."""
        out, self._out = self._out, []
        return out

    def record(
        self, what: str, about: Model | Replica | None, why: str, numbers: Mapping[str, float | int | str] | None = None
    ) -> None:
        """A decision, for the journal and for ``vllmctl why``; ``about`` None: about the machine."""
        if isinstance(about, Replica):
            model, replica = about.model.name, about.id
        else:
            model = replica = about.name if about else ""
        self.note(Decision(self.now, what, model, why, numbers or {}, replica if replica != model else ""))

    def note(self, decision: Decision) -> None:
        """Keep a decision, and have it written down."""
        self.decisions.append(decision)
        self._out.append(Record(decision))

    def admit(self, m: Replica, request: str) -> None:
        """The engine may have this request. Only now it counts as demand: many who wait leave before."""
        m.running[request] = Run(self.now)
        m.used = self.now
        m.costs.arrived(self.now)
        if m.health:
            m.health.unanswered[request] = self.now
        self._out.append(Admit(request, m.id))

    def answer(
        self, ask: str, chosen: str = "", refused: str = "", error: RejectReason = RejectReason.CONFLICT
    ) -> None:
        """What becomes of what was asked, if whoever asked wants to know."""
        if ask:
            self._out.append(Answer(ask, "", refused, error) if refused else Answer(ask, chosen))

    def add_replica(self, model: Model, device: int) -> None:
        """Have the model given one more replica, on that device."""
        self._out.append(AddReplica(model.name, device))

    def rename(self, m: Replica, name: str) -> None:
        """It has another id from now on."""
        self._out.append(RenameReplica(m.id, name))
        m.id = name

    def reject(self, request: str, error: RejectReason, message: str, retry_after: float | None = None) -> None:
        """The request gets this error."""
        self._out.append(Reject(request, error, message, retry_after))

    def cut(self, m: Replica, why: str, requests: Iterable[str] | None = None) -> None:
        """Break off all that runs in the engine, or only these ``requests``."""
        if requests is None and m.job:
            m.job.cut_at = INFINITY  # once is enough
        self._out += [CutRequest(request, why) for request in (m.running if requests is None else requests)]

    # -- devices

    def holder(self, devices: Iterable[int]) -> Replica | None:
        """One whose command is under way on one of ``devices``."""
        for index in devices:
            if index in self._busy:
                return self._busy[index]
        return None

    @property
    def moving(self) -> Mapping[int, Replica]:
        """The devices on which a command is under way, and whose."""
        return self._busy

    def free_to_move(self, m: Replica) -> bool:
        """No other engine is being moved on its devices."""
        return not any(self._busy.get(index, m) is not m for index in m.placement.devices)

    # -- jobs

    def ask(self, m: Replica, asked: Job) -> None:
        """This is to happen to it. What becomes of its present job is in the table of merges.

        Frozen requests are not lost: their engine wakes first, and drains.
        """
        if not m.loaded:
            if asked.kind in UP:
                self._set(m, merge(m.job, False, asked))
            elif asked.reason in BY_HAND:
                self._set(m, unwanted(m.job, False))
            return
        frozen = m.state is State.SLEEPING and bool(m.running)
        if frozen and m.job is None:
            m.job = Job(Kind.WAKE, Reason.REQUEST, "its requests are frozen", self.now)
        moving = m.state in MOVING
        job = merge(m.job, moving or frozen, asked)
        if moving and job is asked:
            self.stop(m, asked.why, asked.force, job)
        else:
            self._set(m, job)
            self._follow_up(m)

    def call_off(self, m: Replica) -> None:
        """What it was to leave for, or was to do for itself, and has not begun, is not done."""
        if m.job and m.state in MOVING:
            m.job.then = wanted(m.job.then)
        elif m.job and m.job.leaves:
            self._set(m, m.job.then)
            self._follow_up(m)

    def unwant(self, m: Replica) -> None:
        """Nobody wants it on any more but by a request."""
        self._set(m, unwanted(m.job, m.state in MOVING))

    def thaw(self, m: Replica) -> None:
        """Nothing is frozen in it any more: what was to happen after its wake happens now."""
        job = m.job
        if job and job.kind is Kind.WAKE and job.then and not m.running and m.state is State.SLEEPING:
            self._set(m, job.then)
            self._follow_up(m)

    def retry(self, m: Replica) -> None:
        """A start that failed for lack of memory is to be tried once more."""
        self.forgive(m)
        if m.job:
            m.job.retried = True

    def keep_down(self, m: Replica) -> None:
        """Its failure is for good: nothing brings it up again but a request after its back-off."""
        self._set(m, None)

    def release(self, m: Replica) -> None:
        """It does not leave for another one's sake any more: if it has no other reason to, it stays."""
        job = m.job
        if job and job.target:
            job.target = None
            if job.reason is Reason.SWAP:
                self.call_off(m)

    def _follow_up(self, m: Replica) -> None:
        """Close or open the gate as the job says; what is so already needs no job."""
        job = m.job
        if m.state is State.READY and job:
            if job.leaves:
                self._move(m, Step.DRAIN)
            else:
                self._set(m, None)
        elif m.state is State.DRAINING and not (job and job.leaves):
            self._move(m, Step.REOPEN)
            self._set(m, None)
        elif m.state is State.SLEEPING and job and job.kind is Kind.SLEEP and job.level <= m.level:
            self._set(m, job.then)

    def _set(self, m: Replica, job: Job | None) -> None:
        if job and job.kind in UP and m.state not in MOVING:
            job.kind = Kind.WAKE if m.state is State.SLEEPING else Kind.START
        m.job = job
        self._track(m)

    def _track(self, m: Replica) -> None:
        if m.leaving and m.state in (State.DRAINING, State.SLEEPING):
            self.leaving[m] = None
        else:
            self.leaving.pop(m, None)

    # -- commands

    def start(self, m: Replica, devices: tuple[int, ...], size: int | None = None) -> None:
        """Start it there; its booking, ``size`` if it is not by its footprint, is in the ledger from now on."""
        m.placement, m.start = Placement(devices), Start()
        self._begin(m, Kind.START)
        self._move(m, Step.START)
        if size is not None:
            m.granted(size)
        self.ledger.hold(m, dict.fromkeys(devices, m.booking if size is None else size))
        self.settle_host(m)
        self._out.append(StartEngine(m.id, m.placement, m.told if size is None else size))

    def wake(self, m: Replica) -> None:
        """Wake it where it sleeps; it holds what it holds awake from now on."""
        self._begin(m, Kind.WAKE)
        self._move(m, Step.WAKE)
        self.ledger.hold(m, dict.fromkeys(m.placement.devices, m.footprint.awake))
        self._out.append(WakeEngine(m.id, m.level))

    def _begin(self, m: Replica, kind: Kind) -> None:
        """It is brought up: for whoever wanted it, or to sleep deeper, else for the clients that wait."""
        if m.job is None or m.job.reason is Reason.RESTART:
            m.job = Job(kind, Reason.REQUEST, "requests wait for it", self.now)

    def drain(self, m: Replica) -> None:
        """Close the gate for its job. Running requests go on; it leaves when they are through."""
        self._move(m, Step.DRAIN)

    def sleep(self, m: Replica, level: int, freeze: bool = False) -> None:
        """Put it to sleep; it still holds everything."""
        self._move(m, Step.SLEEP)
        m.level = level
        if level == 1:
            self.ledger.hold_host(m, m.spec.host_running + m.footprint.host)
        for run in m.running.values():
            run.frozen += 1
        self._out.append(SleepEngine(m.id, level, freeze))

    def prove(self, m: Replica) -> None:
        """Have it shown, with a request of the daemon's own, that freezing loses nothing."""
        self._move(m, Step.PROVE)
        self._out.append(ProveFreeze(m.id))

    def stop(self, m: Replica, why: str, kill: bool = False, job: Job | None = None) -> None:
        """Stop it, whatever it does; for its job, or for this one."""
        m.job = job or m.job
        if m.job:
            m.job.kind = Kind.STOP
        self._move(m, Step.STOP)
        self._out.append(StopEngine(m.id, why, kill))

    def forgive(self, m: Replica) -> None:
        """A failed one may be started again."""
        self._move(m, Step.FORGIVE)
        if m.job and m.job.reason is Reason.RESTART:
            self._set(m, None)

    def probe(self, m: Replica, request: str, limit: float) -> None:
        """Ask it a question of the daemon's own, which runs in it as any other request does."""
        m.running[request] = Run(self.now)
        self._out.append(ProbeReplica(request, m.id, limit))

    def remember_failure(self, m: Replica, reason: str, since: float) -> None:
        """It failed ``since`` seconds ago, before this daemon; it may be tried again whenever somebody asks."""
        self._move(m, Step.ADOPTED_FAILED)
        m.failures, m.failure, m.failed_at = 1, reason, self.now - since
        m.changed, m.retry_at = m.failed_at, self.now

    # -- answers

    def ready(self, m: Replica) -> None:
        """It serves: after a start, a wake, or the proof of freezing."""
        self._learn_time(m)
        step = {State.STARTING: Step.READY, State.WAKING: Step.AWAKE}.get(m.state, Step.PROVED)
        deepens = m.job is not None and m.job.kind is Kind.SLEEP
        if not deepens and m.state is not State.FALLING_ASLEEP:  # its idle age counts on through those
            m.idle_since = self.now
        self._move(m, step)
        m.level, m.ready_at = 0, self.now
        then = m.job.then if m.job else None
        if then or not deepens:
            self._set(m, then if then and then.leaves else None)
        self.ledger.hold(m, dict.fromkeys(m.placement.devices, m.footprint.awake))
        self.settle_host(m)

    def asleep(self, m: Replica, level: int, freed: Mapping[int, int]) -> None:
        """It sleeps: the ledger has back what came free, as measured or as expected."""
        self._learn_time(m)
        self._move(m, Step.ASLEEP)
        job, m.job = m.job, None
        m.displaced = job is not None and job.reason is Reason.SWAP
        if m.displaced:
            self.displaced[m] = None
        m.level = level
        if m.health:
            m.health.engine_left()
        m.slept_shallow = m.slept_shallow or level == 1
        held = self.ledger.held(m)
        rest = {i: max(0, b - freed[i]) if i in freed else min(b, m.footprint.asleep) for i, b in held.items()}
        self.ledger.hold(m, rest)
        if freed and rest:
            m.measured(self.most(m), asleep=max(rest.values()))
        self.settle_host(m)
        if job and job.then:
            self.ask(m, job.then)

    def broke(self, m: Replica, step: Step, why: str) -> None:
        """A sleep, a wake or the proof failed: its state is unknown, so it is stopped in full."""
        self.cut(m, why)
        target = m.job.target if m.job else None
        m.job = Job(Kind.STOP, Reason.FAILED, why, self.now, target=target, then=wanted(m.job))
        self._move(m, step)
        self._out.append(StopEngine(m.id, why, False))

    def gone(self, m: Replica, step: Step) -> None:
        """Every process of it is gone, and so is everything it held."""
        if m.state is State.STOPPING and step is Step.STOPPED:
            self._learn_time(m)
        self._move(m, step)
        m.orphans.update(m.running)
        m.running.clear()
        m.level, m.placement = 0, Placement()
        m.slept_shallow = False
        start = m.job if step is Step.START_FAILED and m.job and m.job.kind is Kind.START else wanted(m.job)
        if start:
            start.then = None
        self._set(m, start)
        if m.health:
            m.health.engine_left()
        self.ledger.release(m)

    def adopt(self, m: Replica, placement: Placement, state: State, level: int) -> None:
        """An engine from before this daemon."""
        before, m.placement = m.placement, placement
        try:
            self._move(m, ADOPTIONS[state])
        except LifecycleError:
            m.placement = before
            raise
        m.level, m.ready_at = level, self.now
        m.slept_shallow = level == 1
        if state is State.STARTING:
            self._begin(m, Kind.START)
        self.ledger.miss(placement.devices)
        self.rebook(m)

    def rebook(self, m: Replica) -> None:
        """Its footprint is known better than when it was booked."""
        shares = {State.SLEEPING: m.footprint.asleep, State.STARTING: m.booking}
        share = shares.get(m.state, m.footprint.awake)
        self.ledger.hold(m, dict.fromkeys(m.placement.devices, share))
        self.settle_host(m)

    def most(self, m: Replica) -> int:
        """Bytes that can be promised of the smallest of its devices."""
        accounts = self.ledger.accounts
        found = (accounts[index].capacity for index in m.placement.devices if index in accounts)
        return min(found, default=1 << 62)

    def measured(self, m: Replica, shares: Mapping[int, int]) -> None:
        """What its processes were seen to hold, bytes per device.

        On the move, and just after it (the sample may be from before), only what exceeds the booking counts.
        """
        held = self.ledger.held(m)
        seen = {index: shares.get(index, share) for index, share in held.items()}
        if not seen or m.state not in LOADED:
            return
        settled = self.now - m.changed >= SETTLED
        if m.state is State.READY and settled:
            m.measured(self.most(m), awake=max(seen.values()))
        elif m.state is State.SLEEPING and settled:
            m.measured(self.most(m), asleep=max(seen.values()))
        else:
            seen = {index: max(size, held[index]) for index, size in seen.items()}
        self.ledger.hold(m, seen)

    def too_late(self, m: Replica, step: Step) -> None:
        """The answer to a command that a stop has overtaken."""
        self._move(m, step)

    def settle_host(self, m: Replica) -> None:
        """Book the host memory that it takes while it runs, and that of a level-1 sleeper.

        An engine may keep the latter after waking, until it stops.
        """
        keeps = m.level == 1 or (m.slept_shallow and m.spec.keeps_host)
        self.ledger.hold_host(m, m.spec.host_running + (m.footprint.host if keeps else 0))

    # -- underneath

    def _move(self, m: Replica, step: Step) -> None:
        m.state = follow(m.id, m.state, step)
        m.changed, m.untouched = self.now, False
        self.displaced.pop(m, None)  # it is no sleeper any more, or has just become one
        self._track(m)
        devices = m.placement.devices
        if m.state in MOVING:
            self._busy.update(dict.fromkeys(devices, m))
        else:
            for index in devices:
                if self._busy.get(index) is m:
                    del self._busy[index]

    def _learn_time(self, m: Replica) -> None:
        kinds = {State.STARTING: "start", State.WAKING: f"wake{m.level}", State.STOPPING: "stop"}
        kind = kinds.get(m.state, "")
        if m.state is State.FALLING_ASLEEP and m.job and m.job.kind is not Kind.PROVE:
            kind = f"sleep{m.level}"
        if kind and m.costs.observe(kind, self.now - m.changed):
            self.calibrations += 1
