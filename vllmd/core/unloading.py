"""Models on their way out: drained, frozen or cut, then asleep or stopped (6 in ``design.md``)."""

from __future__ import annotations

from vllmd.core.common import Core
from vllmd.core.events import KeptAlive
from vllmd.core.idle import Rest, rest
from vllmd.core.model import INFINITY, Leave, Replica
from vllmd.core.planner import Planner
from vllmd.core.types import State

DEEPEN_RETRY = 5.0  # seconds between two looks for room in which to sleep deeper


class Unloading:
    """Those whose gate is closed, and sleepers that are to stop, until their command is out."""

    def __init__(self, core: Core, planner: Planner) -> None:
        self._core = core
        self._planner = planner
        self._leaving: dict[Replica, None] = {}

    def __len__(self) -> int:
        return len(self._leaving)

    def note(self, m: Replica) -> None:
        """Whether ``m`` is on its way out may have changed."""
        if m.leave and m.state in (State.DRAINING, State.SLEEPING):
            self._leaving[m] = None
        else:
            self._leaving.pop(m, None)

    def drop(self, m: Replica) -> None:
        """``m`` is known no more."""
        self._leaving.pop(m, None)

    def advance(self) -> None:
        """Let go whoever only waited for its requests to end or for a device to come to rest."""
        for m in list(self._leaving):
            if m.leave is None:
                continue
            if m.running and m.state is State.DRAINING and not m.leave.kill:
                self._press(m, m.leave)
            elif self._core.engines.free_to_move(m):  # 6.1
                self._go(m, m.leave)

    def _press(self, m: Replica, leave: Leave) -> None:
        """Its requests take longer than they were given."""
        core = self._core
        level = self._planner.level(m, leave.level)
        if core.now >= leave.freeze_at and m.freezable and level and core.engines.free_to_move(m):  # 6.2
            target = m.swap.id if m.swap else ""
            core.engines.record("freeze", m, leave.why, {"frozen": len(m.running), "for": target, "cause": leave.cause})
            core.engines.sleep(m, level, freeze=True)
            core.mark_dirty(m)
        elif core.now >= leave.cut_at:  # 6.3
            leave.cut_at = INFINITY
            core.engines.record("cut", m, "its drain limit has passed", {"cut": len(m.running)})
            core.engines.cut(m, "the model has to leave and its drain limit has passed")
            core.mark_dirty(m)

    def _go(self, m: Replica, leave: Leave) -> None:
        core = self._core
        core.mark_dirty(m)
        if leave.cause == "proof":
            core.engines.prove(m)
            return
        level = self._planner.level(m, leave.level) if m.state is State.DRAINING else 0
        numbers: dict[str, float | str] = {
            "level": level,
            "idle": round(core.now - m.idle_since, 3),
            "cause": leave.cause,
        }
        core.engines.record("sleep" if level else "stop", m, leave.why, numbers)
        if level:
            core.engines.sleep(m, level)
        else:
            core.engines.stop(m, leave.why, leave.kill)

    # -- age

    def age(self, m: Replica) -> None:
        """4.4: what an unused model does next, if its time has come."""
        core = self._core
        action = rest(m, core.now)
        why = f"unused for {core.now - m.idle_since:.0f} s"
        if action is Rest.STOP:
            core.leave(m, Leave(0, "idle", why))
        elif action is Rest.SLEEP:
            core.leave(m, Leave(m.spec.idle.level, "idle", why))
        elif action is Rest.DEEPEN and self.can_deepen(m):
            m.deepen = True
        elif action is Rest.DEEPEN:
            m.look_again = core.now + DEEPEN_RETRY

    def kept_alive(self, e: KeptAlive) -> None:
        """4.5: a client's wish replaces its own; the last one to need the model no more lets it go."""
        core = self._core
        for r in core.named(e.model):
            wishes = r.model.keep_alive
            wishes.until = {who: until for who, until in wishes.until.items() if until > core.now and who != e.client}
            if e.seconds > 0:
                wishes.until[e.client] = core.now + e.seconds
            elif not wishes.until:
                wishes.let_go = core.now
            core.mark_dirty(r)

    def can_deepen(self, m: Replica) -> bool:
        """An engine cannot go from level 1 to 2 asleep: it must wake in between, and has room to, unasked."""
        core = self._core
        claimed = not core.swaps.claims().keys().isdisjoint(m.placement.devices)
        return core.engines.free_to_move(m) and not claimed and core.fit.has_room(m)
