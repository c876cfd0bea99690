"""The engines: each step of a life changes state, job, ledger and learnt costs together, and says its command.

Theory of operation. This is the only file that changes an engine's state and its job, so that four things cannot come
apart: what an engine is (its state), what is to happen to it (its job), what it was promised (the ledger) and what the
daemon was told (the command). Each public method is one such step. None of them decides: whether and when is asked of
``admission``, ``planner``, ``unloading`` and the others. Three rules hold here:

1. *One command per engine.* While one is out (MOVING) another is merged into the job (``jobs.py``) and follows it; only
   a stop may overtake, and then only the end of the stop is owed (``too_late`` drops the older answer).
2. *One command per device* (``free_to_move``): engines measure free memory while they start.
3. *Book before, release after.* A start is booked with the larger of what loading and serving take before its command
   goes out; a sleep or a stop gives back nothing until it is answered, and then what was measured. So the ledger errs
   to one side only: it may have promised too much, never too little.

What a change of state or job *means* for anybody else is not found here: the model is marked for review (``_move``,
``_set``), and ``Scheduler`` finds it before the event is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from vllmd.core import commands as cmd
from vllmd.core.jobs import merge, unwanted
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import (
    BY_HAND,
    LOADED,
    MOVING,
    UP,
    Kind,
    LifecycleError,
    Reason,
    Step,
    follow,
)
from vllmd.core.model import INFINITY, Job, Model, Replica, Start, wanted_start
from vllmd.core.types import Decision, Placement, State

DECISIONS_KEPT = 1000
SETTLED_AFTER = 2.0  # seconds after a change of state from which a sample of memory surely shows the new one
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
        self._out: list[cmd.Command] = []
        self.for_review: dict[Model, None] = {}  # changed; what follows from that is still to be found
        self.calibrations = 0  # how often a time that was learnt changed what is expected of other engines
        self._busy: dict[int, Replica] = {}  # device -> whose command runs there
        self.stirred: set[int] = set()  # devices on which an engine's state changed, during this event
        self.leaving: dict[Replica, None] = {}  # gate closed, or asleep and to be stopped, and no command out yet
        self.displaced: dict[Replica, None] = {}  # asleep because another one needed their place

    # -- what goes out

    def collect(self) -> list[cmd.Command]:
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
        self._out.append(cmd.Record(decision))

    def admit(self, r: Replica, request: str) -> None:
        """The engine may have this request."""
        self.begin(r, request)
        self._out.append(cmd.Admit(request, r.id))

    def begin(self, r: Replica, request: str) -> None:
        """The request runs in the engine. Only now it counts as demand: many who wait leave before."""
        now = self.now
        r.running[request] = now
        r.used = now
        (r.learnt or r.costs).arrived(now)
        if r.health:
            r.health.unanswered[request] = self.now

    def answer(
        self, ask: str, chosen: str = "", refused: str = "", error: cmd.RejectReason = cmd.RejectReason.CONFLICT
    ) -> None:
        """Tell what becomes of what was asked, if the event named it with an ``ask``."""
        if ask:
            self._out.append(cmd.Answer(ask, "", refused, error) if refused else cmd.Answer(ask, chosen))

    def hint(self, command: cmd.AddReplica | cmd.ReadAhead | cmd.StopReadAhead) -> None:
        """Have the daemon do what changes no engine."""
        self._out.append(command)

    def rename(self, r: Replica, name: str) -> None:
        """Give the replica another id."""
        self._out.append(cmd.RenameReplica(r.id, name))
        r.id = name

    def reject(self, request: str, error: cmd.RejectReason, message: str, retry_after: float | None = None) -> None:
        """The request gets this error."""
        self._out.append(cmd.Reject(request, error, message, retry_after))

    def cut(self, r: Replica, why: str, requests: Iterable[str] | None = None) -> None:
        """Break off all that runs in the engine, or only these ``requests``."""
        if requests is None and r.job:
            r.job.cut_at = INFINITY  # once is enough
            self.for_review[r.model] = None
        self._out += [cmd.CutRequest(request, why) for request in (r.running if requests is None else requests)]

    # -- devices

    def holder(self, devices: Iterable[int]) -> Replica | None:
        """A replica whose command is under way on one of ``devices``; None if there is none."""
        for index in devices:
            if index in self._busy:
                return self._busy[index]
        return None

    @property
    def moving(self) -> Mapping[int, Replica]:
        """The devices on which a command is under way, and whose."""
        return self._busy

    def free_to_move(self, r: Replica) -> bool:
        """Whether no other engine has a command under way on its devices."""
        return not any(self._busy.get(index, r) is not r for index in r.placement.devices)

    # -- jobs

    def ask(self, r: Replica, new: Job) -> None:
        """Give the replica this job. What becomes of its present one is in the table of merges.

        Frozen requests are not lost: their engine wakes first, and drains.
        """
        self.for_review[r.model] = None
        if not r.loaded:
            if new.kind in UP:
                self._set(r, merge(r.job, False, new))
            elif new.reason in BY_HAND:
                self._set(r, unwanted(r.job, False))
            return
        frozen = r.state is State.SLEEPING and bool(r.running)
        if frozen and r.job is None:
            r.job = Job(Kind.WAKE, Reason.REQUEST, "its requests are frozen", self.now)
        moving = r.state in MOVING
        job = merge(r.job, moving or frozen, new)
        if moving and job is new:
            self.stop(r, new.why, new.force, job)
        else:
            self._set(r, job)
            self._follow_up(r)

    def call_off(self, r: Replica) -> None:
        """Drop what the replica was to leave for, or to do for itself, if it has not begun; a start after it stays."""
        if r.job and r.state in MOVING:
            r.job.then = wanted_start(r.job.then)
        elif r.job and r.job.leaves:
            self._set(r, r.job.then)
            self._follow_up(r)

    def unwant(self, r: Replica) -> None:
        """Drop a start that was asked for without a request: only requests bring the replica up from now on."""
        self._set(r, unwanted(r.job, r.state in MOVING))

    def thaw(self, r: Replica) -> None:
        """Go on with what was to happen after a wake, where nothing is frozen any more that it had to wake for."""
        job = r.job
        if job and job.kind is Kind.WAKE and job.then and not r.running and r.state is State.SLEEPING:
            self._set(r, job.then)
            self._follow_up(r)

    def retry(self, r: Replica) -> None:
        """Have a start that failed for lack of memory tried once more."""
        self.forgive(r)
        if r.job:
            r.job.retried = True

    def keep_down(self, r: Replica) -> None:
        """Keep a replica down whose failure is for good: only a request after its back-off brings it up again."""
        self._set(r, None)

    def release(self, r: Replica) -> None:
        """Stop the replica from leaving for another one's sake: if it has no other reason to leave, it stays."""
        job = r.job
        if job and job.target:
            job.target = None
            if job.reason is Reason.SWAP:
                self.call_off(r)

    def _follow_up(self, r: Replica) -> None:
        """Close or open the gate as the job says; a job that asks for what is so already is done."""
        job = r.job
        if r.state is State.READY and job:
            if job.leaves:
                self._move(r, Step.DRAIN)
            else:
                self._set(r, None)
        elif r.state is State.DRAINING and not (job and job.leaves):
            self._move(r, Step.REOPEN)
            self._set(r, None)
        elif r.state is State.SLEEPING and job and job.kind is Kind.SLEEP and job.level <= r.level:
            self._set(r, job.then)

    def _set(self, r: Replica, job: Job | None) -> None:
        if job and job.kind in UP and r.state not in MOVING:
            job.kind = Kind.WAKE if r.state is State.SLEEPING else Kind.START
        if r.job is not job:
            self.for_review[r.model] = None
        r.job = job
        self._track(r)

    def _track(self, r: Replica) -> None:
        if r.leaving and r.state in (State.DRAINING, State.SLEEPING):
            self.leaving[r] = None
        else:
            self.leaving.pop(r, None)

    # -- commands

    def start(self, r: Replica, devices: tuple[int, ...], size: int | None = None) -> None:
        """Start it there; its booking, ``size`` if it is not by its footprint, is in the ledger from now on."""
        r.placement, r.start = Placement(devices), Start()
        self._begin(r, Kind.START)
        self._move(r, Step.START)
        if size is not None:
            r.granted(size)
        self.ledger.hold(r, dict.fromkeys(devices, r.booking if size is None else size))
        self.settle_host(r)
        self._out.append(cmd.StartEngine(r.id, r.placement, r.engine_memory if size is None else size))

    def wake(self, r: Replica) -> None:
        """Wake it where it sleeps; it holds what it holds awake from now on."""
        self._begin(r, Kind.WAKE)
        self._move(r, Step.WAKE)
        self.ledger.hold(r, dict.fromkeys(r.placement.devices, r.footprint.awake))
        self._out.append(cmd.WakeEngine(r.id, r.level))

    def _begin(self, r: Replica, kind: Kind) -> None:
        """Bring the replica up: for whoever wanted it, or to sleep deeper, else for the clients that wait."""
        if r.job is None or r.job.reason is Reason.RESTART:
            r.job = Job(kind, Reason.REQUEST, "requests wait for it", self.now)

    def drain(self, r: Replica) -> None:
        """Close the gate for its job. Running requests go on; it leaves when they are through."""
        self._move(r, Step.DRAIN)

    def sleep(self, r: Replica, level: int, freeze: bool = False) -> None:
        """Put it to sleep; it still holds everything."""
        self._move(r, Step.SLEEP)
        r.level = level
        if level == 1:
            self.ledger.hold_host(r, r.spec.host_running + r.footprint.host)
        r.frozen = {request: r.frozen.get(request, 0) + 1 for request in r.running}
        self._out.append(cmd.SleepEngine(r.id, level, freeze))

    def prove(self, r: Replica) -> None:
        """Have it shown, with a request of the daemon's own, that freezing loses nothing."""
        self._move(r, Step.PROVE)
        self._out.append(cmd.ProveFreeze(r.id))

    def stop(self, r: Replica, why: str, kill: bool = False, job: Job | None = None) -> None:
        """Stop it, whatever it does; for its job, or for this one."""
        r.job = job or r.job
        if r.job:
            r.job.kind = Kind.STOP
        self._move(r, Step.STOP)
        self._out.append(cmd.StopEngine(r.id, why, kill))

    def forgive(self, r: Replica) -> None:
        """Let a failed replica be started again."""
        self._move(r, Step.FORGIVE)
        if r.job and r.job.reason is Reason.RESTART:
            self._set(r, None)

    def probe(self, r: Replica, request: str, limit: float) -> None:
        """Ask it a question of the daemon's own, which runs in it as any other request does."""
        r.running[request] = self.now
        self._out.append(cmd.ProbeReplica(request, r.id, limit))

    def remember_failure(self, r: Replica, reason: str, since: float) -> None:
        """Note a failure of ``since`` seconds ago, before this daemon; the next request may have it tried again."""
        self._move(r, Step.ADOPTED_FAILED)
        r.failures, r.failure, r.failed_at = 1, reason, self.now - since
        r.changed, r.retry_at = r.failed_at, self.now

    # -- answers

    def ready(self, r: Replica) -> None:
        """The replica serves: after a start, a wake, or the proof of freezing."""
        self._learn_time(r)
        step = {State.STARTING: Step.READY, State.WAKING: Step.AWAKE}.get(r.state, Step.PROVED)
        deepens = r.job is not None and r.job.kind is Kind.SLEEP
        if not deepens and r.state is not State.FALLING_ASLEEP:  # its idle age counts on through those
            r.idle_since = self.now
        self._move(r, step)
        r.level, r.ready_at = 0, self.now
        then = r.job.then if r.job else None
        if then or not deepens:
            self._set(r, then if then and then.leaves else None)
        self.ledger.hold(r, dict.fromkeys(r.placement.devices, r.footprint.awake))
        self.settle_host(r)

    def asleep(self, r: Replica, level: int, freed: Mapping[int, int]) -> None:
        """The replica sleeps: the ledger has back what came free, as measured or as expected."""
        self._learn_time(r)
        self._move(r, Step.ASLEEP)
        job, r.job = r.job, None
        if job is not None and job.reason is Reason.SWAP:
            self.displaced[r] = None
        r.level = level
        if r.health:
            r.health.engine_left()
        r.slept_shallow = r.slept_shallow or level == 1
        held = self.ledger.held(r)
        rest = {i: max(0, b - freed[i]) if i in freed else min(b, r.footprint.asleep) for i, b in held.items()}
        self.ledger.hold(r, rest)
        if freed and rest:
            r.measured(self.smallest_capacity(r), asleep=max(rest.values()))
        self.settle_host(r)
        if job and job.then:
            self.ask(r, job.then)

    def broke(self, r: Replica, step: Step, why: str) -> None:
        """A sleep, a wake or the proof failed: its state is unknown, so it is stopped in full."""
        self.cut(r, why)
        target = r.job.target if r.job else None
        r.job = Job(Kind.STOP, Reason.FAILED, why, self.now, target=target, then=wanted_start(r.job))
        self._move(r, step)
        self._out.append(cmd.StopEngine(r.id, why, False))

    def gone(self, r: Replica, step: Step) -> None:
        """Every process of it is gone, and so is everything it held."""
        if r.state is State.STOPPING and step is Step.STOPPED:
            self._learn_time(r)
        self._move(r, step)
        r.running.clear()
        r.frozen = {}
        r.level, r.placement = 0, Placement()
        r.slept_shallow = False
        start = r.job if step is Step.START_FAILED and r.job and r.job.kind is Kind.START else wanted_start(r.job)
        if start:
            start.then = None
        self._set(r, start)
        if r.health:
            r.health.engine_left()
        self.ledger.release(r)

    def adopt(self, r: Replica, placement: Placement, state: State, level: int) -> None:
        """Take over an engine that an earlier daemon has left, as it was found. Raises LifecycleError."""
        before, r.placement = r.placement, placement
        try:
            self._move(r, ADOPTIONS[state])
        except LifecycleError:
            r.placement = before
            raise
        r.level, r.ready_at = level, self.now
        r.slept_shallow = level == 1
        if state is State.STARTING:
            self._begin(r, Kind.START)
        self.ledger.add_gone(placement.devices)
        self.rebook(r)

    def rebook(self, r: Replica) -> None:
        """Book the replica anew: its footprint is known better than when it was booked."""
        shares = {State.SLEEPING: r.footprint.asleep, State.STARTING: r.booking}
        share = shares.get(r.state, r.footprint.awake)
        self.ledger.hold(r, dict.fromkeys(r.placement.devices, share))
        self.settle_host(r)

    def smallest_capacity(self, r: Replica) -> int:
        """Bytes that can be promised of the smallest of its devices."""
        accounts = self.ledger.accounts
        return min((accounts[index].capacity for index in r.placement.devices if index in accounts), default=1 << 62)

    def measured(self, r: Replica, shares: Mapping[int, int]) -> None:
        """Note what the replica's processes were seen to hold, bytes per device.

        On the move, and just after it (the sample may be from before), only what exceeds the booking counts.
        """
        held = self.ledger.held(r)
        seen = {index: shares.get(index, share) for index, share in held.items()}
        if not seen or r.state not in LOADED:
            return
        settled = self.now - r.changed >= SETTLED_AFTER
        if r.state is State.READY and settled:
            r.measured(self.smallest_capacity(r), awake=max(seen.values()))
        elif r.state is State.SLEEPING and settled:
            r.measured(self.smallest_capacity(r), asleep=max(seen.values()))
        else:
            seen = {index: max(size, held[index]) for index, size in seen.items()}
        self.for_review[r.model] = None
        self.ledger.hold(r, seen)

    def too_late(self, r: Replica, step: Step) -> None:
        """The answer to a command that a stop has overtaken: it stops since it was told to, not since then."""
        follow(r.id, r.state, step)

    def settle_host(self, r: Replica) -> None:
        """Book the host memory that it takes while it runs, and that of a level-1 sleeper.

        An engine may keep the latter after waking, until it stops.
        """
        keeps = r.level == 1 or (r.slept_shallow and r.spec.keeps_host)
        self.ledger.hold_host(r, r.spec.host_running + (r.footprint.host if keeps else 0))

    # -- underneath

    def _move(self, r: Replica, step: Step) -> None:
        r.state = follow(r.id, r.state, step)
        r.touch(self.now)
        self.for_review[r.model] = None
        self.displaced.pop(r, None)  # it is no sleeper any more, or has just become one
        self._track(r)
        devices = r.placement.devices
        self.stirred.update(devices)
        if r.state in MOVING:
            self._busy.update(dict.fromkeys(devices, r))
        else:
            for index in devices:
                if self._busy.get(index) is r:
                    del self._busy[index]

    def _learn_time(self, r: Replica) -> None:
        kinds = {State.STARTING: "start", State.WAKING: f"wake{r.level}", State.STOPPING: "stop"}
        kind = kinds.get(r.state, "")
        if r.state is State.FALLING_ASLEEP and r.job and r.job.kind is not Kind.PROVE:
            kind = f"sleep{r.level}"
        if kind and r.costs.observe(kind, self.now - r.changed):
            self.calibrations += 1
