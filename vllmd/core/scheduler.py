"""The front of the core: ``handle(event, now)`` takes one event and returns the commands that follow from it.

Theory of operation. An event changes state in the one file that owns it (``_handlers_by_event`` says which). What
*follows* from the change is found here, in three rounds that are the same for every event:

1. *Review* (5): the handler has marked the models whose state, queue or rules changed. Each of them is looked at once:
   open gates admit what waits, a replica that is wanted and not on joins those who wait for the policy, a job that can
   go on does. A review may change other models (a failed nominee passes its queue on), so it runs until none is marked.
   It ends because each mark stands for a step of a life or a request that left a queue, and neither can be undone by a
   review; where two rules could undo each other (a nominee that is called back and sent away again), the rule that
   nominates says why it does not.
2. *Leaving and swaps* (6): engines whose last request has ended go, and a swap whose victims are gone starts its
   target. Both mark models again, so the first round comes again. Together the two are :meth:`_settle`.
3. *The policy* (7, 8): only once everything has settled, because it must not see a queue that is about to be served or
   memory that is about to be free. It is asked one plan at a time, and what a plan sets in motion settles before it is
   asked again: the next plan sees the last one's claims.

A request to a ready model, nine tenths of all events, must cost microseconds: it marks nothing (``Core.mark_request``),
so all three rounds are skipped, and timers are looked at only where the first one is due. Where nothing else is under
way at all it takes the *short way*: ``admit_at_once`` and ``finish_at_once`` change what the event would change, and
say that nothing else follows. They decide nothing that ``handle`` would decide differently (``tests/core`` holds them
against each other), and change nothing where they cannot tell.

``design.md`` has the decision tree as numbered prose; the same numbers stand in the comments of the files:
1 ``admission``, 2 ``engine_events``, 3 ``operator_commands``, 4 and 5 here, 6 ``unloading``, 7 ``planner``,
8 ``balancing``, ``health``, ``scaling``, 9 ``devices``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllmd.core import events as ev
from vllmd.core import preview
from vllmd.core.admission import Admission
from vllmd.core.balancing import Balancer, best
from vllmd.core.commands import Command, RejectReason
from vllmd.core.common import Core
from vllmd.core.costs import CostBook
from vllmd.core.devices import Devices
from vllmd.core.engine_events import EngineEvents
from vllmd.core.health import HealthChecks
from vllmd.core.idle import idle_due
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import INFINITY, Job, Model, Replica
from vllmd.core.operator_commands import OperatorCommands
from vllmd.core.planner import Planner
from vllmd.core.policies import POLICIES
from vllmd.core.policy import Policy
from vllmd.core.policy_input import sleep_levels
from vllmd.core.scaling import Scaling
from vllmd.core.types import Device, ModelSpec, ReplicaView, Settings, Snapshot, State
from vllmd.core.unloading import DEEPEN_RETRY, Unloading
from vllmd.core.views import draw_unused, snapshot

DEFAULTS = Settings()


class Scheduler:
    """Decides everything about models and memory. Not thread-safe: one loop owns it.

    ``core`` and ``planner`` are its state. A program posts events and reads snapshots; only what checks
    the invariants (``tests/core/world.py``) looks there.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec],
        devices: Iterable[Device],
        settings: Settings = DEFAULTS,
        costs: CostBook | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.costs = costs or CostBook()
        core = self.core = Core(devices, settings, self.costs, policy or POLICIES[settings.policy])
        self.planner = Planner(core)
        self._health = HealthChecks(core)
        self._scaling = Scaling(core, self.planner, self._health)
        self._admission = Admission(core, self.planner, Balancer(core.engines, core.swaps, core.fit), self._health)
        self._engine_events = EngineEvents(core, self._admission)
        self._devices = Devices(core, self._admission)
        self._operator = OperatorCommands(core, self._admission, self._scaling, self._devices)
        self._unloading = Unloading(core, self.planner)
        self.handlers = self._handlers_by_event()
        self.is_quiet = False  # after the last event there was nothing for the policy to look at, now or by and by
        for spec in models:
            self._operator.take(spec)
        core.regroup()

    # -- the public face

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """The commands that follow from ``event``. Raises LifecycleError, nothing changed, if it cannot be."""
        core, engines = self.core, self.core.engines
        self.is_quiet = False  # also where this fails
        if now > engines.now:
            engines.now = now
        self.handlers[type(event)](event)
        if core.timers.none_before <= engines.now:
            self._expire()
        if core.for_review:
            self._settle()
        if self.anything_to_begin() or (engines.displaced and (core.news_for_all or core.news)):
            for _ in self.planner.plan():  # 7
                self._settle()
            if self._operator.preload and self._operator.preloading:
                for _ in self.planner.preload(self._operator.preload):  # 7.2
                    self._settle()
            for _ in self._scaling.upkeep():  # 8.3 to 8.5
                self._settle()
        core.news_for_all = False
        core.news.clear()
        engines.stirred.clear()
        self.is_quiet = not (self.anything_to_begin() or engines.displaced)
        return engines.collect()

    def anything_to_begin(self) -> bool:
        """Whether a model waits, has several replicas, or is to be preloaded or moved: the policy is to look."""
        core = self.core
        return bool(core.waiting or core.balanced or self._operator.preload or self.planner.held_back)

    # -- the short way of nearly every request

    def admit_at_once(self, request: str, name: str, now: float) -> str | None:
        """Admit a request whose model only serves, while nothing else is to be done: the replica that has it now.

        It is what ``handle`` would come to, without an event, a command, and the rounds that would find nothing to do.
        None, and nothing has changed, in every other case: then ``handle`` decides.
        """
        return self._admission.admit_at_once(request, name) if self._is_calm(now) else None

    def finish_at_once(self, request: str, now: float) -> bool:
        """The same for the end of a request that did not fail: whether it is noted, or ``handle`` is to hear of it."""
        return self._is_calm(now) and self._admission.finish_at_once(request)

    def _is_calm(self, now: float) -> bool:
        """Whether time brings nothing, and the policy has nothing to look at; the core's time is ``now`` then."""
        core = self.core
        engines = core.engines
        if now < engines.now:
            now = engines.now
        if not self.is_quiet or core.timers.none_before <= now:
            return False
        engines.now = now
        return True

    def next_timer(self) -> float | None:
        """The moment at which the daemon is to post ``TimePassed`` if nothing else happens before; None: never."""
        if self._operator.preload and not self._operator.preloading:
            return self.core.now
        core = self.core
        due = core.timers.due
        if core.waiting:
            due = min(due, self.planner.due)
        if core.balanced:
            due = min(due, self._scaling.due)
        return None if due == INFINITY else due

    def wants_time_before(self, moment: float) -> bool:
        """Whether ``next_timer`` may be earlier than that; cheap where only requests come and go."""
        if self.is_quiet:
            return self.core.timers.none_before < moment
        due = self.next_timer()
        return due is not None and due < moment

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """The models as they are configured, by name."""
        return {name: model.spec for name, model in self.core.models.items()}

    @property
    def holds_orders(self) -> bool:
        """Whether there are orders that end with this daemon: a device is drained, a model pinned or leased."""
        core = self.core
        return bool(core.engines.ledger.drained) or any(
            model.leases or any(r.pinned != r.spec.pinned for r in model.replicas) for model in core.models.values()
        )

    def snapshot(self, now: float) -> Snapshot:
        """Everything worth showing, copied: models with their replicas, devices, decisions."""
        core = self.core
        return snapshot(core, self.planner, max(now, core.now), core.models.values())

    def draw_ahead(self, models: int) -> Iterator[None]:
        """Draw the views of models that nobody has used, so many at a time: a snapshot then costs little.

        Of ten thousand models they take longer than a stream should wait. Events may be handled between.
        """
        undrawn = [model for model in self.core.models.values() if model.unused_view is None]
        for number, model in enumerate(undrawn, 1):
            draw_unused(self.core, model)
            if number % models == 0:
                yield

    def activity(self, now: float) -> Snapshot:
        """The same of those models only of which something runs, is wanted, or has failed: cheap, however many rest."""
        core = self.core
        models = dict.fromkeys([r.model for r in core.active])
        return snapshot(core, self.planner, max(now, core.now), models)

    def replicas_of(self, name: str, now: float) -> list[ReplicaView]:
        """How each engine of the model stands, or the one of that id; none if nothing is called so."""
        return self.snapshot_of(name, now).replicas_of(name)

    def snapshot_of(self, name: str, now: float) -> Snapshot:
        """The snapshot of one model alone, by its name or a replica's id; of none if nothing is called so."""
        core, r = self.core, self.core.replicas.get(name)
        model = core.models.get(name) or (r.model if r else None)
        return snapshot(core, self.planner, max(now, core.now), [model] if model else [])

    def would_load(self, name: str) -> preview.Loading:
        """What a load of the model, or of the replica of that id, would do as things stand. Raises LifecycleError."""
        return preview.load(self.core, self.planner, name)

    def would_leave(self, name: str, level: int) -> tuple[preview.Leaving, ...]:
        """What putting it to sleep at ``level``, or stopping it (0), would do. Raises LifecycleError."""
        return preview.leave(self.core, self.planner, name, level)

    def would_drain(self, device: int) -> tuple[preview.Leaving, ...]:
        """What draining the device would do."""
        return preview.drained(self.core, self.planner, device)

    def foremost(self, model: str) -> tuple[str, State]:
        """The replica of the model that is nearest to serving, and its state: what a client waits for.

        Cheap, unlike ``snapshot``: it may be asked for every waiting client. ``("", STOPPED)`` for no such model.
        """
        known = self.core.models.get(model)
        if not known or not known.replicas:
            return "", State.STOPPED
        r = best(known.replicas)
        return r.id, r.state

    def _handlers_by_event(self) -> dict[type, Callable[[Any], None]]:
        """The function that handles each type of event: a new event needs a line here."""
        return {
            ev.RequestArrived: self._admission.arrived,
            ev.RequestAnswered: self._admission.answered,
            ev.RequestFinished: self._admission.finished,
            ev.RequestGone: self._admission.gone,
            ev.PoolAsked: self._admission.pooled,
            ev.EngineReady: self._engine_events.ready,
            ev.EngineStartFailed: self._engine_events.start_failed,
            ev.EngineAsleep: self._engine_events.asleep,
            ev.EngineSleepFailed: self._engine_events.sleep_failed,
            ev.EngineAwake: self._engine_events.awake,
            ev.EngineWakeFailed: self._engine_events.wake_failed,
            ev.EngineStopped: self._engine_events.stopped,
            ev.EngineExited: self._engine_events.exited,
            ev.ServerSilent: self._health.silent,
            ev.EngineAdopted: self._engine_events.adopted,
            ev.FailureRemembered: self._engine_events.remembered,
            ev.FreezeProved: self._engine_events.proved,
            ev.StartProgressed: self._engine_events.progressed,
            ev.ReplicaProbed: self._health.probed,
            ev.ProbeAsked: self._health.asked,
            ev.MemorySampled: self._engine_events.sampled,
            ev.StandbysHeld: self._engine_events.standbys,
            ev.DevicesChanged: self._devices.changed,
            ev.DevicesTroubled: self._devices.troubled,
            ev.DeviceDrained: self._devices.drained,
            ev.LoadAsked: self._operator.load,
            ev.ReplicaRefused: self._operator.refused,
            ev.SleepAsked: self._operator.sleep,
            ev.StopAsked: self._operator.stop,
            ev.PinSet: self._operator.pin,
            ev.ModelDisabled: self._operator.disable,
            ev.ModelEnabled: self._operator.enable,
            ev.LeaseTaken: self._operator.lease,
            ev.LeaseReleased: self._operator.release,
            ev.KeptAlive: self._unloading.kept_alive,
            ev.MachineSlept: self._unloading.slept,
            ev.ModelsChanged: self._operator.changed,
            ev.TimePassed: self._passed,
        }

    # -- time (4)

    def _passed(self, _: ev.TimePassed) -> None:
        """Models may be preloaded from now on. Timers that are due are looked at after every event, not only here."""
        self._operator.preloading = True

    def _expire(self) -> None:
        """Act on each replica whose timer is due."""
        engines, now = self.core.engines, self.core.now
        for r in self.core.timers.expired(now):
            model = r.model
            self.core.mark_for_review(r)
            self._admission.expire(model)  # 4.1
            for lease in [name for name, lease in model.leases.items() if lease.deadline <= now]:
                self._operator.end_lease(model, lease, stop=True)  # 4.2
            if r.state is State.FAILED and r.retry_at <= now and r.demand:  # 4.3
                engines.forgive(r)
                engines.record("restart", r, f"{r.demand} wait, and the back-off is over")
            self._scaling.share_age(r)
            self._unloading.age(r)  # 4.4

    def due_of(self, r: Replica) -> float:
        """The next moment at which time alone changes something for ``r``, whatever other replicas do."""
        due, model, now = idle_due(r), r.model, self.core.now
        if model.leases:
            due = min([due, *[lease.deadline for lease in model.leases.values()]])
        oldest = model.queue.oldest
        if oldest is not None:
            timeout = model.spec.queue_timeout
            due = min(due, oldest + (INFINITY if timeout is None else timeout))
            due = min(due, r.retry_at) if r.state is State.FAILED and model.nominee is r else due
        job = r.job
        if job and r.running and r.state is State.DRAINING:  # what runs is frozen or cut then; a moment that has
            limits = (job.cut_at, job.freeze_at if r.freezable else INFINITY)  # passed was acted on, or cannot be
            due = min([due, *[limit for limit in limits if limit > now]])
        # Room in which to sleep deeper may come with any other engine's leaving, which marks no review of this one.
        deepens = job and job.kind is Kind.SLEEP and r.state is State.SLEEPING
        return min(due, now + DEEPEN_RETRY) if deepens else due

    # -- after every event (5)

    def _settle(self) -> None:
        """Review the models marked for it, let engines leave, and go on with swaps, until nothing is left to do."""
        core = self.core
        while core.for_review:
            while core.for_review:
                model, _ = core.for_review.popitem()
                self._review(model)
            if core.engines.leaving:
                self._unloading.advance()
            if not len(core.swaps):
                continue
            for target, why in core.swaps.lapsed().items():
                core.engines.record("cancel", target, why)
                core.swaps.cancel(target)
            for r in core.swaps.advance():
                core.mark_news(r)

    def _review(self, model: Model) -> None:
        """5: serve the model's queue, and see to each of its replicas. One without replicas is forgotten."""
        model.unused_view = None
        if model.queue:
            self._admission.serve(model)  # 5.1
        if model.rules:
            self.core.for_upkeep[model] = None  # 5.5
        for r in (*model.replicas, *model.retired) if model.retired else model.replicas:
            self._review_replica(r)
        if not model.replicas and not model.retired:
            del self.core.models[model.name]

    def _review_replica(self, r: Replica) -> None:
        """Have it do what its state and its job allow, and note anew whether it waits, is active, and its timer."""
        core = self.core
        if r.state is State.READY:
            self._review_ready(r)
        elif r.state is State.SLEEPING:
            self._review_sleeper(r)
        if not r.loaded and r.removed:
            self._forget(r)
            return
        waits = r.demand and r.state in (State.STOPPED, State.SLEEPING) and not r.leaving
        if not waits:
            core.waiting.pop(r, None)
        elif r not in core.waiting:
            self._wait(r)
        if r.state is not State.STOPPED or r.demand:
            core.active[r] = None
        else:
            core.active.pop(r, None)
        core.changed[r] = None
        core.timers.set(r, self.due_of(r))

    def _review_ready(self, r: Replica) -> None:
        """A replica that serves, and has let in what waits, drains for its job, or proves freezing."""
        engines, job = self.core.engines, r.job
        if job:
            if job.yields and r.running:
                engines.call_off(r)
            else:
                engines.drain(r)
            return
        if not r.spec.preempt or r.freezes is not None or r.running or r.demand or not sleep_levels(r):
            return
        if engines.free_to_move(r):  # 5.4
            engines.ask(r, Job(Kind.PROVE, Reason.PROOF, "freezing is to be proved", self.core.now))

    def _review_sleeper(self, r: Replica) -> None:
        """5.3: requests call off a sleeper's job; one that is to sleep deeper wakes for that once there is room."""
        engines = self.core.engines
        engines.thaw(r)
        if r.demand and r.job and (r.job.yields or r.job.kind is Kind.SLEEP):
            engines.call_off(r)
        if r.job and r.job.kind is Kind.SLEEP and self._unloading.can_deepen(r):
            engines.wake(r)

    def _wait(self, r: Replica) -> None:
        """5.2: it waits for the policy from now on. If it can never fit, everybody who waits for it is told so."""
        core, unknown = self.core, self.core.fit.unknown(r)
        if unknown:  # 9.1
            if not core.engines.ledger.asking:
                self._admission.reject_waiters(r, RejectReason.UNAVAILABLE, unknown, 5.0)
            return
        why = core.fit.never(r)
        if why:
            self._admission.reject_waiters(r, RejectReason.MODEL_TOO_LARGE, why)
            core.engines.record("refuse", r, why)
        else:
            core.waiting[r] = None
            core.news[r] = None

    def _forget(self, r: Replica) -> None:
        """The configuration has the replica no more, and its engine is gone: nothing is left of it."""
        core = self.core
        r.model.retired = tuple([each for each in r.model.retired if each is not r])
        r.model.nominee = None if r.model.nominee is r else r.model.nominee  # nothing leads back to it
        core.replicas.pop(r.id, None)
        core.waiting.pop(r, None)
        core.swaps.cancel(r)
        core.active.pop(r, None)
        core.timers.set(r, INFINITY)
        core.changed[r] = None
