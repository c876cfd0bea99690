"""Asks the policy, and begins what it says (7 in ``design.md``)."""

from __future__ import annotations

from collections.abc import Iterator

from vllmd.core.common import Core
from vllmd.core.fit import fits
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import INFINITY, Job, Replica
from vllmd.core.policies import tidy
from vllmd.core.policy import Outlook, Plan, PolicyInput
from vllmd.core.policy_input import PolicyInputBuilder, levels, sleep_deep, waited_since
from vllmd.core.types import State

TICK = 0.25  # seconds between two looks while anything waits
FILL_AGE = 5.0  # seconds for which the choice of level-1 sleepers stands; three times as long cost a tenth of the tail
RECENT = 10.0  # seconds for which it is believed what others leave free, where nobody waits for it
PRELOADED = "it is to be preloaded"
RELOCATE_EVERY = 1.0  # seconds between two looks for sleepers that must move


class Planner:
    """When to ask the policy, what it sees, and what becomes of its plans."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.builder = PolicyInputBuilder(core.engines, core.swaps, core.fit, core.changed, core.used)
        self._looked = -INFINITY
        self._filled = -INFINITY
        self._relocated = -INFINITY
        self._deep: frozenset[str] = frozenset()  # those that do not sleep at level 1
        self.held_back: frozenset[Replica] = frozenset()  # who was recorded to wait for others to leave a device free

    @property
    def due(self) -> float:
        """When it wants to look again; infinite while nobody waits without a swap of his own."""
        return self._looked + TICK if len(self._core.waiting) > len(self._core.swaps) else INFINITY

    def plan(self) -> Iterator[None]:
        """7: at news for one who waits, and each quarter of a second while anybody does: ask until there is no plan.

        What a step has set in motion is carried out before the next one.
        """
        core = self._core
        if not core.waiting:
            self.held_back = frozenset()
            yield from self._tidy()
        if not core.waiting or not (core.news_for_all or core.now >= self._looked + TICK or self._concerns_anybody()):
            return
        self._looked = core.now
        yield from self._relocate()
        for _ in range(len(core.waiting) + 1):
            plan = core.policy.choose(self.look())
            if plan is None:
                break
            self.begin(plan)
            yield
        self._record_held_back()

    def _concerns_anybody(self) -> bool:
        """Whether what happened is news of one who waits, or of a device on which it could come up.

        On a large machine most of what happens is not: nobody waits for that device. What time alone changes, or what
        all who wait have in common, is seen at the next tick.
        """
        core, engines = self._core, self._core.engines
        if not core.news and not engines.stirred:
            return False
        devices = engines.stirred.union(*[r.placement.devices for r in core.news])
        accounts = [account for index in devices if (account := engines.ledger.accounts.get(index))]
        room = max([a.free for a in accounts if not a.avoided and a.device.index not in engines.moving], default=-1)
        for r in core.waiting:
            if r in core.news:
                return True
            asleep = r.state is State.SLEEPING
            here = r.placement.devices if asleep else r.devices or devices
            if r not in core.swaps and (not devices.isdisjoint(here) or (asleep and room >= r.booking)):
                return True
        return False

    def _tidy(self) -> Iterator[None]:
        """7.4: while nobody waits, models that are being used are moved to where they fit beside each other."""
        core = self._core
        if not (core.news_for_all or core.news) or len(core.engines.ledger.accounts) < 2 or len(core.swaps):
            return
        if core.engines.displaced and core.policy.moves:  # before all is looked at
            plan = tidy(self.look())
            if plan:
                self.begin(plan)
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

    def _relocate(self) -> Iterator[None]:
        """7.1: a sleeper that cannot wake where it sleeps is stopped, if it can start elsewhere."""
        core = self._core
        if core.now < self._relocated + RELOCATE_EVERY:
            return
        sleepers = [r for r in core.waiting if r.state is State.SLEEPING and not r.running and r not in core.swaps]
        if not sleepers:
            return
        self._relocated = core.now
        for r, why in core.fit.stuck(sleepers).items():
            core.engines.ask(r, Job(Kind.STOP, Reason.MOVED, why, core.now))
        yield

    def begin(self, plan: Plan) -> None:
        """Record the plan, close the gates, and start what can start."""
        core = self._core
        r = core.replicas[plan.target]
        moves = any(v.model == r.id for v in plan.victims)
        verb = "move" if moves else "wake" if r.state is State.SLEEPING else "start"
        numbers: dict[str, float | int | str] = {**plan.numbers, "devices": ",".join(map(str, plan.devices))}
        if plan.victims:
            numbers["victims"] = ",".join(f"{v.model}:{v.option.level or 'stop'}" for v in plan.victims)
            numbers["drain"] = "unlimited" if plan.drain == INFINITY else plan.drain
            core.engines.record("swap", r, f"{verb} it: {plan.why}", numbers)
        else:
            core.engines.record(verb, r, plan.why, numbers)
        core.swaps.begin(plan)
        core.mark_for_review(r)

    def bring(self, r: Replica, reason: Reason, why: str, since: float, but: frozenset[int] = frozenset()) -> bool:
        """Have it serve where it fits beside what is there; nobody leaves for it. Whether that could be begun.

        ``since``: from when the word must be on what others leave free, if it starts only there. ``but``: devices
        that it shall not use.
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
            if r.state is not State.STOPPED or r.demand or r.off:
                del todo[r]
            elif self.bring(r, Reason.PRELOAD, PRELOADED, -INFINITY):
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
        """What the policy sees now."""
        self._fill()
        return self.sight()

    def _fill(self) -> None:
        """Choose anew who sleeps at level 1, of those that have an engine or are wanted."""
        core = self._core
        if core.now < self._filled + FILL_AGE:
            return
        self._filled = core.now
        running = sum(r.spec.host_running for r in core.active if core.engines.ledger.host_held(r))
        self._deep = sleep_deep(core.engines, core.active, core.settings.host_memory - running)

    def outlook(self, r: Replica, s: PolicyInput | None = None) -> Outlook | None:
        """What one that is wanted and not on waits for, and how long; None where that cannot be said.

        ``s``: what :meth:`sight` gave, where several are asked about.
        """
        core = self._core
        swap = core.swaps.get(r)
        if swap:
            seconds = core.swaps.until_served(swap)
            leaving = ", ".join(v.id for v in swap.victims if v is not r)
            number = sum(len(v.running) for v in swap.victims)
            running = f" ({number} request{'s run' if number > 1 else ' runs'} there)" if number else ""
            if r in swap.victims:
                return Outlook(seconds, f"its move to device {', '.join(map(str, swap.devices))}")
            if leaving:
                return Outlook(seconds, f"{leaving} to leave{running}, in about {seconds:.0f} s")
            return Outlook(seconds, f"a swap in about {seconds:.0f} s")
        if r not in core.waiting or not core.engines.ledger.accounts:
            return None
        return core.policy.outlook(s or self.sight(), r.id)

    def sight(self) -> PolicyInput:
        """What the policy would see; that somebody looks changes nothing."""
        begun = self._core.swaps.targets()
        return self.builder.look([r for r in self._core.waiting if r not in begun], self._deep)

    def level(self, r: Replica, wish: int) -> int:
        """The sleep level wished for, the other one where that cannot be, or 0: stop."""
        self._fill()
        usable = levels(self._core.engines, r, self._deep)
        if wish == 0 or wish in usable:
            return wish
        return usable[0] if usable else 0
