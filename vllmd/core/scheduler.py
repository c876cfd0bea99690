"""handle(event, now) -> commands: the one owner of everything the core knows.

``design.md`` has the decision tree as numbered prose; the numbers in the
comments here are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllmd.core import events as ev
from vllmd.core.commands import Command
from vllmd.core.costs import CostBook
from vllmd.core.exchanges import Exchanges
from vllmd.core.fleet import Fleet
from vllmd.core.idle import Rest, idle_due, rest
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import LifecycleError, Step
from vllmd.core.model import INFINITY, Leave, Model
from vllmd.core.policy import POLICIES, Plan, Policy, Situation, choices, fits
from vllmd.core.possible import never_fits, pinned_out, stuck
from vllmd.core.situation import host_claims, levels, look, see_waiting, sleep_levels
from vllmd.core.types import Device, Footprint, ModelSpec, Settings, Snapshot, Source, State
from vllmd.core.views import snapshot

TICK = 0.25  # seconds between two looks at the policy while anything waits
STABLE = 60.0  # an engine that served so long has put its failures behind it
LONGEST_BACKOFF = 300.0
DEFAULTS = Settings()
DEEPEN_RETRY = 5.0  # seconds between two looks for room in which to sleep deeper
FILL_AGE = 1.0  # seconds for which the choice of level-1 sleepers stands


class Scheduler:
    """Decides everything about models and memory. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        models: Iterable[ModelSpec],
        devices: Iterable[Device],
        settings: Settings = DEFAULTS,
        costs: CostBook | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.costs = costs or CostBook()
        self.settings = settings
        self._policy = policy or POLICIES[settings.policy]
        self._fleet = Fleet(Ledger(devices, settings.host_memory))
        self._models: dict[str, Model] = {}
        self._exchanges = Exchanges(self._fleet, self._models)
        self._requests: dict[str, Model] = {}  # every request that is owed an end
        self._queued = 0
        self._waiting: dict[str, Model] = {}  # wanted, and neither on nor on their way
        self._leaving: dict[str, Model] = {}  # draining, or sleepers about to stop
        self._touched: dict[str, Model] = {}
        self._preload: dict[str, Model] = {}  # to be loaded where they fit, in order
        self._preloading = False  # not before TimePassed: what already runs is adopted first
        self._replan = False
        self._due = INFINITY
        self._looked = -INFINITY
        self._shallow: frozenset[str] = frozenset()
        self._filled = -INFINITY
        for spec in models:
            self._add(spec)

    # -- the public face

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """What is to be done because of ``event``. Raises LifecycleError, nothing changed, if it cannot have been."""
        self._fleet.now = max(now, self._fleet.now)
        _HANDLERS[type(event)](self, event)
        self._advance()
        return self._fleet.collect()

    def next_timer(self) -> float | None:
        """When it wants ``TimePassed`` if nothing else happens before."""
        if self._preload and not self._preloading:
            return self._fleet.now
        due = min(self._due, self._looked + TICK) if self._stalled() else self._due
        return None if due == INFINITY else due

    def snapshot(self, now: float) -> Snapshot:
        """Everything worth showing, copied."""
        return snapshot(self._fleet, self._exchanges, self._models.values(), max(now, self._fleet.now))

    # -- requests (1)

    def _arrived(self, e: ev.RequestArrived) -> None:
        if e.request in self._requests:
            raise LifecycleError(f"the daemon reported request {e.request!r} twice")
        m = self._models.get(e.model)
        if m is None or m.removed:  # 1.1
            self._fleet.reject(e.request, "UnknownModel", f"no model is called {e.model!r}")
            return
        m.costs.arrived(self._fleet.now)
        m.used = self._fleet.now
        self._touch(m)
        if m.state is State.READY and not m.full and not len(m.queue) and not self._policy.in_order:  # 1.2
            self._requests[e.request] = m
            self._fleet.admit(m, e.request)
            return
        if not self._refused(m, e.request):  # 1.3 to 1.6
            self._enqueue(m, e)

    def _refused(self, m: Model, request: str) -> bool:
        refusal = self._full(m) or self._failed(m) or self._impossible(m) or self._busy(m)
        if refusal:
            error, message, retry_after = refusal
            self._fleet.reject(request, error, message, retry_after)
            self._fleet.record("refuse", m.name, message, {"error": error})
        return refusal is not None

    def _full(self, m: Model) -> tuple[str, str, float | None] | None:
        if len(m.queue) >= m.spec.queue_limit:  # 1.3
            return "TooManyRequests", f"{len(m.queue)} requests already wait for {m.name!r}", self._patience(m)
        if self._queued >= self.settings.queue_limit:
            return "TooManyRequests", f"{self._queued} requests already wait on this server", self._patience(m)
        return None

    def _failed(self, m: Model) -> tuple[str, str, float | None] | None:
        if m.state is not State.FAILED:
            return None
        left = m.retry_at - self._fleet.now
        if left > 0 and m.given_up:  # 1.4
            return "EngineFailed", m.failure, left
        if left <= 0:
            self._fleet.forgive(m)
        return None

    def _impossible(self, m: Model) -> tuple[str, str, float | None] | None:
        if m.loaded or len(m.queue):
            return None
        why = never_fits(self._fleet.ledger, m)
        if why:  # 1.5
            return "ModelTooLarge", why, None
        why = pinned_out(self._fleet.ledger, m, self._models.values())
        return ("Unavailable", why, self._patience(m)) if why else None

    def _busy(self, m: Model) -> tuple[str, str, float | None] | None:
        if m.spec.on_busy != "reject" or m.state not in (State.STOPPED, State.SLEEPING) or m.name in self._exchanges:
            return None
        s = self._look()
        w = see_waiting(self._fleet, m)
        idle = [r for r in s.residents if not r.running and not r.queued and r.model != m.name]
        if fits(s, w) is not None or next(choices(s, w, idle, s.knobs.victims), None) is not None:
            return None
        return "Unavailable", f"{m.name!r} needs memory that busy models hold", self._patience(m)  # 1.6

    def _patience(self, m: Model) -> float:
        """Seconds after which coming back makes sense: by then something will have moved."""
        if m.on:
            return max(1.0, m.costs.seconds("service"))
        return max(1.0, m.costs.wake(m.level if m.state is State.SLEEPING else 0))

    def _enqueue(self, m: Model, e: ev.RequestArrived) -> None:
        self._requests[e.request] = m
        m.queue.add(e.request, e.key, self._fleet.now)
        self._queued += 1
        if m.leave and m.leave.yields and m.state is State.DRAINING:
            self._fleet.reopen(m)

    def _finished(self, e: ev.RequestFinished) -> None:
        m = self._requests.pop(e.request, None)
        if m is None:
            return
        m.used = self._fleet.now
        m.orphans.discard(e.request)
        run = m.running.pop(e.request, None)
        if run and m.state in (State.READY, State.DRAINING):
            m.costs.observe("service", self._fleet.now - run.began)
        if run and not m.running:
            m.idle_since = self._fleet.now
            self._replan = True
        self._touch(m)

    def _gone(self, e: ev.RequestGone) -> None:
        m = self._requests.get(e.request)
        if m and e.request in m.queue:
            del self._requests[e.request]
            self._dequeue(m, e.request)
            self._touch(m)
        elif m:
            self._finished(ev.RequestFinished(e.request))

    def _dequeue(self, m: Model, request: str) -> None:
        m.queue.remove(request)
        self._queued -= 1

    def _reject_all(self, m: Model, error: str, message: str, retry_after: float | None = None) -> None:
        m.wanted = None
        for request in list(m.queue):
            self._dequeue(m, request)
            del self._requests[request]
            self._fleet.reject(request, error, message, retry_after)

    def _admit(self, m: Model) -> None:
        while len(m.queue) and not m.full and not (self._policy.in_order and self._older_elsewhere(m)):
            request, _ = m.queue.take()
            self._queued -= 1
            self._fleet.admit(m, request)

    def _older_elsewhere(self, m: Model) -> bool:
        oldest = m.queue.oldest
        others = (other.queue.oldest for other in self._models.values() if other is not m)
        return any(other is not None and oldest is not None and other < oldest for other in others)

    # -- engines (2)

    def _model(self, name: str) -> Model:
        try:
            return self._models[name]
        except KeyError:
            raise LifecycleError(f"the daemon reported on model {name!r}, which is not configured") from None

    def _overtaken(self, m: Model, step: Step) -> bool:
        """A stop has overtaken the command that this answers (2.1)."""
        if m.state is State.STOPPING:
            self._fleet.too_late(m, step)
            return True
        return False

    def _ready(self, e: ev.EngineReady) -> None:
        m = self._model(e.model)
        if self._overtaken(m, Step.READY):
            return
        self._expect(m, State.STARTING, Step.READY)
        if e.footprint:
            m.costs.footprint = Footprint(
                e.footprint.starting, e.footprint.awake, e.footprint.asleep, e.footprint.host, Source.MEASURED
            )
        self._on(m)

    def _awake(self, e: ev.EngineAwake) -> None:
        m = self._model(e.model)
        if not self._overtaken(m, Step.AWAKE):
            self._expect(m, State.WAKING, Step.AWAKE)
            self._on(m)

    def _on(self, m: Model) -> None:
        self._fleet.ready(m)
        m.wanted, m.failure, m.given_up, m.room_retried = None, "", False, False
        self._settled(m)

    def _expect(self, m: Model, state: State, step: Step) -> None:
        if m.state is not state:
            found = f"which is {m.state.value!r}, not {state.value!r}"
            raise LifecycleError(f"the daemon reported {step.value!r} of model {m.name!r}, {found}")

    def _settled(self, m: Model) -> None:
        """Its command is answered: devices are at rest again, and there is news to plan by."""
        self._exchanges.left(m)
        self._touch(m)
        self._replan = True

    def _start_failed(self, e: ev.EngineStartFailed) -> None:
        m = self._model(e.model)
        if self._overtaken(m, Step.START_FAILED):
            return
        self._expect(m, State.STARTING, Step.START_FAILED)
        self._fleet.gone(m, Step.START_FAILED)
        self._settled(m)
        if e.memory and not m.room_retried:  # 2.3
            self._more_room(m, e)
        else:
            self._give_up(m, e.reason)  # 2.4

    def _more_room(self, m: Model, e: ev.EngineStartFailed) -> None:
        """Learn that it needs more, and let the policy make that room, once."""
        m.room_retried, m.failure = True, e.reason
        largest = max((a.capacity for a in self._fleet.ledger.accounts.values()), default=0)
        if e.needed:
            m.costs.asked = max(m.costs.asked, e.needed)
        f = m.footprint
        grown = max(m.booking, min(largest, m.booking * 11 // 10))
        m.costs.footprint = Footprint(grown, f.awake, f.asleep, f.host, f.source)
        self._fleet.forgive(m)
        self._fleet.record("retry", m.name, f"it failed for lack of memory: {e.reason}", {"booking": m.booking})

    def _give_up(self, m: Model, reason: str) -> None:
        m.failures += 1
        m.failure, m.given_up = reason, True
        m.retry_at = self._fleet.now + self._backoff(m)
        self._reject_all(m, "EngineFailed", reason, m.retry_at - self._fleet.now)
        numbers = {"failures": m.failures, "retry_after": m.retry_at - self._fleet.now}
        self._fleet.record("fail", m.name, reason, numbers)

    def _backoff(self, m: Model) -> float:
        return min(LONGEST_BACKOFF, m.spec.restart_backoff * 2.0 ** min(m.failures - 1, 20))

    def _asleep(self, e: ev.EngineAsleep) -> None:
        m = self._model(e.model)
        if not self._overtaken(m, Step.ASLEEP):
            self._expect(m, State.FALLING_ASLEEP, Step.ASLEEP)
            self._fleet.asleep(m, e.level, e.freed)
            self._settled(m)

    def _sleep_failed(self, e: ev.EngineSleepFailed) -> None:
        self._half_done(self._model(e.model), Step.SLEEP_FAILED, f"falling asleep failed: {e.reason}")

    def _wake_failed(self, e: ev.EngineWakeFailed) -> None:
        self._half_done(self._model(e.model), Step.WAKE_FAILED, f"waking failed: {e.reason}")

    def _half_done(self, m: Model, step: Step, why: str) -> None:
        """2.5: its state is unknown; a full stop is the only way back to a known one."""
        if self._overtaken(m, step):
            return
        self._fleet.broke(m, step, why)
        m.sleep_failures += 1
        m.failure = why
        self._fleet.record("stop", m.name, why)

    def _proved(self, e: ev.FreezeProved) -> None:
        m = self._model(e.model)
        step = Step.PROVED if e.survived else Step.DISPROVED
        if self._overtaken(m, step):
            return
        self._expect(m, State.FALLING_ASLEEP, step)
        m.freezes = e.survived
        if e.survived:
            self._on(m)
        else:
            self._fleet.broke(m, step, "a frozen request did not survive; it will only be drained")
        self._fleet.record("prove", m.name, "frozen requests survive" if e.survived else "frozen requests are lost")

    def _stopped(self, e: ev.EngineStopped) -> None:
        m = self._model(e.model)
        devices = m.placement.devices
        self._fleet.gone(m, Step.STOPPED)
        missing = {index: size for index, size in e.missing.items() if index in devices and size > 0}
        if missing:  # 2.6
            self._fleet.ledger.wedge(missing)
            for index in missing:
                self._fleet.record("wedged", m.name, f"device {index}: {self._fleet.ledger.accounts[index].wedged}")
        self._settled(m)
        self._forget_removed(m)

    def _exited(self, e: ev.EngineExited) -> None:
        m = self._model(e.model)
        before, stable = m.state, self._fleet.now - m.ready_at >= STABLE
        self._fleet.gone(m, Step.EXITED)
        self._settled(m)
        if before is State.STARTING:
            self._give_up(m, e.reason)
        elif before is not State.STOPPING:
            self._crashed(m, e.reason, stable)
        self._forget_removed(m)

    def _crashed(self, m: Model, reason: str, stable: bool) -> None:
        """2.7: waiters wait through a bounded number of restarts."""
        if stable:
            m.failures = 0
        if m.failures >= m.spec.max_restarts:
            self._give_up(m, reason)
            return
        m.failures += 1
        m.failure, m.given_up = reason, False
        m.retry_at = self._fleet.now + self._backoff(m)
        numbers = {"failures": m.failures, "retry_after": m.retry_at - self._fleet.now, "waiting": len(m.queue)}
        self._fleet.record("crash", m.name, reason, numbers)

    def _adopted(self, e: ev.EngineAdopted) -> None:
        m = self._model(e.model)
        self._fleet.adopt(m, e.placement, e.level if e.state is State.SLEEPING else 0)
        if e.footprint:
            f = e.footprint
            m.costs.footprint = Footprint(f.starting, f.awake, f.asleep, f.host, Source.MEASURED)
            self._fleet.rebook(m)
        m.idle_since = m.used = self._fleet.now - max(0.0, e.idle)
        m.wanted = None
        self._fleet.record("adopt", m.name, f"found {m.state.value}", {"level": m.level})
        self._settled(m)

    def _sampled(self, e: ev.MemorySampled) -> None:
        self._fleet.ledger.strangers(e.strangers)
        shares: dict[str, dict[int, int]] = {}
        for (name, index), size in e.models.items():
            if size > 0 and name in self._models:
                shares.setdefault(name, {})[index] = size
        for name, share in shares.items():
            self._fleet.measured(self._models[name], share)
        self._replan = self._replan or bool(self._waiting)

    # -- what people ask (3)

    def _load(self, e: ev.LoadAsked) -> None:
        m = self._model(e.model)
        self._touch(m)
        m.asked = None
        if m.leave and m.leave.cause != "exchange" and m.state is State.DRAINING:
            self._fleet.reopen(m)
        if m.state is State.READY:
            return
        if m.state is State.FAILED:
            self._fleet.forgive(m)
        m.wanted = self._fleet.now if m.wanted is None else m.wanted

    def _sleep(self, e: ev.SleepAsked) -> None:
        if e.level not in (1, 2):
            self._stop(ev.StopAsked(e.model))
            return
        m = self._model(e.model)
        m.wanted = None
        self._ask(m, Leave(e.level, "operator", "an operator asked for it", cut_at=self._cut_at(m)))

    def _stop(self, e: ev.StopAsked) -> None:
        m = self._model(e.model)
        self._reject_all(m, "Unavailable", f"{m.name!r} was stopped by an operator", 1.0)
        m.failures, m.failure, m.given_up, m.room_retried, m.sleep_failures = 0, "", False, False, 0
        if m.state is State.FAILED:
            self._fleet.forgive(m)
        if e.force:
            self._force(m)
        else:
            self._ask(m, Leave(0, "operator", "an operator asked for it", cut_at=self._cut_at(m)))

    def _force(self, m: Model) -> None:
        """At once where its devices are at rest or it is the one that moves; else as soon as they are."""
        self._fleet.cut(m, "the model was stopped by force")
        leave = Leave(0, "operator", "an operator forced it", kill=True)
        if m.state is State.STARTING or m.state is State.FALLING_ASLEEP or m.state is State.WAKING:
            self._fleet.stop(m, leave.why, kill=True)
            self._touch(m)
        else:
            self._ask(m, leave)

    def _cut_at(self, m: Model) -> float:
        return INFINITY if m.spec.drain_limit is None else self._fleet.now + m.spec.drain_limit

    def _ask(self, m: Model, leave: Leave) -> None:
        """Have it leave: now if it serves or sleeps, after the command under way if it moves (3.2)."""
        self._touch(m)
        if m.state is State.READY:
            self._fleet.drain(m, leave)
        elif m.state is State.DRAINING:
            m.leave = leave if m.leave is None or not m.exchange or not leave.level else m.leave
        elif m.state is State.SLEEPING and not leave.level:
            m.leave = leave
        elif m.state is State.SLEEPING:
            m.deepen = leave.level > m.level
        elif m.state is State.STARTING and not leave.level and leave.cause == "operator":
            self._fleet.stop(m, leave.why)
        elif m.state in (State.STARTING, State.WAKING, State.FALLING_ASLEEP):
            m.asked = leave

    def _pin(self, e: ev.PinSet) -> None:
        m = self._model(e.model)
        m.pinned = e.pinned
        m.idle_since = max(m.idle_since, self._fleet.now)
        self._touch(m)
        self._replan = True

    def _lease(self, e: ev.LeaseTaken) -> None:
        m = self._model(e.model)
        for other in self._models.values():
            other.leases.pop(e.lease, None)
        m.leases[e.lease] = INFINITY if e.deadline is None else e.deadline
        self._touch(m)

    def _release(self, e: ev.LeaseReleased) -> None:
        for m in self._models.values():
            if e.lease in m.leases:
                self._end_lease(m, e.lease, e.stop)

    def _end_lease(self, m: Model, lease: str, stop: bool) -> None:
        del m.leases[lease]
        m.idle_since = max(m.idle_since, self._fleet.now)
        self._touch(m)
        self._replan = True
        if stop and not m.kept:  # 3.4
            m.wanted = None
            self._ask(m, Leave(0, "lease", f"its last lease, {lease!r}, ended", cut_at=self._cut_at(m)))

    def _changed(self, e: ev.ModelsChanged) -> None:
        specs = {spec.name: spec for spec in e.models}
        for name in [name for name in self._models if name not in specs]:
            self._remove(self._models[name])
        for name, spec in specs.items():
            m = self._models.get(name)
            if m is None:
                self._add(spec)
            else:
                self._respec(m, spec, name in e.restart)

    def _respec(self, m: Model, spec: ModelSpec, restart: bool) -> None:
        if m.pinned == m.spec.pinned:
            m.pinned = spec.pinned
        m.spec, m.removed = spec, False
        self._waiting.pop(m.name, None)
        m.costs = self.costs.open(spec)
        if restart and m.loaded:
            self._ask(m, Leave(0, "config", "its configuration changed", cut_at=self._cut_at(m)))
        self._touch(m)

    def _remove(self, m: Model) -> None:
        m.removed, m.pinned = True, False
        m.leases.clear()
        self._reject_all(m, "UnknownModel", f"{m.name!r} was removed from the configuration")
        if m.loaded:
            self._ask(m, Leave(0, "config", "it was removed from the configuration", cut_at=self._cut_at(m)))
        self._forget_removed(m)

    def _forget_removed(self, m: Model) -> None:
        if m.removed and not m.loaded:
            for known in (self._models, self._waiting, self._leaving, self._touched, self._preload):
                known.pop(m.name, None)
            self._exchanges.cancel(m.name)

    def _add(self, spec: ModelSpec) -> None:
        m = Model(spec, self.costs.open(spec), self._fleet.now)
        m.pinned = spec.pinned
        self._models[spec.name] = m
        if spec.preload:
            self._preload[m.name] = m
            self._preloading = False

    # -- time (4)

    def _passed(self, e: ev.TimePassed) -> None:
        """What is due is looked at after every event; only preloading begins here."""
        self._preloading = True

    def _expire(self) -> None:
        now = self._fleet.now
        for m in [m for m in self._models.values() if m.due <= now]:
            self._touch(m)
            self._overdue_requests(m)
            for lease in [lease for lease, deadline in m.leases.items() if deadline <= now]:
                self._end_lease(m, lease, stop=True)
            if m.state is State.FAILED and m.retry_at <= now and m.demand:  # 4.3
                self._fleet.forgive(m)
                self._fleet.record("restart", m.name, f"{m.demand} wait, and the back-off is over")
            self._rest(m)

    def _overdue_requests(self, m: Model) -> None:
        if m.spec.queue_timeout is None:
            return
        for request in m.queue.late(m.spec.queue_timeout, self._fleet.now):  # 4.1
            self._dequeue(m, request)
            del self._requests[request]
            message = f"{m.name!r} could not be served within {m.spec.queue_timeout:g} s"
            self._fleet.reject(request, "Unavailable", message, self._patience(m))

    def _rest(self, m: Model) -> None:
        """4.4: what an unused model does next, if its time has come."""
        action = rest(m, self._fleet.now)
        if action is Rest.NONE:
            return
        idle = self._fleet.now - m.idle_since
        if action is Rest.STOP:
            self._ask(m, Leave(0, "idle", f"unused for {idle:.0f} s"))
        elif action is Rest.SLEEP:
            self._ask(m, Leave(m.spec.idle.level, "idle", f"unused for {idle:.0f} s"))
        elif self._can_deepen(m):
            m.deepen = True
        else:
            m.look_again = self._fleet.now + DEEPEN_RETRY

    def _can_deepen(self, m: Model) -> bool:
        at_rest = self._fleet.free_to_move(m) and not any(self._exchanges.claim(i) for i in m.placement.devices)
        return at_rest and self._exchanges.room_for(m, m.placement.devices)

    # -- after every event (5)

    def _touch(self, m: Model) -> None:
        self._touched[m.name] = m

    def _advance(self) -> None:
        if self._due <= self._fleet.now:
            self._expire()
        self._review_all()
        if self._leaving or len(self._exchanges):
            self._move()
        if self._waiting and (self._replan or self._fleet.now >= self._looked + TICK):
            self._plan()
        if self._preload and self._preloading:
            self._preload_next()
        self._replan = False
        self._review_all()

    def _preload_next(self) -> None:
        """Load in the order of the configuration what fits beside what is there; nobody leaves for it."""
        for m in list(self._preload.values()):
            if m.state is not State.STOPPED or m.demand:
                del self._preload[m.name]
                continue
            s = self._look()
            devices = fits(s, see_waiting(self._fleet, m))
            if devices is not None and not never_fits(self._fleet.ledger, m):
                del self._preload[m.name]
                self._begin(Plan(m.name, devices, why="it is to be preloaded"))
            elif not any(room.busy or room.claimed for room in s.rooms.values()):
                del self._preload[m.name]
                self._fleet.record("skip", m.name, "it is to be preloaded, but it does not fit beside the others")

    def _review_all(self) -> None:
        if not self._touched:
            return
        while self._touched:
            _, m = self._touched.popitem()
            self._review(m)
        self._due = min((m.due for m in self._models.values()), default=INFINITY)

    def _review(self, m: Model) -> None:
        """Bring everything that hangs on the model's state up to date."""
        if m.state is State.READY:
            self._serve(m)
        elif m.state is State.SLEEPING:
            self._review_sleeper(m)
        wants = m.demand and m.state in (State.STOPPED, State.SLEEPING) and not m.leave
        if wants and m.name not in self._waiting:
            self._wait(m)
        elif not wants:
            self._waiting.pop(m.name, None)
        if m.leave and m.state in (State.DRAINING, State.SLEEPING):
            self._leaving[m.name] = m
        else:
            self._leaving.pop(m.name, None)
        m.due = self._due_of(m)

    def _wait(self, m: Model) -> None:
        """It is wanted and not on; who can never be served is told so (5.2)."""
        why = "" if m.state is State.SLEEPING else never_fits(self._fleet.ledger, m)
        if why:
            self._reject_all(m, "ModelTooLarge", why)
            self._fleet.record("refuse", m.name, why)
            m.failure = why
        else:
            self._waiting[m.name] = m
            self._replan = True

    def _serve(self, m: Model) -> None:
        """5.1: an open gate lets in what waits; then it may have something to do for itself."""
        self._admit(m)
        if m.asked:
            leave, m.asked = m.asked, None
            self._fleet.drain(m, leave)
        elif m.deepen:
            m.deepen = False
            if not m.running:
                self._fleet.drain(m, Leave(2, "deepen", f"unused for {self._fleet.now - m.idle_since:.0f} s"))
        elif m.spec.preempt and m.freezes is None and not m.running and sleep_levels(m) and not m.exchange:
            self._fleet.drain(m, Leave(0, "proof", "freezing is to be proved"))

    def _review_sleeper(self, m: Model) -> None:
        if m.asked:
            leave, m.asked = m.asked, None
            self._ask(m, leave)
        if m.leave and m.demand and m.leave.yields:
            m.leave = None
        m.deepen = m.deepen and not m.demand and not m.leave
        if m.deepen and self._can_deepen(m):
            self._fleet.wake(m)

    def _due_of(self, m: Model) -> float:
        due = min(m.leases.values(), default=INFINITY)
        oldest = m.queue.oldest
        if oldest is not None and m.spec.queue_timeout is not None:
            due = min(due, oldest + m.spec.queue_timeout)
        if m.state is State.FAILED and m.demand:
            due = min(due, m.retry_at)
        if m.leave and m.running and m.state is State.DRAINING:
            limits = (m.leave.cut_at, m.leave.freeze_at if m.freezable else INFINITY)
            due = min(due, *(limit for limit in limits if limit > self._fleet.now), INFINITY)
        if m.deepen and m.state is State.SLEEPING:
            due = min(due, self._fleet.now + DEEPEN_RETRY)
        return min(due, idle_due(m))

    # -- movement (6)

    def _move(self) -> None:
        """Everything that was only waiting for requests to end or for a device to come to rest."""
        for m in list(self._leaving.values()):
            self._depart(m)
        for target in self._exchanges.lapsed():
            self._fleet.record("cancel", target, "nobody waits for it any more")
            for m in self._exchanges.cancel(target):
                self._touch(m)
        for m in self._exchanges.advance():
            self._touch(m)
            self._replan = True

    def _depart(self, m: Model) -> None:
        leave = m.leave
        if leave is None:
            return
        if m.running and m.state is State.DRAINING and not leave.kill:
            self._drained_late(m, leave)
        elif self._fleet.free_to_move(m):
            self._leave_now(m, leave)
            self._touch(m)

    def _drained_late(self, m: Model, leave: Leave) -> None:
        now = self._fleet.now
        level = self._level(m, leave.level)
        if now >= leave.freeze_at and m.freezable and level and self._fleet.free_to_move(m):  # 6.2
            numbers: dict[str, float | int | str] = {"frozen": len(m.running), "for": m.exchange}
            self._fleet.record("freeze", m.name, leave.why, numbers)
            self._fleet.sleep(m, level, freeze=True)
            self._touch(m)
        elif now >= leave.cut_at:  # 6.3
            leave.cut_at = INFINITY
            self._fleet.record("cut", m.name, "its drain limit has passed", {"cut": len(m.running)})
            self._fleet.cut(m, "the model has to leave and its drain limit has passed")
            self._touch(m)

    def _leave_now(self, m: Model, leave: Leave) -> None:
        if leave.cause == "proof":
            self._fleet.prove(m)
            return
        level = self._level(m, leave.level) if m.state is State.DRAINING else 0
        numbers: dict[str, float | int | str] = {"level": level, "idle": round(self._fleet.now - m.idle_since, 3)}
        self._fleet.record("sleep" if level else "stop", m.name, leave.why, numbers)
        if level:
            self._fleet.sleep(m, level)
        else:
            self._fleet.stop(m, leave.why, leave.kill)

    def _level(self, m: Model, wish: int) -> int:
        """The level wished for, the other one where that cannot be, or 0: stop."""
        usable = levels(self._fleet, m, self._shallow)
        if wish == 0 or wish in usable:
            return wish
        return usable[0] if usable else 0

    def _plan(self) -> None:
        """7: ask the policy until it has nothing more to begin."""
        self._looked = self._fleet.now
        for m in [m for m in self._waiting.values() if m.state is State.SLEEPING and m.name not in self._exchanges]:
            self._move_house(m)
        for _ in range(len(self._waiting) + 1):
            plan = self._policy.choose(self._look())
            if plan is None:
                return
            self._begin(plan)

    def _move_house(self, m: Model) -> None:
        """7.1: a sleeper that cannot wake where it sleeps is stopped, if it can start elsewhere."""
        why = "" if m.running else stuck(self._fleet.ledger, m, self._models.values())
        if why:
            m.leave = Leave(0, "moved", why)
            self._touch(m)

    def _begin(self, plan: Plan) -> None:
        m = self._models[plan.target]
        self._touch(m)
        verb = "wake" if m.state is State.SLEEPING else "start"
        numbers: dict[str, float | int | str] = {**plan.numbers, "devices": ",".join(map(str, plan.devices))}
        if plan.victims:
            numbers["victims"] = ",".join(f"{v.model}:{v.way.level or 'stop'}" for v in plan.victims)
            numbers["drain"] = plan.drain
            self._fleet.record("exchange", m.name, f"{verb} it: {plan.why}", numbers)
        else:
            self._fleet.record(verb, m.name, plan.why, numbers)
        self._exchanges.begin(plan)
        for victim in plan.victims:
            self._touch(self._models[victim.model])
        self._review_all()
        self._move()
        self._review_all()

    def _look(self) -> Situation:
        if self._fleet.now >= self._filled + FILL_AGE:
            self._filled = self._fleet.now
            claims = host_claims(self._fleet, self._models.values())
            self._shallow = self._policy.shallow(claims, self.settings.host_memory)
        waiting = [m for m in self._waiting.values() if m.name not in self._exchanges]
        return look(self._fleet, self._exchanges, waiting, self._models.values(), self._shallow)

    def _stalled(self) -> bool:
        return len(self._waiting) > len(self._exchanges)


_HANDLERS: dict[type, Callable[[Scheduler, Any], None]] = {
    ev.RequestArrived: Scheduler._arrived,
    ev.RequestFinished: Scheduler._finished,
    ev.RequestGone: Scheduler._gone,
    ev.EngineReady: Scheduler._ready,
    ev.EngineStartFailed: Scheduler._start_failed,
    ev.EngineAsleep: Scheduler._asleep,
    ev.EngineSleepFailed: Scheduler._sleep_failed,
    ev.EngineAwake: Scheduler._awake,
    ev.EngineWakeFailed: Scheduler._wake_failed,
    ev.EngineStopped: Scheduler._stopped,
    ev.EngineExited: Scheduler._exited,
    ev.EngineAdopted: Scheduler._adopted,
    ev.FreezeProved: Scheduler._proved,
    ev.MemorySampled: Scheduler._sampled,
    ev.LoadAsked: Scheduler._load,
    ev.SleepAsked: Scheduler._sleep,
    ev.StopAsked: Scheduler._stop,
    ev.PinSet: Scheduler._pin,
    ev.LeaseTaken: Scheduler._lease,
    ev.LeaseReleased: Scheduler._release,
    ev.ModelsChanged: Scheduler._changed,
    ev.TimePassed: Scheduler._passed,
}
