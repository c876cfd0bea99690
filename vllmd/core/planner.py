"""Asks the policy when there is reason to, and begins what it says (7 in ``design.md``).

When is there reason to? A look at a crowded machine costs more than everything else that an event leads to, and most
events are no news for anybody who waits. So the policy is asked

- at news: what happened to one who waits, or on a device on which it could come up (``_is_news_for_a_waiter``);
- and every ``LOOK_INTERVAL`` while anything waits. Two things have no event of their own. Patience runs out: a deadline
  passes, a drain limit comes into reach, an idle model has been spared long enough. Each of those moments could be
  computed, but it moves with every request of every victim, so that a timer for it would be set anew more often than it
  rings. And arrivals at models that run change what a victim costs. Both are slow beside a quarter of a second, and a
  swap takes seconds.

What is begun is settled before the policy is asked again, which is why ``plan`` and ``preload`` are generators: each
``yield`` is a step after which ``Scheduler`` finds what follows.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllmd.core.common import Core
from vllmd.core.fit import fits
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import INFINITY, Job, Replica
from vllmd.core.policies import tidy
from vllmd.core.policy import Outlook, Plan, PolicyInput, running_there
from vllmd.core.policy_input import PolicyInputBuilder, levels, sleep_deep, waited_since
from vllmd.core.types import State

LOOK_INTERVAL = 0.25  # seconds between two looks while anything waits
LEVEL_1_CHOICE_AGE = 5.0  # seconds that the choice of level-1 sleepers stands; three times as long cost a tenth of p99
RECENT = 10.0  # seconds for which it is believed what others leave free, where nobody waits for it
PRELOADED = "it is to be preloaded"
RELOCATE_EVERY = 1.0  # seconds between two looks for sleepers that must move


class Planner:
    """When to ask the policy, what it sees, and what becomes of its plans."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.builder = PolicyInputBuilder(core.engines, core.swaps, core.fit, core.changed, core.used)
        self._looked_at = -INFINITY
        self._level_1_chosen_at = -INFINITY
        self._relocated_at = -INFINITY
        self.deep: frozenset[str] = frozenset()  # ids of replicas that do not sleep at level 1
        self.held_back: frozenset[Replica] = frozenset()  # who was recorded to wait for others to leave a device free

    @property
    def due(self) -> float:
        """When the policy is to be asked again if nothing happens; infinite while all that wait have a swap."""
        return self._looked_at + LOOK_INTERVAL if len(self._core.waiting) > len(self._core.swaps) else INFINITY

    def plan(self) -> Iterator[None]:
        """7: ask the policy, where there is reason to, until it has no plan, and begin each."""
        core = self._core
        if not core.waiting:
            self.held_back = frozenset()
            # 7.4: while nobody waits, models that are being used are moved to where they fit beside each other.
            idle = core.engines.displaced and core.policy.moves and not len(core.swaps)
            if idle and (core.news_for_all or core.news) and len(core.engines.ledger.accounts) > 1:
                plan = tidy(self.look())
                if plan:
                    self.begin(plan)
                    yield
        if not core.waiting:
            return
        if not (core.news_for_all or core.now >= self._looked_at + LOOK_INTERVAL or self._is_news_for_a_waiter()):
            return
        self._looked_at = core.now
        yield from self._relocate()
        for _ in range(len(core.waiting) + 1):
            plan = core.policy.choose(self.look())
            if plan is None:
                break
            self.begin(plan)
            yield
        self._record_held_back()

    def _is_news_for_a_waiter(self) -> bool:
        """Whether what happened is news of one that waits, or of a device on which it could come up.

        On a large machine most of what happens is not: nobody waits for that device. What time alone changes, or what
        all who wait have in common, is seen at the next look.
        """
        core, engines = self._core, self._core.engines
        if not core.news and not engines.stirred:
            return False
        devices = engines.stirred.union(*[r.placement.devices for r in core.news])
        sleepers = []
        for r in core.waiting:
            asleep = r.state is State.SLEEPING
            here = r.placement.devices if asleep else r.devices or devices
            if r in core.news or (r not in core.swaps and not devices.isdisjoint(here)):
                return True
            if asleep and r not in core.swaps:
                sleepers.append(r)
        return core.fit.any_could_move(sleepers, devices)

    def _relocate(self) -> Iterator[None]:
        """7.1: a sleeper that cannot wake where it sleeps is stopped, if it can start elsewhere."""
        core = self._core
        if core.now < self._relocated_at + RELOCATE_EVERY:
            return
        sleepers = [r for r in core.waiting if r.state is State.SLEEPING and not r.running and r not in core.swaps]
        if not sleepers:
            return
        self._relocated_at = core.now
        for r, why in core.fit.stuck(sleepers).items():
            core.engines.ask(r, Job(Kind.STOP, Reason.MOVED, why, core.now))
        yield

    def _record_held_back(self) -> None:
        """7.3: who waits for others to leave a device free; once, not with each look."""
        core, before = self._core, self.held_back
        picky = [r for r in core.waiting if r.spec.when_free]
        if not picky and not before:
            return
        held = {r: wait for r in picky if (wait := core.fit.held_back(r, waited_since(r, core.now)))}
        self.held_back = frozenset(r for r, wait in held.items() if not wait.unread)
        for r in [r for r in held if r in self.held_back and r not in before]:
            core.engines.record("wait", r, f"it waits for {held[r].why}", held[r].numbers)

    def begin(self, plan: Plan) -> None:
        """Record the plan, close the gates, and start what can start."""
        core = self._core
        r = core.replicas[plan.target]
        moves = any(v.model == r.id for v in plan.victims)
        what = "wake" if r.state is State.SLEEPING else "start"
        numbers: dict[str, float | int | str] = {**plan.numbers, "devices": ",".join(map(str, plan.devices))}
        if plan.victims:
            numbers["victims"] = ",".join(f"{v.model}:{v.option.level or 'stop'}" for v in plan.victims)
            numbers["drain"] = "unlimited" if plan.drain == INFINITY else plan.drain
            core.engines.record("swap", r, f"{'move' if moves else what} it: {plan.why}", numbers)
        else:
            core.engines.record(what, r, plan.why, numbers)
        core.swaps.begin(plan)
        core.mark_for_review(r)

    def start_beside(
        self, r: Replica, reason: Reason, why: str, since: float, but: frozenset[int] = frozenset()
    ) -> bool:
        """Have it serve where it fits beside what is there; nobody leaves for it. Returns whether that could be begun.

        ``since``: from when readings of the devices must be, if it starts only where others leave them free.
        ``but``: devices that it shall not use.
        """
        if self._core.fit.unknown(r):
            return False
        devices = fits(self.look(), self.builder.see_newcomer(r, since).without(but))
        if devices is None or self._core.fit.never(r):
            return False
        self._core.engines.ask(r, Job(Kind.START, reason, why, self._core.now))
        self.begin(Plan(r.id, devices, why=why))
        return True

    def preload(self, todo: dict[Replica, None]) -> Iterator[None]:
        """7.2: load, in order, what fits beside what is there; nobody leaves for it.

        One that starts only on free devices is wanted from now on where others leave it none.
        """
        core = self._core
        for r in list(todo):
            if core.fit.unknown(r):
                continue
            if r.state is not State.STOPPED or r.demand or r.disabled_because:
                del todo[r]
            elif self.start_beside(r, Reason.PRELOAD, PRELOADED, -INFINITY):
                del todo[r]
                yield
            elif self.builder.see_newcomer(r, since=-INFINITY).held_back:
                del todo[r]
                core.engines.ask(r, Job(Kind.START, Reason.PRELOAD, PRELOADED, core.now))
                yield
                yield from self.plan()
            elif not any(supply.until or supply.claimed for supply in self.look().supplies.values()):
                del todo[r]
                core.engines.record("skip", r, "it is to be preloaded, but does not fit beside the others")

    def look(self) -> PolicyInput:
        """What the policy sees now, to decide by."""
        self._choose_level_1()
        return self.preview()

    def preview(self) -> PolicyInput:
        """What the policy would see, to tell others: looking changes nothing of what is decided."""
        begun = self._core.swaps.targets()
        return self.builder.look([r for r in self._core.waiting if r not in begun], self.deep)

    def _choose_level_1(self) -> None:
        """Choose anew which replicas sleep at level 1, of those that have an engine or are wanted."""
        core = self._core
        if core.now < self._level_1_chosen_at + LEVEL_1_CHOICE_AGE:
            return
        self._level_1_chosen_at = core.now
        running = sum(r.spec.host_running for r in core.active if core.engines.ledger.host_held(r))
        self.deep = sleep_deep(core.engines, core.active, core.settings.host_memory - running)

    def outlook(self, r: Replica, s: PolicyInput | None = None) -> Outlook | None:
        """What a replica that is wanted and not on waits for, and how long; None where that cannot be said.

        ``s``: what :meth:`preview` gave, where several are asked about.
        """
        core = self._core
        swap = core.swaps.get(r)
        if swap:
            seconds = core.swaps.until_served(swap)
            leaving = ", ".join(v.id for v in swap.victims if v is not r)
            running = running_there(sum(len(v.running) for v in swap.victims))
            if r in swap.victims:
                return Outlook(seconds, f"its move to device {', '.join(map(str, swap.devices))}")
            if leaving:
                return Outlook(seconds, f"{leaving} to leave{running}, in about {seconds:.0f} s")
            return Outlook(seconds, f"a swap in about {seconds:.0f} s")
        if r not in core.waiting or not core.engines.ledger.has_devices:
            return None
        return core.policy.outlook(s or self.preview(), r.id)

    def level(self, r: Replica, wish: int) -> int:
        """The sleep level wished for, the other one where that cannot be, or 0: stop."""
        self._choose_level_1()
        usable = levels(self._core.engines, r, self.deep)
        if wish == 0 or wish in usable:
            return wish
        return usable[0] if usable else 0
