"""What the parts of the scheduler share: the models, the engines, and the list of models that need a fresh look."""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.core.costs import CostBook
from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit
from vllmd.core.idle import rules_due
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import Kind, LifecycleError, Reason
from vllmd.core.model import INFINITY, Job, Model, Replica
from vllmd.core.policy import Policy
from vllmd.core.swaps import Swaps
from vllmd.core.timers import Timers
from vllmd.core.types import READY, Device, Settings


class Core:
    """One per scheduler. Whoever changes a replica marks it for review; what follows from that the scheduler finds."""

    def __init__(self, devices: Iterable[Device], settings: Settings, costs: CostBook, policy: Policy) -> None:
        self.settings = settings
        self.costs = costs
        self.policy = policy
        self.engines = EngineTable(Ledger(devices, settings.host_memory))
        self.timers = Timers()
        self.models: dict[str, Model] = {}
        self.replicas: dict[str, Replica] = {}  # of all models, by id
        self.active: dict[Replica, None] = {}  # those that have an engine, had one that failed, or are wanted
        self.fit = Fit(self.engines.ledger, self.active, self.engines.moving)
        self.swaps = Swaps(self.engines, self.replicas, self.fit)
        self.balanced: list[Model] = []  # those whose replicas share their requests by rules
        self.for_review = self.engines.for_review
        self.changed: dict[Replica, None] = {}  # since the policy last looked
        self.used: dict[Replica, None] = {}  # since then requests began or ended in these; that is no change of theirs
        self.for_upkeep: dict[Model, None] = {}  # whose health and number of replicas are to be looked at
        self.waiting: dict[Replica, None] = {}  # wanted, and neither on nor on their way
        self.news: dict[Replica, None] = {}  # what happened to these the policy should see at once
        self.news_for_all = False  # and what happened in this event may concern everybody who waits

    @property
    def now(self) -> float:
        """The time of the event being handled."""
        return self.engines.now

    def mark_request(self, r: Replica) -> None:
        """A request has begun or ended in ``r``. Where nothing else goes on there, all that follows is done here.

        That is the case of nearly every request (``only_serves``). Then only the policy sees that one more or less
        runs, and the idle rules that it is used or not.
        """
        proves = r.spec.preempt and not r.running  # it may be the moment for that
        if proves or not self.only_serves(r):
            self.for_review[r.model] = None
        else:
            self.note_use(r, INFINITY if r.running or r.pinned else rules_due(r))

    def only_serves(self, r: Replica) -> bool:
        """Whether it serves, and nothing else goes on there: nobody waits, nothing keeps it or is to happen to it."""
        model = r.model
        return r.state is READY and not (r.job or model.queue or model.leases or model.spec.balancing)

    def note_use(self, r: Replica, due: float) -> None:
        """All that follows from a request that begins or ends in a replica that only serves, which rests at ``due``."""
        self.used[r] = None
        if due != r.due:
            self.timers.set(r, due)

    def mark_for_review(self, r: Replica) -> None:
        """Something about it, or about its model, changed: what follows from that is found before the event is over."""
        self.for_review[r.model] = None

    def mark_news(self, r: Replica) -> None:
        """The same; and the policy is asked at once, if that is news for anybody who waits."""
        self.for_review[r.model] = None
        self.news[r] = None

    def replica(self, name: str) -> Replica:
        """The replica of that id. Raises LifecycleError: the daemon should have known better."""
        try:
            return self.replicas[name]
        except KeyError:
            raise LifecycleError(f"the daemon reported on the engine {name!r}, which is not configured") from None

    def named(self, name: str) -> list[Replica]:
        """The replicas of a model, or the one of that id. Raises LifecycleError."""
        model = self.models.get(name)
        return list(model.replicas or model.retired) if model else [self.replica(name)]

    def at_rest(self, model: Model) -> bool:
        """Whether it has one replica, of which nothing runs, and nothing waits for it or keeps it: most have that."""
        if model.retired or model.leases or model.queue or model.spec.balancing or len(model.replicas) != 1:
            return False
        return model.replicas[0] not in self.active

    def rename(self, r: Replica, name: str) -> None:
        """Give the replica, and what was learnt of it, another id."""
        del self.replicas[r.id]
        self.costs.rename(r.id, name)
        self.replicas[name] = r
        self.engines.rename(r, name)

    def regroup(self) -> None:
        """The models are others than before."""
        self.balanced = [model for model in self.models.values() if model.rules]
        self.for_upkeep.update(dict.fromkeys(self.balanced))

    def send_away(self, r: Replica, reason: Reason, why: str, level: int = 0) -> None:
        """Have it put to sleep at ``level``, or stopped (0), once it has drained or its drain limit has passed."""
        kind, cut_at = Kind.SLEEP if level else Kind.STOP, self.now + r.drain_limit
        self.engines.ask(r, Job(kind, reason, why, self.now, level, cut_at=cut_at))

    def stay(self, r: Replica) -> None:
        """Keep the replica: what would have made it leave is called off where that can still be done."""
        if r.job and r.job.target and r.job.reason is Reason.SWAP:
            self.swaps.cancel(r.job.target)
        else:
            self.engines.call_off(r)
        self.mark_news(r)
