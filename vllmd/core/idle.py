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


def rest(r: Replica, now: float) -> Rest:
    """What ``r`` does now, by its idle rules."""
    if idle_due(r) > now:
        return Rest.NONE
    rules = r.spec.idle
    if rules.stop_after is not None and r.idle_since + rules.stop_after <= now:
        return Rest.STOP
    if r.state is State.READY:
        return Rest.SLEEP if r.spec.sleep_levels and rules.level in (1, 2) else Rest.STOP
    return Rest.DEEPEN


def idle_due(r: Replica) -> float:
    """When its idle rules next want something; infinite while it is used, kept, or about to leave anyway."""
    if r.running or r.demand or r.kept or r.leaving:
        return INFINITY
    return rules_due(r)


def rules_due(r: Replica) -> float:
    """The same of one that is not used, nor kept, nor about to leave."""
    rules, since = r.spec.idle, r.idle_since
    stop = INFINITY if rules.stop_after is None else since + rules.stop_after
    if r.state is State.READY:
        if _costly(r):
            return _kept_alive(r, since)
        return _kept_alive(r, stop if rules.sleep_after is None else min(stop, since + rules.sleep_after))
    if r.state is State.SLEEPING:
        return min(stop, _deepen_due(r))
    return INFINITY


def _costly(r: Replica) -> bool:
    """4.4: it has drawn as much unused as it may; what was read before its last request does not count."""
    energy, (since, joules) = r.spec.idle.energy, r.drawn
    return energy is not None and since == r.idle_since and joules >= energy


def _kept_alive(r: Replica, due: float) -> float:
    """4.5: later than ``due`` where a client will use it again, at once where the last one said that it will not."""
    wishes = r.model.keep_alive
    if wishes.let_go >= r.idle_since:  # and nobody has used it since
        return r.idle_since
    return max(due, *wishes.until.values()) if wishes.until else due


def _deepen_due(r: Replica) -> float:
    after = r.spec.idle.deepen_after
    if after is None or r.level != 1 or 2 not in r.spec.sleep_levels or r.job:
        return INFINITY  # or it only waits for the room to
    return r.idle_since + after
