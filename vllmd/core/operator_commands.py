"""What operators ask: load, sleep, stop, pins, leases, a new configuration (3 in ``design.md``).

All of it is of a model or of one replica, by name. An operator's word becomes a *job* of the replica, which is merged
into what happens to it already (``jobs.py``); nothing here touches an engine. So the order in which operators, clients
and idle rules come matters in one place only, the table of merges.
"""

from __future__ import annotations

from vllmd.core import events as ev
from vllmd.core.admission import Admission, Refusal
from vllmd.core.balancing import in_flight
from vllmd.core.commands import AddReplica, RejectReason
from vllmd.core.common import Core
from vllmd.core.devices import Devices
from vllmd.core.lifecycle import BY_HAND, OWN, Kind, Reason
from vllmd.core.model import INFINITY, Health, HealthStatus, Job, Lease, Model, Replica
from vllmd.core.policies import POLICIES
from vllmd.core.scaling import Scaling
from vllmd.core.types import ModelSpec, ReplicaSpec, Settings, State, renamed

UP = frozenset({State.READY, State.STARTING, State.WAKING})
GONE = frozenset({State.STOPPED, State.FAILED})
CALLED_OFF = OWN | {Reason.SWAP, Reason.LEASE, Reason.MOVED}  # by a pin or a lease
BY_OPERATOR = "an operator asked for it"


