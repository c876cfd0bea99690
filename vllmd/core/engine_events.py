"""What the daemon reports of engines, devices and failures (2 in ``design.md``)."""

from __future__ import annotations

from vllmd.core import events as ev
from vllmd.core.admission import Admission
from vllmd.core.commands import RejectReason
from vllmd.core.common import Core
from vllmd.core.lifecycle import Kind, LifecycleError, Reason, Step
from vllmd.core.model import Job, Replica, Start
from vllmd.core.types import CPU, Footprint, State
from vllmd.sizes import in_words

STABLE = 60.0  # seconds; an engine that served so long has put its failures behind it
LONGEST_BACKOFF = 300.0  # seconds
# Of one that runs elsewhere: asking costs nothing, and it should be used as soon as it is back.
LONGEST_BACKOFF_ELSEWHERE = 5.0


class EngineEvents:
    """What engines report. Good news opens gates; bad news ends in a known state, with a reason, and never for good."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission

    # -- good news

    def ready(self, e: ev.EngineReady) -> None:
        """2.2: the engine's start succeeded, and it serves."""
        r = self._answered(e.replica, State.STARTING, Step.READY)
        if r:
            if e.footprint:
                r.learn(e.footprint, self._core.engines.smallest_capacity(r))
            self._serves(r)

    def progressed(self, e: ev.StartProgressed) -> None:
        """2.8: a first start goes on; until one was measured its pace is the better word for how long it takes."""
        r, now = self._core.replicas.get(e.replica), self._core.now
        if r is None or r.state is not State.STARTING or r.costs.learnt("start"):
            return
        left, fetched = (1.0 - e.share) * r.costs.wake(0), r.start.fetched or not e.share
        if not fetched:
            # A whole start takes what this one took so far and what is expected of the rest; 1 - share of it is left.
            left = (1.0 - e.share) * (now - r.changed + left)
        r.start = Start(now + left, fetched)
        self._core.changed[r] = None

    def awake(self, e: ev.EngineAwake) -> None:
        """2.2: the engine's wake succeeded, and it serves."""
        r = self._answered(e.replica, State.WAKING, Step.AWAKE)
        if r:
            self._serves(r)

    def asleep(self, e: ev.EngineAsleep) -> None:
        """2.2: the engine sleeps, at the level and with the memory freed that the event says."""
        r = self._answered(e.replica, State.FALLING_ASLEEP, Step.ASLEEP)
        if r:
            self._core.engines.asleep(r, e.level, e.freed)
            self._settled(r)

    def stopped(self, e: ev.EngineStopped) -> None:
        """The stop is complete; memory that did not come back marks its device (2.6)."""
        core = self._core
        r = core.replica(e.replica)
        devices = r.placement.devices
        core.engines.gone(r, Step.STOPPED)
        missing = {index: size for index, size in e.missing.items() if index in devices and size > 0}
        core.engines.ledger.wedge(missing)
        for index, size in missing.items():
            why = f"{in_words(size)} of device {index} did not come back: it is avoided until they do"
            core.engines.record("wedged", r, why, {"device": index, "missing": size})
        self._settled(r)

    def adopted(self, e: ev.EngineAdopted) -> None:
        """An engine from before this daemon goes on as it was found."""
        core = self._core
        r = core.replica(e.replica)
        core.engines.adopt(r, e.placement, e.state, e.level if e.state is State.SLEEPING else 0)
        if e.footprint:
            r.learn(e.footprint, core.engines.smallest_capacity(r))
            core.engines.rebook(r)
        r.idle_since = r.used = core.now - max(0.0, e.idle)
        r.changed = core.now - max(0.0, e.since)
        core.engines.record("adopt", r, f"found {r.state.value}", {"level": r.level})
        self._settled(r)

    def remembered(self, e: ev.FailureRemembered) -> None:
        """2.9: one that is adopted, or is about to be started anyway, has its failure behind it."""
        r = self._core.replica(e.replica)
        if r.state is State.STOPPED and r.job is None and not r.spec.preload:
            self._core.engines.remember_failure(r, e.reason, max(0.0, e.since))

    def sampled(self, e: ev.MemorySampled) -> None:
        """NVML's word corrects the ledger; a device that could not be read keeps its last figures."""
        core = self._core
        ledger, largest = core.engines.ledger, 0
        if any(account.device.runtime == CPU for account in ledger.accounts.values()):
            largest = max((r.booking for r in core.replicas.values() if r.spec.device_count), default=0)
        ledger.set_external({i: size for i, size in e.external.items() if i not in e.failed}, core.now, largest)
        ledger.mark_unread(e.failed)
        shares: dict[str, dict[int, int]] = {}
        for (name, index), size in e.replicas.items():
            if size > 0 and name in core.replicas and index not in e.failed:
                shares.setdefault(name, {})[index] = size
        for name, share in shares.items():
            core.engines.measured(core.replicas[name], share)
        for name, joules in e.drawn.items():  # energy drawn unused counts for idle rules (4.4)
            r = core.replicas.get(name)
            if r and r.spec.idle.energy is not None:
                r.drawn = r.idle_since, joules
                core.mark_for_review(r)
        core.news_for_all = core.news_for_all or bool(core.waiting)

    def standbys(self, e: ev.StandbysHeld) -> None:
        """Show what standby engines hold; what is promised to models does not depend on it."""
        self._core.engines.ledger.standbys = max(0, e.size)

    # -- bad news

    def start_failed(self, e: ev.EngineStartFailed) -> None:
        """For lack of memory it is tried once more with more room (2.3); else everybody is told (2.4)."""
        r = self._answered(e.replica, State.STARTING, Step.START_FAILED)
        if not r:
            return
        engines = self._core.engines
        engines.gone(r, Step.START_FAILED)
        self._settled(r)
        if not e.memory or e.permanent or (r.job and r.job.retried):
            self._give_up(r, e.reason)
            return
        # What it said it needs is learnt, else a tenth more is booked: whoever waits makes the policy find that room.
        # Not more than the largest device has: a device that it filled once it can fill again.
        r.failure = e.reason
        largest = max((a.capacity for a in engines.ledger.accounts.values()), default=0)
        if e.needed:
            r.costs.needed = max(r.costs.needed, e.needed)
        f = r.footprint
        grown = max(r.booking, min(largest, r.booking * 11 // 10))
        r.costs.footprint = Footprint(grown, f.awake, f.asleep, f.host, f.source)
        engines.retry(r)
        room = "what is free then" if r.spec.when_free else f"room for {in_words(r.booking)} per device"
        why = f"it failed for lack of memory ({e.reason}); once more with {room}"
        engines.record("retry", r, why, {"booking": r.booking})

    def sleep_failed(self, e: ev.EngineSleepFailed) -> None:
        """The sleep failed, so nothing is known of the engine's state: it is stopped."""
        self._half_done(e.replica, State.FALLING_ASLEEP, Step.SLEEP_FAILED, f"falling asleep failed: {e.reason}")

    def wake_failed(self, e: ev.EngineWakeFailed) -> None:
        """The wake failed, so nothing is known of the engine's state: it is stopped."""
        self._half_done(e.replica, State.WAKING, Step.WAKE_FAILED, f"waking failed: {e.reason}")

    def proved(self, e: ev.FreezeProved) -> None:
        """Whether frozen requests survive in this engine; if not, its state is unknown as well."""
        step = Step.PROVED if e.survived else Step.DISPROVED
        r = self._answered(e.replica, State.FALLING_ASLEEP, step)
        if not r:
            return
        r.freezes = e.survived
        self._core.engines.record("prove", r, "frozen requests survive" if e.survived else "frozen requests do not")
        if e.survived:
            self._serves(r)
        else:
            self._core.engines.broke(r, step, "a frozen request did not survive; it will only be drained")

    def exited(self, e: ev.EngineExited) -> None:
        """2.7: a death during the start is a failed start; during a stop, its end; else a crash."""
        r = self._core.replica(e.replica)
        before, stable = r.state, self._core.now - r.ready_at >= STABLE
        if not r.spec.device_count:  # it runs elsewhere, and its connections need not break off by themselves
            self._core.engines.cut(r, e.reason)
        self._core.engines.gone(r, Step.EXITED)
        self._settled(r)
        if before is State.STOPPING:
            return
        if before is not State.STARTING and stable:
            r.failures = 0
        if before is State.STARTING or r.failures >= r.spec.max_restarts:
            self._give_up(r, e.reason)
            return
        backoff = self._failed(r, e.reason)
        self._core.engines.ask(r, Job(Kind.START, Reason.RESTART, e.reason, self._core.now))
        numbers = {"failures": r.failures, "retry_after": backoff, "waiting": r.queued}
        self._core.engines.record("crash", r, e.reason, numbers)

    # -- underneath

    def _answered(self, name: str, state: State, step: Step) -> Replica | None:
        """The replica, if it is in ``state``; None if a stop has overtaken the command that this answers (2.1)."""
        r = self._core.replica(name)
        if r.state is State.STOPPING:
            self._core.engines.too_late(r, step)
            return None
        if r.state is not state:
            found = f"which is {r.state.value!r}, not {state.value!r}"
            raise LifecycleError(f"the daemon reported {step.value!r} of {name!r}, {found}")
        return r

    def _serves(self, r: Replica) -> None:
        self._core.engines.ready(r)
        r.failure = ""
        self._settled(r)

    def _settled(self, r: Replica) -> None:
        """Note that the replica's command is answered: devices are at rest again, and there is news to plan by."""
        self._core.swaps.left(r)
        self._core.mark_news(r)

    def _give_up(self, r: Replica, reason: str) -> None:
        """2.4: it comes up again only for a request after its back-off; those that wait now are told."""
        backoff = self._failed(r, reason)
        self._core.engines.keep_down(r)
        self._core.engines.record("fail", r, reason, {"failures": r.failures, "retry_after": backoff})
        self._admission.reject_waiters(r, RejectReason.ENGINE_FAILED, reason, backoff)

    def _failed(self, r: Replica, reason: str) -> float:
        """One more failure in a row. Returns the seconds until it may be tried again."""
        if r.failed_at < r.ready_at <= self._core.now - STABLE:
            r.failures = 0  # it has served since, and did not fail then
        r.failures, r.failed_at = r.failures + 1, self._core.now
        r.failure = reason
        longest = LONGEST_BACKOFF if r.spec.device_count else LONGEST_BACKOFF_ELSEWHERE
        backoff = min(longest, r.spec.restart_backoff * 2.0 ** min(r.failures - 1, 20))
        r.retry_at = self._core.now + backoff
        return backoff

    def _half_done(self, name: str, state: State, step: Step, why: str) -> None:
        """2.5: a full stop is the only way back to a known state."""
        r = self._answered(name, state, step)
        if r:
            r.sleep_failures += 1
            r.failure = why
            self._core.engines.record("stop", r, why)
            self._core.engines.broke(r, step, why)
