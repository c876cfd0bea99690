"""The snapshot: everything worth showing, copied."""

from __future__ import annotations

from vllmd.core.common import Core
from vllmd.core.exchanges import Exchanges
from vllmd.core.fleet import Fleet
from vllmd.core.group import Group, in_flight
from vllmd.core.ledger import Account, gib
from vllmd.core.model import Model, Standing
from vllmd.core.situation import waits_for_others
from vllmd.core.types import DeviceView, ModelView, Snapshot, State


def snapshot(core: Core, now: float) -> Snapshot:
    """All models, all devices, host memory, and the last decisions."""
    fleet = core.fleet
    return Snapshot(
        at=now,
        models=tuple(_model(core, m, now) for m in core.models.values()),
        devices=tuple(_device(account) for account in fleet.ledger.accounts.values()),
        host_memory=fleet.ledger.host_budget,
        host_promised=fleet.ledger.host_promised,
        decisions=tuple(fleet.decisions),
    )


def _device(a: Account) -> DeviceView:
    return DeviceView(a.device.index, a.device.memory, a.device.reserve, a.promised, a.external, a.wedged, a.drained)


def _model(core: Core, m: Model, now: float) -> ModelView:
    fleet, oldest = core.fleet, m.queue.oldest
    resting = (m.on or m.state is State.SLEEPING) and not in_flight(m)
    return ModelView(
        name=m.name,
        state=m.state,
        level=m.level if m.state in (State.SLEEPING, State.WAKING, State.FALLING_ASLEEP) else 0,
        devices=m.placement.devices,
        memory=fleet.ledger.most(m.name),
        in_flight=in_flight(m),
        queued=len(m.queue),
        oldest_wait=None if oldest is None else now - oldest,
        idle=now - m.idle_since if resting else None,
        since=now - m.changed,
        pinned=m.pinned,
        leases=tuple(m.leases),
        waiting_for=_waiting_for(fleet, core.exchanges, m, now) if m.demand or len(m.queue) else "",
        failure=m.failure or (m.replica.why if m.replica else ""),
        replica_of=m.spec.replica_of,
        standing=_standing(core.group_of(m), m),
        latency=m.replica.latency if m.replica else None,
    )


def _standing(group: Group | None, m: Model) -> str:
    if group is None or m.replica is None or not m.on:
        return ""
    return "resting" if m in group.resting() else m.replica.standing.value


def _waiting_for(fleet: Fleet, exchanges: Exchanges, m: Model, now: float) -> str:
    """Why queued requests wait, in a few words."""
    if m.state is State.STARTING:
        return f"its start ({now - m.changed:.0f} of about {m.costs.wake(0):.0f} s)"
    if m.state is State.WAKING:
        return f"its wake ({now - m.changed:.1f} of about {m.costs.wake(m.level):.1f} s)"
    if m.replica and m.state is State.READY and m.replica.standing is not Standing.SERVING:
        return f"its answer to a probe{' after: ' * bool(m.replica.why)}{m.replica.why}"
    if m.state is State.READY:
        return f"a place in the engine ({len(m.running)} run at a time)"
    if m.state is State.FAILED:
        return f"a restart in {max(0.0, m.retry_at - now):.0f} s after: {m.failure}"
    if m.state not in (State.STOPPED, State.SLEEPING):
        return f"the end of its {m.state.value.replace('_', ' ')}"
    return _waiting_for_room(fleet, exchanges, m)


def _waiting_for_room(fleet: Fleet, exchanges: Exchanges, m: Model) -> str:
    exchange = exchanges.get(m.name)
    if exchange and exchange.victims:
        running = sum(len(exchanges.models[name].running) for name in exchange.victims)
        return f"{', '.join(exchange.victims)} to leave ({running} requests running there)"
    others = waits_for_others(fleet, exchanges.models.values(), m)
    if others:
        return others.why
    holder = fleet.holder(exchange.devices if exchange else m.placement.devices or tuple(fleet.ledger.accounts))
    if holder:
        return f"{holder}, which is {exchanges.models[holder].state.value.replace('_', ' ')}"
    accounts = fleet.ledger.accounts.values()
    wedged = [f"device {a.device.index} is avoided: {a.wedged}" for a in accounts if a.avoided]
    taken = [f"strangers hold {gib(a.external)} on device {a.device.index}" for a in accounts if a.external > a.missing]
    kept = [other.name for other in exchanges.models.values() if other.kept and other.loaded and other is not m]
    room = f"room beside {', '.join(kept)} (leased or pinned)" if kept else "room"
    return "; ".join([room, *wedged, *taken])
