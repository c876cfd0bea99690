"""What the daemon reports of engines, devices and failures (2 in ``design.md``)."""

from __future__ import annotations

from vllmd.core.admission import Admission
from vllmd.core.commands import RejectReason
from vllmd.core.common import Core
from vllmd.core.events import (
    EngineAdopted,
    EngineAsleep,
    EngineAwake,
    EngineExited,
    EngineReady,
    EngineSleepFailed,
    EngineStartFailed,
    EngineStopped,
    EngineWakeFailed,
    FailureRemembered,
    FreezeProved,
    MemorySampled,
    StandbysHeld,
    StartProgressed,
)
from vllmd.core.ledger import gib
from vllmd.core.lifecycle import Kind, LifecycleError, Reason, Step
from vllmd.core.model import Job, Replica
from vllmd.core.types import Footprint, State

STABLE = 60.0  # seconds; an engine that served so long has put its failures behind it
LONGEST_BACKOFF = 300.0
LONGEST_ELSEWHERE = 5.0  # of one that runs elsewhere: asking costs nothing, and it should be used as soon as it is back


class EngineEvents:
    """Good news opens gates; bad news ends in a known state, with a reason, and never for good."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission

    # -- good news

    def ready(self, e: EngineReady) -> None:
        """The engine's start succeeded: it serves."""
        m = self._answered(e.replica, State.STARTING, Step.READY)
        if m:
            if e.footprint:
                m.learn(e.footprint, self._core.engines.most(m))
            self._serves(m)

    def progressed(self, e: StartProgressed) -> None:
        """2.8: a first start goes on; until one was measured its pace is the better word for how long it takes."""
        m, now = self._core.replicas.get(e.replica), self._core.now
        if m is None or m.state is not State.STARTING or m.costs.learnt("start"):
            return
        left = (1.0 - e.share) * m.costs.wake(0)
        if not e.share:
            m.start.fetched = True
        elif not m.start.fetched:  # what was seen of it counts as much as there was to be seen
            left = (1.0 - e.share) * (now - m.changed + left)
        m.start.ends = now + left
        self._core.changed[m] = None

    def awake(self, e: EngineAwake) -> None:
        """The engine's wake succeeded: it serves."""
        m = self._answered(e.replica, State.WAKING, Step.AWAKE)
        if m:
            self._serves(m)

    def asleep(self, e: EngineAsleep) -> None:
        """The engine sleeps, at the level and with the memory freed that the event says."""
        m = self._answered(e.replica, State.FALLING_ASLEEP, Step.ASLEEP)
        if m:
            self._core.engines.asleep(m, e.level, e.freed)
            self._settled(m)

    def stopped(self, e: EngineStopped) -> None:
        """The stop is complete; memory that did not come back marks its device (2.6)."""
        core = self._core
        m = core.replica(e.replica)
        devices = m.placement.devices
        core.engines.gone(m, Step.STOPPED)
        missing = {index: size for index, size in e.missing.items() if index in devices and size > 0}
        core.engines.ledger.wedge(missing)
        for index, size in missing.items():
            why = f"{gib(size)} of device {index} did not come back: it is avoided until they do"
            core.engines.record("wedged", m, why, {"device": index, "missing": size})
        self._settled(m)

    def adopted(self, e: EngineAdopted) -> None:
        """An engine from before this daemon goes on as it was found."""
        core = self._core
        m = core.replica(e.replica)
        core.engines.adopt(m, e.placement, e.state, e.level if e.state is State.SLEEPING else 0)
        if e.footprint:
            m.learn(e.footprint, core.engines.most(m))
            core.engines.rebook(m)
        m.idle_since = m.used = core.now - max(0.0, e.idle)
        m.changed = core.now - max(0.0, e.since)
        core.engines.record("adopt", m, f"found {m.state.value}", {"level": m.level})
        self._settled(m)

    def remembered(self, e: FailureRemembered) -> None:
        """2.9: one that is adopted, or is about to be started anyway, has its failure behind it."""
        m = self._core.replica(e.replica)
        if m.state is State.STOPPED and m.job is None and not m.spec.preload:
            self._core.engines.remember_failure(m, e.reason, max(0.0, e.since))
            self._core.mark_dirty(m)

    def sampled(self, e: MemorySampled) -> None:
        """NVML's word corrects the ledger; a device that could not be read keeps its last figures."""
        core = self._core
        core.engines.ledger.external({i: size for i, size in e.external.items() if i not in e.failed}, core.now)
        core.engines.ledger.unread(e.failed)
        shares: dict[str, dict[int, int]] = {}
        for (name, index), size in e.replicas.items():
            if size > 0 and name in core.replicas and index not in e.failed:
                shares.setdefault(name, {})[index] = size
        for name, share in shares.items():
            core.engines.measured(core.replicas[name], share)
            core.mark_dirty(core.replicas[name])
        core.replan = core.replan or bool(core.waiting)

    def standbys(self, e: StandbysHeld) -> None:
        """Booked, and shown; what is promised to models does not depend on it."""
        self._core.engines.ledger.standbys = max(0, e.size)

    # -- bad news

    def start_failed(self, e: EngineStartFailed) -> None:
        """For lack of memory it is tried once more with more room (2.3); else everybody is told (2.4)."""
        m = self._answered(e.replica, State.STARTING, Step.START_FAILED)
        if m:
            self._core.engines.gone(m, Step.START_FAILED)
            self._settled(m)
            if e.memory and not e.permanent and not (m.job and m.job.retried):
                self._more_room(m, e)
            else:
                self._give_up(m, e.reason)

    def sleep_failed(self, e: EngineSleepFailed) -> None:
        """The sleep failed, so nothing is known of the engine's state: it is stopped."""
        self._half_done(e.replica, State.FALLING_ASLEEP, Step.SLEEP_FAILED, f"falling asleep failed: {e.reason}")

    def wake_failed(self, e: EngineWakeFailed) -> None:
        """The wake failed, so nothing is known of the engine's state: it is stopped."""
        self._half_done(e.replica, State.WAKING, Step.WAKE_FAILED, f"waking failed: {e.reason}")

    def proved(self, e: FreezeProved) -> None:
        """Whether frozen requests survive in this engine; if not, its state is unknown as well."""
        step = Step.PROVED if e.survived else Step.DISPROVED
        m = self._answered(e.replica, State.FALLING_ASLEEP, step)
        if not m:
            return
        m.freezes = e.survived
        self._core.engines.record("prove", m, "frozen requests survive" if e.survived else "frozen requests do not")
        if e.survived:
            self._serves(m)
        else:
            self._core.engines.broke(m, step, "a frozen request did not survive; it will only be drained")

    def exited(self, e: EngineExited) -> None:
        """2.7: a death during the start is a failed start; during a stop, its end; else a crash."""
        m = self._core.replica(e.replica)
        before, stable = m.state, self._core.now - m.ready_at >= STABLE
        if not m.spec.device_count:  # it runs elsewhere, and its connections need not break off by themselves
            self._core.engines.cut(m, e.reason)
        self._core.engines.gone(m, Step.EXITED)
        self._settled(m)
        if before is State.STARTING:
            self._give_up(m, e.reason)
        elif before is not State.STOPPING:
            self._crashed(m, e.reason, stable)

    # -- underneath

    def _answered(self, name: str, state: State, step: Step) -> Replica | None:
        """The replica, if it is in ``state``; None if a stop has overtaken the command that this answers (2.1)."""
        m = self._core.replica(name)
        if m.state is State.STOPPING:
            self._core.engines.too_late(m, step)
            return None
        if m.state is not state:
            found = f"which is {m.state.value!r}, not {state.value!r}"
            raise LifecycleError(f"the daemon reported {step.value!r} of {name!r}, {found}")
        return m

    def _serves(self, m: Replica) -> None:
        self._core.engines.ready(m)
        m.failure = ""
        self._settled(m)

    def _settled(self, m: Replica) -> None:
        """Its command is answered: devices are at rest again, and there is news to plan by."""
        self._core.swaps.left(m)
        self._core.mark_urgent(m)

    def _more_room(self, m: Replica, e: EngineStartFailed) -> None:
        """Learn that it needs more; whoever waits makes the policy find that room."""
        m.failure = e.reason
        largest = max((a.capacity for a in self._core.engines.ledger.accounts.values()), default=0)
        if e.needed:
            m.costs.asked = max(m.costs.asked, e.needed)
        f = m.footprint
        grown = max(m.booking, min(largest, m.booking * 11 // 10))
        m.costs.footprint = Footprint(grown, f.awake, f.asleep, f.host, f.source)
        self._core.engines.retry(m)
        room = "what is free then" if m.spec.when_free else f"room for {gib(m.booking)} per device"
        why = f"it failed for lack of memory ({e.reason}); once more with {room}"
        self._core.engines.record("retry", m, why, {"booking": m.booking})

    def _give_up(self, m: Replica, reason: str) -> None:
        left = self._failed(m, reason)
        self._core.engines.keep_down(m)
        self._core.engines.record("fail", m, reason, {"failures": m.failures, "retry_after": left})
        self._admission.reject_waiters(m, RejectReason.ENGINE_FAILED, reason, left)

    def _crashed(self, m: Replica, reason: str, stable: bool) -> None:
        if stable:
            m.failures = 0
        if m.failures >= m.spec.max_restarts:
            self._give_up(m, reason)
            return
        left = self._failed(m, reason)
        self._core.ask(m, Job(Kind.START, Reason.RESTART, reason, self._core.now))
        numbers = {"failures": m.failures, "retry_after": left, "waiting": m.queued}
        self._core.engines.record("crash", m, reason, numbers)

    def _failed(self, m: Replica, reason: str) -> float:
        """One more failure in a row. Returns the seconds until it may be tried again."""
        if m.failed_at < m.ready_at <= self._core.now - STABLE:
            m.failures = 0  # it has served since, and did not fail then
        m.failures, m.failed_at = m.failures + 1, self._core.now
        m.failure = reason
        longest = LONGEST_BACKOFF if m.spec.device_count else LONGEST_ELSEWHERE
        backoff = min(longest, m.spec.restart_backoff * 2.0 ** min(m.failures - 1, 20))
        m.retry_at = self._core.now + backoff
        return backoff

    def _half_done(self, name: str, state: State, step: Step, why: str) -> None:
        """2.5: a full stop is the only way back to a known state."""
        m = self._answered(name, state, step)
        if m:
            m.sleep_failures += 1
            m.failure = why
            self._core.engines.record("stop", m, why)
            self._core.engines.broke(m, step, why)
            self._core.mark_dirty(m)
