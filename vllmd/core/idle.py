"""What an unused model does as it ages: sleep, sleep deeper, stop. Pure functions of one model and the time."""

from __future__ import annotations

import enum

from vllmd.core.model import INFINITY, Replica
from vllmd.core.types import State


class Rest(enum.Enum):
    """The next thing an unused model does."""

    NONE = enum.auto()
    SLEEP = enum.auto()
    DEEPEN = enum.auto()
    STOP = enum.auto()


def rest(m: Replica, now: float) -> Rest:
    """What ``m`` does now, by its idle rules."""
    if idle_due(m) > now:
        return Rest.NONE
    rules = m.spec.idle
    if rules.stop_after is not None and m.idle_since + rules.stop_after <= now:
        return Rest.STOP
    if m.state is State.READY:
        return Rest.SLEEP if m.spec.sleep_levels and rules.level in (1, 2) else Rest.STOP
    return Rest.DEEPEN


def idle_due(m: Replica) -> float:
    """When its idle rules next want something; infinite while it is used, kept, or about to leave anyway."""
    if m.running or m.demand or m.kept or m.leaving:
        return INFINITY
    return rules_due(m)


def rules_due(m: Replica) -> float:
    """The same of one that is not used, nor kept, nor about to leave."""
    rules, since = m.spec.idle, m.idle_since
    stop = INFINITY if rules.stop_after is None else since + rules.stop_after
    if m.state is State.READY:
        return _kept_alive(m, stop if rules.sleep_after is None else min(stop, since + rules.sleep_after))
    if m.state is State.SLEEPING:
        return min(stop, _deepen_due(m))
    return INFINITY


def _kept_alive(m: Replica, due: float) -> float:
    """4.5: later than ``due`` where a client will use it again, at once where the last one said that it will not."""
    wishes = m.model.keep_alive
    if wishes.let_go >= m.idle_since:  # and nobody has used it since
        return m.idle_since
    return max(due, *wishes.until.values()) if wishes.until else due


def _deepen_due(m: Replica) -> float:
    after = m.spec.idle.deepen_after
    if after is None or m.level != 1 or 2 not in m.spec.sleep_levels or m.job:
        return INFINITY  # or it only waits for the room to
    return m.idle_since + after
