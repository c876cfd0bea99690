"""handle(event, now) -> commands: the front of the core.

``design.md`` has the decision tree as numbered prose; the same numbers stand
in the comments of the rooms: 1 ``admission``, 2 ``answers``, 3 ``wishes``,
4 and 5 here, 6 ``departures``, 7 ``planner``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllmd.core import events as ev
from vllmd.core.admission import Admission
from vllmd.core.answers import Answers
from vllmd.core.commands import Command
from vllmd.core.common import Core
from vllmd.core.costs import CostBook
from vllmd.core.departures import DEEPEN_RETRY, Departures
from vllmd.core.devices import Devices
from vllmd.core.idle import idle_due
from vllmd.core.model import INFINITY, Leave, Model, Replica, Standing
from vllmd.core.planner import Planner
from vllmd.core.policies import POLICIES
from vllmd.core.policy import Policy
from vllmd.core.possible import never_fits
from vllmd.core.replicas import Replicas
from vllmd.core.situation import sleep_levels
from vllmd.core.types import Device, ModelSpec, Settings, Snapshot, State
from vllmd.core.views import snapshot
from vllmd.core.wishes import Wishes

DEFAULTS = Settings()


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
        self._core = Core(devices, settings, self.costs, policy or POLICIES[settings.policy])
        self._planner = Planner(self._core, self._settle)
        self._replicas = Replicas(self._core, self._planner)
        self._admission = Admission(self._core, self._planner, self._replicas)
        self._answers = Answers(self._core, self._admission)
        self._wishes = Wishes(self._core, self._admission, self._replicas)
        self._departures = Departures(self._core, self._planner)
        self._devices = Devices(self._core, self._admission)
        self._due = INFINITY  # the least of all models' due
        self._due_passed = False  # it was that of a model which is due later now, or gone
        self._handlers = self._rooms()
        self._wishes.begin(models)

    # -- the public face

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """What is to be done because of ``event``. Raises LifecycleError, nothing changed, if it cannot have been."""
        fleet = self._core.fleet
        fleet.now = max(now, fleet.now)
        self._handlers[type(event)](event)
        if self._due <= fleet.now:
            self._expire()
        self._settle()
        self._planner.plan()
        if self._wishes.preload and self._wishes.preloading:
            self._planner.preload(self._wishes.preload)
        while self._replicas.upkeep():
            self._settle()
        self._core.replan = False
        return fleet.collect()

    def next_timer(self) -> float | None:
        """When it wants ``TimePassed`` if nothing else happens before."""
        if self._wishes.preload and not self._wishes.preloading:
            return self._core.now
        due = min(self._due, self._planner.due, self._replicas.due)
        return None if due == INFINITY else due

    def snapshot(self, now: float) -> Snapshot:
        """Everything worth showing, copied."""
        core = self._core
        return snapshot(core, max(now, core.now))

    def _rooms(self) -> dict[type, Callable[[Any], None]]:
        """Who handles which event."""
        return {
            ev.RequestArrived: self._admission.arrived,
            ev.RequestAnswered: self._admission.answered,
            ev.RequestFinished: self._admission.finished,
            ev.RequestGone: self._admission.gone,
            ev.EngineReady: self._answers.ready,
            ev.EngineStartFailed: self._answers.start_failed,
            ev.EngineAsleep: self._answers.asleep,
            ev.EngineSleepFailed: self._answers.sleep_failed,
            ev.EngineAwake: self._answers.awake,
            ev.EngineWakeFailed: self._answers.wake_failed,
            ev.EngineStopped: self._answers.stopped,
            ev.EngineExited: self._answers.exited,
            ev.ServerSilent: self._replicas.silent,
            ev.EngineAdopted: self._answers.adopted,
            ev.FreezeProved: self._answers.proved,
            ev.ReplicaProbed: self._replicas.probed,
            ev.ProbeAsked: self._replicas.asked,
            ev.MemorySampled: self._answers.sampled,
            ev.DevicesChanged: self._devices.changed,
            ev.DevicesTroubled: self._devices.troubled,
            ev.DeviceDrained: self._devices.drained,
            ev.LoadAsked: self._wishes.load,
            ev.SleepAsked: self._wishes.sleep,
            ev.StopAsked: self._wishes.stop,
            ev.PinSet: self._wishes.pin,
            ev.LeaseTaken: self._wishes.lease,
            ev.LeaseReleased: self._wishes.release,
            ev.ModelsChanged: self._wishes.changed,
            ev.TimePassed: self._passed,
        }

    # -- time (4)

    def _passed(self, _: ev.TimePassed) -> None:
        """What is due is looked at after every event; only preloading begins here."""
        self._wishes.preloading = True

    def _expire(self) -> None:
        now = self._core.now
        for m in [m for m in self._core.models.values() if m.due <= now]:
            self._core.touch(m)
            self._admission.expire(m)  # 4.1
            for lease in [lease for lease, deadline in m.leases.items() if deadline <= now]:
                self._wishes.end_lease(m, lease, stop=True)  # 4.2
            if m.state is State.FAILED and m.retry_at <= now and m.demand:  # 4.3
                self._core.fleet.forgive(m)
                self._core.fleet.record("restart", m.name, f"{m.demand} wait, and the back-off is over")
            self._replicas.share_age(m)
            self._departures.age(m)  # 4.4

    def _due_of(self, m: Model) -> float:
        """When time alone next changes something for ``m``; what only waits for others is not in it."""
        due = idle_due(m)
        if m.leases:
            due = min(due, *m.leases.values())
        oldest = m.queue.oldest
        if oldest is not None:
            due = min(due, oldest + (INFINITY if m.spec.queue_timeout is None else m.spec.queue_timeout))
            due = min(due, m.retry_at) if m.state is State.FAILED else due
        if m.leave and m.running and m.state is State.DRAINING:
            due = min(due, self._press_due(m, m.leave))
        return min(due, self._core.now + DEEPEN_RETRY) if m.deepen and m.state is State.SLEEPING else due

    def _press_due(self, m: Model, leave: Leave) -> float:
        limits = (leave.cut_at, leave.freeze_at if m.freezable else INFINITY)
        return min((limit for limit in limits if limit > self._core.now), default=INFINITY)

    # -- after every event (5)

    def _settle(self) -> None:
        """Everything that follows, without the policy, from what was touched."""
        core = self._core
        while core.touched:
            self._review_touched()
            self._departures.advance()
            for target in core.exchanges.lapsed():
                core.fleet.record("cancel", target, "nobody waits for it any more")
                for m in core.exchanges.cancel(target):
                    core.touch(m)
            for m in core.exchanges.advance():
                core.news(m)

    def _review_touched(self) -> None:
        core = self._core
        if core.policy.in_order:
            core.touched.update((m.name, m) for m in core.models.values() if len(m.queue))
        while core.touched:
            _, m = core.touched.popitem()
            self._review(m)
        if self._due_passed:
            self._due_passed = False
            self._due = min([m.due for m in core.models.values()], default=INFINITY)

    def _review(self, m: Model) -> None:
        """Bring everything that hangs on the model's state up to date."""
        if m.state is State.READY:
            self._serve(m)
        elif m.state is State.SLEEPING:
            self._review_sleeper(m)
        if m.removed and not m.loaded:
            self._forget(m)
            return
        if m.replica:
            self._review_replica(m, m.replica)
        wanted = m.demand and m.state in (State.STOPPED, State.SLEEPING) and not m.leave
        if not wanted:
            self._core.waiting.pop(m.name, None)
        elif m.name not in self._core.waiting:
            self._wait(m)
        self._departures.note(m)
        self._planner.observer.note(m)
        self._note_due(m, self._due_of(m))

    def _note_due(self, m: Model, due: float) -> None:
        """Keep the least of all: it is only sought anew where the model that had it has it no more."""
        self._due_passed = self._due_passed or m.due <= self._due < due
        self._due = min(self._due, due)
        m.due = due

    def _review_replica(self, m: Model, r: Replica) -> None:
        """5.5: its group's upkeep is due; who waits for one that does not serve is handed over."""
        group = self._core.group_of(m)
        if group:
            self._core.unkept[group.name] = group
        if len(m.queue) and (m.state is State.FAILED or r.standing is Standing.EJECTED):
            self._admission.hand_over(m)

    def _serve(self, m: Model) -> None:
        """5.1: an open gate lets in what waits; then it may have something to do for itself."""
        self._admission.admit(m)
        if m.asked:
            leave, m.asked = m.asked, None
            self._core.fleet.drain(m, leave)
        elif m.deepen:
            m.deepen = False
            if not m.running:
                self._core.fleet.drain(m, Leave(2, "deepen", f"unused for {self._core.now - m.idle_since:.0f} s"))
        elif self._proof_is_due(m):
            self._core.fleet.drain(m, Leave(0, "proof", "freezing is to be proved"))

    def _proof_is_due(self, m: Model) -> bool:
        """5.4: at the first moment when it is idle, nobody else moves there, and sleeping is something it can do."""
        if not m.spec.preempt or m.freezes is not None or m.running or not sleep_levels(m):
            return False
        return self._core.fleet.free_to_move(m)

    def _review_sleeper(self, m: Model) -> None:
        """5.3: a request calls off what a sleeper was to do for itself."""
        if m.asked and not m.running:
            leave, m.asked = m.asked, None
            self._core.leave(m, leave)
        if m.leave and m.leave.yields and m.demand:
            m.leave = None
        m.deepen = m.deepen and not m.demand and not m.leave
        if m.deepen and self._departures.can_deepen(m):
            self._core.fleet.wake(m)

    def _wait(self, m: Model) -> None:
        """5.2: it is wanted and not on; who can never be served is told so."""
        core, ledger = self._core, self._core.fleet.ledger
        if ledger.unknown and m.spec.device_count:  # 9.1
            if not ledger.asking:
                self._admission.forsake(m, "Unavailable", ledger.unknown, 5.0)
            return
        why = "" if m.state is State.SLEEPING else never_fits(ledger, m)
        if why:
            self._admission.forsake(m, "ModelTooLarge", why)
            core.fleet.record("refuse", m.name, why)
            m.failure = why
        else:
            core.waiting[m.name] = m
            core.replan = True

    def _forget(self, m: Model) -> None:
        core = self._core
        self._note_due(m, INFINITY)
        core.models.pop(m.name, None)
        core.waiting.pop(m.name, None)
        core.exchanges.cancel(m.name)
        self._departures.drop(m)
        self._planner.observer.note(m)
