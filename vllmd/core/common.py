"""What the parts of the scheduler share: the models, the engines, and the list of models that need a fresh look."""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.core.costs import CostBook
from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit
from vllmd.core.idle import rules_due
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import Job, LifecycleError, Reason
from vllmd.core.model import INFINITY, Model, Replica
from vllmd.core.policy import Policy
from vllmd.core.swaps import Swaps
from vllmd.core.timers import Timers
from vllmd.core.types import Device, Settings, State


class Core:
    """One per scheduler. Its parts change a replica, then mark it dirty; what follows from that is the scheduler's."""

    def __init__(self, devices: Iterable[Device], settings: Settings, costs: CostBook, policy: Policy) -> None:
        self.settings = settings
        self.costs = costs
        self.policy = policy
        self.engines = EngineTable(Ledger(devices, settings.host_memory))
        self.timers = Timers()
        self.models: dict[str, Model] = {}
        self.replicas: dict[str, Replica] = {}  # of all models, by id
        self.fit = Fit(self.engines.ledger, self.replicas)
        self.swaps = Swaps(self.engines, self.replicas, self.fit)
        self.balanced: list[Model] = []  # those whose replicas share their requests by rules
        self.dirty: dict[Model, None] = {}  # what follows from a change of these is still to be found
        self.active: dict[Replica, None] = {}  # those that have an engine, had one that failed, or are wanted
        self.changed: dict[Replica, None] = {}  # since the policy last looked
        self.unkept: dict[Model, None] = {}  # whose health and number of replicas are to be looked at
        self.waiting: dict[Replica, None] = {}  # wanted, and neither on nor on their way
        self.replan = False  # something happened that the policy should see at once

    @property
    def now(self) -> float:
        """The time of the event being handled."""
        return self.engines.now

    def mark_request(self, m: Replica) -> None:
        """A request has begun or ended in ``m``. Where nothing else goes on there, all that follows is done here.

        That is the case of nearly every request: the engine serves, nobody waits, nothing keeps the replica or is to
        happen to it. Then only the policy sees that one more or less runs, and the idle rules that it is used or not.
        """
        model = m.model
        if m.job or model.queue or model.leases or model.spec.balancing or m.state is not State.READY:
            self.dirty[model] = None
            return
        if not m.running and (m.spec.preempt or self.policy.in_order):  # freezing may be to be proved; others may wait
            self.dirty[model] = None
            return
        self.changed[m] = None
        self.timers.set(m, INFINITY if m.running or m.pinned else rules_due(m))

    def forgive(self, m: Replica) -> None:
        """A failed one may be started again."""
        self.engines.forgive(m)
        self.mark_dirty(m)

    def mark_dirty(self, m: Replica) -> None:
        """Something about it, or about its model, changed."""
        self.dirty[m.model] = None

    def mark_urgent(self, m: Replica) -> None:
        """Something about it changed that the policy should see at once."""
        self.dirty[m.model] = None
        self.replan = True

    def replica(self, name: str) -> Replica:
        """The replica of that id. Raises LifecycleError: the daemon should have known better."""
        try:
            return self.replicas[name]
        except KeyError:
            raise LifecycleError(f"the daemon reported on the engine {name!r}, which is not configured") from None

    def named(self, name: str) -> list[Replica]:
        """The replicas of a model, or the one of that id. Raises LifecycleError."""
        model = self.models.get(name)
        return model.replicas or model.retired if model else [self.replica(name)]

    def rename(self, r: Replica, name: str) -> None:
        """It has another id from now on, and its figures as well."""
        del self.replicas[r.id]
        self.costs.rename(r.id, name)
        self.replicas[name] = r
        self.engines.rename(r, name)

    def regroup(self) -> None:
        """The models are others than before."""
        self.balanced = [model for model in self.models.values() if model.rules]
        self.unkept.update(dict.fromkeys(self.balanced))

    def cut_at(self, m: Replica) -> float:
        """When requests still running in a drain that begins now are cut."""
        return INFINITY if m.spec.drain_limit is None else self.now + m.spec.drain_limit

    def ask(self, m: Replica, job: Job) -> None:
        """This is to happen to it, now or after what is under way."""
        self.mark_dirty(m)
        self.engines.ask(m, job)

    def stay(self, m: Replica) -> None:
        """It is to be kept: what would have made it leave, and can still be called off, is."""
        if m.job and m.job.target and m.job.reason is Reason.SWAP:
            for victim in self.swaps.cancel(m.job.target):
                self.mark_urgent(victim)
        else:
            self.engines.call_off(m)
        self.mark_urgent(m)