class OperatorCommands:
    """What operators ask is done; running requests end first, unless it is forced."""

    def __init__(self, core: Core, admission: Admission, scaling: Scaling, devices: Devices) -> None:
        self._core = core
        self._admission = admission
        self._scaling = scaling
        self._devices = devices
        self._adding: dict[tuple[str, int], list[str]] = {}  # model, device -> who asked for one more replica there
        self.preload: dict[Replica, None] = {}  # to be loaded where they fit, in order
        self.preloading = False  # not before TimePassed: what already runs is adopted first

    # -- load, sleep, stop

    def load(self, e: ev.LoadAsked) -> None:
        """3.1: of several replicas one is wanted as by a request, the others where they fit beside what is there."""
        replicas = [r for r in self._core.named(e.model) if not r.disabled_because]
        if not replicas:
            why = self._core.named(e.model)[0].disabled_because
            self._core.engines.answer(e.ask, refused=f"{e.model} is disabled: {why}")
            return
        rules = replicas[0].model.rules
        if e.device is not None:
            self._load_on(replicas[0].model, e.device, e.ask)
            return
        surely = next((r for r in replicas if r.state in UP), replicas[0])
        why = self._core.fit.never(surely) if surely.at_rest else ""
        self._core.engines.answer(e.ask, surely.id, why, RejectReason.MODEL_TOO_LARGE)
        for r in [r for r in replicas if r.state in GONE]:
            r.bound = None
        for r in replicas[: rules.least] if rules else replicas:
            self._load(r, beside=r is not surely)

    def _load_on(self, model: Model, device: int, ask: str) -> None:
        """3.1: the replica that is there or on its way there; else one at rest; else one more is asked for."""
        engines, refused = self._core.engines, [self._off_limits(r.spec, device) for r in model.replicas]
        if all(refused):
            engines.answer(ask, refused=refused[0], error=RejectReason.BAD_REQUEST)
            return
        able = [r for r in model.replicas if not r.disabled_because]
        coming = [r for r in able if r.devices == (device,) and r.demand]  # wanted, and can come up only there
        there = next((r for r in able if device in r.placement.devices or r in coming), None)
        spare = (r for r in able if r.state in GONE and not r.demand)
        r = there or next((r for r in spare if can_be_on(r.spec, device)), None)
        if r is None:
            asks = self._adding.setdefault((model.name, device), [])
            if not asks:
                engines.hint(AddReplica(model.name, device))
            asks.append(ask)
            return
        if r is not there:
            r.bound = device
        engines.answer(ask, r.id)
        self._load(r, beside=False)

    def _off_limits(self, spec: ReplicaSpec, device: int) -> str:
        """Why the engine cannot be put on that device alone; "" if it can."""
        known = sorted(i for i, account in self._core.engines.ledger.accounts.items() if not account.gone)
        if device not in known:
            there = f"there are {', '.join(map(str, known))}" if known else "there are none on this machine"
            return f"there is no GPU {device}; {there}"
        if spec.devices and device not in spec.devices:
            return f"{spec.id} may use the GPUs {', '.join(map(str, spec.devices))} only"
        return "" if spec.device_count == 1 else f"{spec.id} takes {spec.device_count} GPUs and cannot be put on one"

    def refused(self, e: ev.ReplicaRefused) -> None:
        """The daemon did not give the model one more replica: all operators that asked for it are told why."""
        for ask in self._adding.pop((e.model, e.device), ()):
            self._core.engines.answer(ask, refused=e.reason)

    def _load(self, r: Replica, *, beside: bool) -> None:
        """Have it come up; ``beside``: only where nobody leaves for it. A failure's back-off does not count."""
        self._core.mark_news(r)
        self._scaling.resume(r)
        if r.state is State.FAILED:
            self._core.engines.forgive(r)
        if beside:
            self._scaling.bring_up_soon(r)
            if r.job and r.job.reason in OWN | BY_HAND:
                self._core.engines.call_off(r)
            return
        self._core.engines.ask(r, Job(Kind.START, Reason.OPERATOR, BY_OPERATOR, self._core.now))

    def sleep(self, e: ev.SleepAsked) -> None:
        """3.2: put each of the named replicas to sleep; level 3 stops it, and so does any for one that is disabled."""
        replicas, why = self._core.named(e.model), ""
        if e.level in (1, 2) and all(r.state in GONE for r in replicas):
            why = f"{e.model} cannot be put to sleep: it is not loaded ({replicas[0].state.value})"
        self._core.engines.answer(e.ask, refused=why)
        for r in replicas:
            if e.level not in (1, 2) or r.disabled_because:
                self._stop(r, force=False)
                continue
            self._scaling.halt(r)
            self._core.send_away(r, Reason.OPERATOR, BY_OPERATOR, e.level)

    def stop(self, e: ev.StopAsked) -> None:
        """3.3: who waits now is told; who comes later starts it anew. A failure is forgotten."""
        model, replicas = self._core.models.get(e.model), self._core.named(e.model)
        if e.device is not None:
            present = [r for r in replicas if r.state is not State.STOPPED]
            there = [r for r in present if e.device in r.placement.devices or not r.placement.devices]
            model, replicas = (model, replicas) if len(there) == len(present) else (None, there)
        if model:
            why = f"{model.name!r} was stopped by an operator"
            self._admission.reject_queue(model, Refusal(RejectReason.UNAVAILABLE, why, 1.0))
        for r in replicas:
            self._stop(r, e.force)

    def _stop(self, r: Replica, force: bool) -> None:
        r.bound = None
        self._scaling.halt(r)
        self._admission.reject_waiters(r, RejectReason.UNAVAILABLE, f"{r.id!r} was stopped by an operator", 1.0)
        r.failures, r.failure, r.sleep_failures = 0, "", 0
        if r.state is State.FAILED:
            self._core.engines.forgive(r)
        if not force:
            self._core.send_away(r, Reason.OPERATOR, BY_OPERATOR)
            return
        self._core.engines.cut(r, "the model was stopped by force")
        # At once if it is the engine whose command is under way; else as soon as its devices are at rest.
        self._core.engines.ask(r, Job(Kind.STOP, Reason.OPERATOR, "an operator forced it", self._core.now, force=True))

    # -- in use or not

    def disable(self, e: ev.ModelDisabled) -> None:
        """3.8: who waits and who comes is told the operator's words; what runs comes to its end, and it is stopped.

        Said again it is done again: a daemon that has just adopted its engines is told of the orders of an earlier one.
        """
        core, model, replicas = self._core, self._core.models.get(e.model), self._core.named(e.model)
        if model:
            model.disabled = e.message
        else:
            replicas[0].disabled = e.message
        core.engines.record("disable", model or replicas[0], e.message)
        if model:
            self._admission.reject_queue(model, Refusal(RejectReason.DISABLED, e.message))
        for r in replicas:
            self.preload.pop(r, None)
            self._stop(r, force=False)

    def enable(self, e: ev.ModelEnabled) -> None:
        """3.8: nothing is loaded by this but what is to be preloaded; a model's replicas are all given back with it."""
        core, model, replicas = self._core, self._core.models.get(e.model), self._core.named(e.model)
        if model:
            model.disabled = ""
        for r in replicas:
            r.disabled = ""
        core.engines.record("enable", model or replicas[0], "an operator gave it back")
        for r in replicas:
            if r.disabled_because:
                continue
            self._scaling.resume(r)
            if r.spec.preload and not r.loaded:
                self._preload_later(r)
            core.mark_news(r)

    # -- pins and leases

    def pin(self, e: ev.PinSet) -> None:
        """3.4: a pinned replica is no victim, and no idle rule touches it."""
        for r in self._core.named(e.model):
            r.pinned = e.pinned
            r.idle_since = max(r.idle_since, self._core.now)
            self._keep(r)

    def lease(self, e: ev.LeaseTaken) -> None:
        """3.5: kept until its deadline; of several replicas one that serves, else the first."""
        replicas = self._core.named(e.model)
        healthy = (HealthStatus.SERVING, HealthStatus.SLOW)
        serving = [r for r in replicas if r.state is State.READY and (not r.health or r.health.status in healthy)]
        kept = next((r for r in serving if e.lease in r.leases), next(iter(serving), replicas[0]))
        for model in self._core.models.values():
            if e.lease in model.leases and model.leases[e.lease].replica is not kept:
                self.end_lease(model, e.lease, stop=False)
        lease = Lease(INFINITY if e.deadline is None else e.deadline, kept)
        kept.model.leases = {**kept.model.leases, e.lease: lease}
        self._keep(kept)

    def _keep(self, r: Replica) -> None:
        self._core.mark_news(r)
        jobs = (r.job, r.job.then) if r.job else ()
        if r.kept and any(job and job.leaves and job.reason in CALLED_OFF for job in jobs):
            self._core.stay(r)

    def release(self, e: ev.LeaseReleased) -> None:
        """A lease is given back before its deadline."""
        for model in [model for model in self._core.models.values() if e.lease in model.leases]:
            self.end_lease(model, e.lease, e.stop)

    def end_lease(self, model: Model, lease: str, stop: bool) -> None:
        """3.5: the last one to go may stop the replica; its idle age counts from here."""
        r = model.leases[lease].replica
        model.leases = {name: each for name, each in model.leases.items() if name != lease}
        r.idle_since = max(r.idle_since, self._core.now)
        self._core.mark_news(r)
        if stop and not r.kept:
            self._core.send_away(r, Reason.LEASE, f"its last lease, {lease!r}, ended")

    # -- configuration

    def changed(self, e: ev.ModelsChanged) -> None:
        """3.6: new ones are added, changed ones know it, those gone drain, stop and are forgotten."""
        core, used = self._core, [why for name in sorted(e.unless_used) if (why := self._used(name))]
        core.engines.answer(e.ask, refused="; ".join(used))
        if used:
            return
        if e.devices:  # first: nothing may be put on a device that is about to be another one
            self._devices.changed(e.devices)
        if e.settings and e.settings != core.settings:
            self._take_settings(e.settings)
        specs = {spec.name: spec for spec in e.models}
        for model in [model for name, model in core.models.items() if name not in specs]:
            if core.at_rest(model):
                self._drop(model)
                continue
            why = f"{model.name!r} was removed from the configuration"
            self._admission.reject_queue(model, Refusal(RejectReason.UNKNOWN_MODEL, why))
            gone, model.replicas, model.disabled = model.replicas, (), ""
            for r in gone:
                self._retire(r)
        for spec in specs.values():
            self.take(spec, e.restart)
        if list(core.models) != list(specs):
            order = {name: place for place, name in enumerate(specs)}
            core.models = dict(sorted(core.models.items(), key=lambda item: order.get(item[0], len(order))))
        core.regroup()

    def _take_settings(self, settings: Settings) -> None:
        """3.7: what was begun goes on."""
        core = self._core
        if settings.policy != core.settings.policy:
            core.policy = POLICIES[settings.policy]
        core.settings = settings
        core.engines.ledger.host_budget = settings.host_memory
        for model in core.models.values():
            if core.at_rest(model):
                model.unused_view = None
            else:
                for r in (*model.replicas, *model.retired):
                    core.mark_news(r)

    def _used(self, name: str) -> str:
        """How a model, or a replica by its id, is in use; "" if it is not, or has failed."""
        model, r = self._core.models.get(name), self._core.replicas.get(name)
        if model and any(each.state is not State.FAILED for each in model.replicas):
            number = len(model.queue) + sum(map(in_flight, (*model.replicas, *model.retired)))
            return f"{name} is in use ({number} requests, {len(model.leases)} leases)" if number or model.leases else ""
        return f"{name} is {r.state.value}" if r and not model and (r.loaded or r.demand) else ""

    def take(self, spec: ModelSpec, restart: frozenset[str] = frozenset()) -> None:
        """A model, new or known, is to be like this. Of ten thousand nearly all are at rest, and stay so."""
        core = self._core
        model = core.models.get(spec.name)
        if model is None:
            model = core.models[spec.name] = Model(spec)
            done = self._add_at_rest(model, spec)
        else:
            done = core.at_rest(model) and (model.spec is spec or self._respec_at_rest(model, spec))
        if not done:
            self._configure(model, spec, restart)

    def _configure(self, model: Model, spec: ModelSpec, restart: frozenset[str]) -> None:
        """Each replica that stays keeps its engine.

        The first replica of a model that gets replicas, or loses them, is called something else then: it goes on.
        """
        core, model.spec = self._core, spec
        names = renamed([r.id for r in model.replicas], [each.id for each in spec.replicas])
        if names:
            core.rename(core.replicas[names[0]], names[1])
            core.replicas[names[1]].disabled = ""  # that was said of one of several, by its id
        known = {r.id: r for r in (*model.retired, *model.replicas)}
        retired, replicas = set(model.retired), []
        for each in spec.replicas:
            r = known.pop(each.id, None)
            if r is None:
                r = self._add(model, each)
                core.mark_for_review(r)
            else:
                self._respec(r, each, each.id in restart)
            r.health = (r.health or Health()) if spec.balancing else None
            replicas.append(r)
        model.replicas = tuple(replicas)
        model.scale_by(spec.balancing)
        model.retired = tuple([r for r in known.values() if r in retired])
        for r in known.values():
            self._retire(r)
        model.nominee = None if spec.balancing else replicas[0]
        for r in replicas if self._adding else ():
            asks = self._adding.pop((model.name, r.spec.devices[0]), []) if len(r.spec.devices) == 1 else []
            if asks:
                self._load(r, beside=False)
            for ask in asks:
                core.engines.answer(ask, r.id)

    def _add_at_rest(self, model: Model, spec: ModelSpec) -> bool:
        """Give a new model its only replica. Nobody wants it yet, so there is nothing to review; returns whether so."""
        if len(spec.replicas) != 1 or spec.balancing or self._adding:
            return False
        model.nominee = r = self._add(model, spec.replicas[0])
        model.replicas = (r,)
        return True

    def _drop(self, model: Model) -> None:
        """Forget a model at rest that the configuration has no more: nothing but these knows its replica."""
        (r,), model.replicas, model.nominee = model.replicas, (), None
        self.preload.pop(r, None)
        self._core.replicas.pop(r.id, None)
        self._core.for_review.pop(model, None)
        del self._core.models[model.name]

    def _respec_at_rest(self, model: Model, spec: ModelSpec) -> bool:
        """Take the specification of a model at rest, if it keeps its only replica. Returns whether it was taken."""
        is_same = len(spec.replicas) == 1 and model.replicas[0].id == spec.replicas[0].id
        if not is_same or spec.balancing or self._adding:
            return False
        model.spec = spec
        self._respec(model.replicas[0], spec.replicas[0], restart=False)
        return True

    def _add(self, model: Model, spec: ReplicaSpec) -> Replica:
        """A replica that the configuration did not have before."""
        r = Replica(model, spec, self._core.costs, self._core.now)
        r.learnt = r.book.known(spec)
        r.pinned = spec.pinned
        self._core.replicas[r.id] = r
        if spec.preload:
            self._preload_later(r)
        return r

    def _preload_later(self, r: Replica) -> None:
        """Preload the replica with the next ``TimePassed``: engines that run already are adopted first."""
        self.preload[r] = None
        self.preloading = False

    def _respec(self, r: Replica, spec: ReplicaSpec, restart: bool) -> None:
        """A replica that is known has this specification from now on; ``restart``: its engine cannot go on with it."""
        if r.pinned == r.spec.pinned:  # an operator's pin outlives a reload
            r.pinned = spec.pinned
        if spec.preload and not r.spec.preload and not r.loaded:
            self._preload_later(r)
        r.take(spec)
        r.bound = r.bound if r.bound is not None and can_be_on(spec, r.bound) else None
        if r not in self._core.active and not r.model.rules:
            r.model.unused_view = None
            return
        self._core.waiting.pop(r, None)  # it is looked at again whether it can fit
        self._core.mark_news(r)
        if restart:
            self._core.send_away(r, Reason.CONFIG, "its configuration changed")

    def _retire(self, r: Replica) -> None:
        """The configuration has it no more: it leaves for good."""
        if r not in r.model.retired:
            r.model.retired = (*r.model.retired, r)
        r.pinned, r.disabled = False, ""
        if r.leases:
            r.model.leases = {name: lease for name, lease in r.model.leases.items() if lease.replica is not r}
        self.preload.pop(r, None)
        self._admission.reject_waiters(r, RejectReason.UNKNOWN_MODEL, f"{r.id!r} was removed from the configuration")
        self._core.send_away(r, Reason.CONFIG, "it was removed from the configuration")


def can_be_on(spec: ReplicaSpec, device: int) -> bool:
    """Whether the engine can be put on that device alone."""
    return spec.device_count == 1 and (not spec.devices or device in spec.devices)
