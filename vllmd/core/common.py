"""What the parts of the scheduler share: the models, the fleet, and the list of models that need a fresh look."""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.core.costs import CostBook
from vllmd.core.exchanges import Exchanges
from vllmd.core.fleet import Fleet
from vllmd.core.group import Group
from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import LifecycleError
from vllmd.core.model import INFINITY, Leave, Model
from vllmd.core.policy import Policy
from vllmd.core.types import Device, Settings, State


class Core:
    """One per scheduler. Its parts change a model, then touch it; what follows from that is the scheduler's."""

    def __init__(self, devices: Iterable[Device], settings: Settings, costs: CostBook, policy: Policy) -> None:
        self.settings = settings
        self.costs = costs
        self.policy = policy
        self.fleet = Fleet(Ledger(devices, settings.host_memory))
        self.models: dict[str, Model] = {}
        self.exchanges = Exchanges(self.fleet, self.models)
        self.groups: dict[str, Group] = {}  # by the name that clients use
        self.unkept: dict[str, Group] = {}  # whose upkeep is due: something about a replica changed
        self.touched: dict[str, Model] = {}
        self.waiting: dict[str, Model] = {}  # wanted, and neither on nor on their way
        self.replan = False  # something happened that the policy should see at once

    @property
    def now(self) -> float:
        """The time of the event being handled."""
        return self.fleet.now

    def touch(self, m: Model) -> None:
        """Something about ``m`` changed."""
        self.touched[m.name] = m

    def news(self, m: Model) -> None:
        """Something about ``m`` changed that the policy should see at once."""
        self.touched[m.name] = m
        self.replan = True

    def group_of(self, m: Model) -> Group | None:
        """The group of a replica."""
        return self.groups.get(m.spec.replica_of) if m.spec.replica_of else None

    def model(self, name: str) -> Model:
        """The model of that name. Raises LifecycleError: the daemon should have known better."""
        try:
            return self.models[name]
        except KeyError:
            raise LifecycleError(f"the daemon reported on model {name!r}, which is not configured") from None

    def cut_at(self, m: Model) -> float:
        """When requests still running in a drain that begins now are cut."""
        return INFINITY if m.spec.drain_limit is None else self.now + m.spec.drain_limit

    def leave(self, m: Model, leave: Leave) -> None:
        """Have it leave: now if it serves or sleeps, after the command under way if it moves.

        Frozen requests are not lost: their engine wakes first, and drains.
        """
        self.touch(m)
        if m.state is State.READY:
            self.fleet.drain(m, leave)
        elif m.state is State.DRAINING:
            m.leave = leave if leave.level == 0 or not m.exchange else m.leave
        elif m.state is State.SLEEPING and not (m.running and not leave.kill):
            self._leave_asleep(m, leave)
        elif m.state is State.STARTING and leave.cause == "operator" and not leave.level:
            self.fleet.stop(m, leave.why)
        elif m.loaded and m.state is not State.STOPPING:
            m.asked = leave

    def _leave_asleep(self, m: Model, leave: Leave) -> None:
        if leave.level:
            m.deepen = leave.level > m.level
        else:
            m.leave = leave

    def stay(self, m: Model) -> None:
        """It is to be kept: what would have made it leave, and can still be called off, is."""
        if m.leave and m.leave.cause == "exchange":
            for victim in self.exchanges.cancel(m.exchange):
                self.news(victim)
        elif m.leave and m.state is State.DRAINING:
            self.fleet.reopen(m)
        elif m.leave and m.state is State.SLEEPING:
            m.leave = None
        self.news(m)
