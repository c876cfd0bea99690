"""What an unused replica does as it ages: sleep, sleep deeper, stop (4.4). Pure functions of a replica and the time."""

from __future__ import annotations

import enum

from vllmd.core.model import INFINITY, Replica
from vllmd.core.types import READY, State


class Rest(enum.Enum):
    """The next thing that an unused replica does."""

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


def rules_due(r: Replica, unused_since: float | None = None) -> float:
    """The same of one that is not used (since then, if that is given), nor kept, nor about to leave."""
    rules, since = r.spec.idle, r.idle_since if unused_since is None else unused_since
    stop = INFINITY if rules.stop_after is None else since + rules.stop_after
    if r.state is READY:
        # 4.4: with a limit of energy it sleeps once it has drawn so much unused, however short that took. A figure that
        # was read before its last request says nothing of the time since.
        drawn_since, joules = r.drawn
        if rules.energy is not None and drawn_since == since and joules >= rules.energy:
            return _kept_alive(r, since, since)
        sleep = INFINITY if rules.sleep_after is None else since + rules.sleep_after
        return _kept_alive(r, since, sleep if sleep < stop else stop)
    if r.state is State.SLEEPING:
        # One with a job waits for the room to sleep deeper already.
        deepens = rules.deepen_after is not None and r.level == 1 and 2 in r.spec.sleep_levels and not r.job
        return min(stop, since + rules.deepen_after) if deepens and rules.deepen_after is not None else stop
    return INFINITY


def _kept_alive(r: Replica, since: float, due: float) -> float:
    """4.5: later than ``due`` where a client will use it again, at once where the last one said that it will not."""
    kept = r.model.keep_alive
    if kept.let_go >= since:  # and nobody has used it since
        return since
    return max(due, *kept.until.values()) if kept.until else due
