"""What an operator's word would set in motion, as things stand; nothing is changed by looking.

It is found with what decides it in earnest: the policy is asked with the model among those that wait, urged by an
operator, and the sleep level is the one that unloading would take. Other models' requests that come meanwhile may have
it turn out otherwise.
"""

from __future__ import annotations

from vllmd.core.balancing import in_flight
from vllmd.core.common import Core
from vllmd.core.fit import freed
from vllmd.core.model import INFINITY, Replica
from vllmd.core.planner import Planner
from vllmd.core.policy_input import remaining
from vllmd.core.types import COMING, State
from vllmd.frozen import frozen


@frozen
class Leaving:
    """A replica that leaves its devices: put to sleep at ``level``, or stopped (0)."""

    replica: str
    state: State
    level: int
    devices: tuple[int, ...]
    frees: int  # bytes on each of them
    running: int  # requests that come to their end first
    cut_after: float | None  # seconds after which they are cut; None: never
    back: float  # seconds to have it serve again, as expected


@frozen
class Loading:
    """A replica that is to serve."""

    replica: str
    state: State
    devices: tuple[int, ...] = ()  # where it will be, as far as that is clear
    seconds: float | None = None  # until it serves, once its turn has come; None: it does
    victims: tuple[Leaving, ...] = ()  # who leaves for it
    waits: str = ""  # what it has to wait for first
    never: str = ""  # why it cannot be


def load(core: Core, planner: Planner, name: str) -> Loading:
    """What ``LoadAsked`` would do with the replica that is to come up whatever it takes (3.1)."""
    replicas = [r for r in core.named(name) if not r.disabled_because]
    if not replicas:
        r = core.named(name)[0]
        return Loading(r.id, r.state, never=f"it is disabled: {r.disabled_because}")
    r = next((r for r in replicas if r.state is State.READY or r.state in COMING), replicas[0])
    if r.state is State.READY or r.state in COMING:
        seconds = remaining(r, core.now) if r.state in COMING else None
        return Loading(r.id, r.state, r.placement.devices, seconds)
    why = core.fit.unknown(r) or core.fit.never(r)
    if why:
        return Loading(r.id, r.state, never=why)
    if why := core.fit.pinned_out(r):
        return Loading(r.id, r.state, waits=f"room: {why}")
    # Where the policy would put it, and after whom.
    seconds = r.load_time
    seen = planner.builder.see_newcomer(r, since=-INFINITY)
    if seen.held_back:
        return Loading(r.id, r.state, seconds=seconds, waits="others to leave a device free")
    wanted = seen._replace(waiters=max(1, seen.waiters), oldest=min(seen.oldest, core.now), impatient=True, urged=True)
    view = planner.preview()._replace(waiting=[wanted])
    plan = core.policy.choose(view)
    if plan is None:
        outlook = core.policy.outlook(view, r.id)
        return Loading(r.id, r.state, seconds=seconds, waits=outlook.why if outlook else "room")
    victims = [leaving(core, planner, core.replicas[v.model], v.option.level) for v in plan.victims if v.model != r.id]
    if len(victims) < len(plan.victims):  # it is moved, and so stopped and started
        seconds = r.costs.sleep(0) + r.costs.wake(0)
    return Loading(r.id, r.state, plan.devices, seconds, tuple(victims))


def leave(core: Core, planner: Planner, name: str, level: int) -> tuple[Leaving, ...]:
    """What ``SleepAsked`` (level 1 or 2) or ``StopAsked`` (0) would do with each replica that has an engine."""
    return tuple(leaving(core, planner, r, level) for r in core.named(name) if r.loaded)


def drained(core: Core, planner: Planner, device: int) -> tuple[Leaving, ...]:
    """What ``DeviceDrained`` would do with each replica that is on the device."""
    here = [r for r in core.replicas.values() if device in r.placement.devices and r.loaded]
    return tuple(leaving(core, planner, r, 0) for r in here)


def leaving(core: Core, planner: Planner, r: Replica, level: int) -> Leaving:
    """How it would leave at that sleep level, or the one that it can use instead."""
    level = planner.level(r, level)
    return Leaving(
        replica=r.id,
        state=r.state,
        level=level,
        devices=r.placement.devices,
        frees=freed(core.engines.ledger, r, level),
        running=in_flight(r),
        cut_after=r.spec.drain_limit,
        back=r.costs.wake(level),
    )
