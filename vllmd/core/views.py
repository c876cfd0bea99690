"""The snapshot: everything worth showing, copied."""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.core.exchanges import Exchanges
from vllmd.core.fleet import Fleet
from vllmd.core.ledger import Account, gib
from vllmd.core.model import Model
from vllmd.core.situation import waits_for_others
from vllmd.core.types import DeviceView, ModelView, Snapshot, State


def snapshot(fleet: Fleet, exchanges: Exchanges, models: Iterable[Model], now: float) -> Snapshot:
    """All models, all devices, host memory, and the last decisions."""
    return Snapshot(
        at=now,
        models=tuple(_model(fleet, exchanges, m, now) for m in models),
        devices=tuple(_device(account) for account in fleet.ledger.accounts.values()),
        host_memory=fleet.ledger.host_budget,
        host_promised=fleet.ledger.host_promised,
        decisions=tuple(fleet.decisions),
    )


def _device(a: Account) -> DeviceView:
    return DeviceView(a.device.index, a.device.memory, a.device.reserve, a.promised, a.strangers, a.wedged)


def _model(fleet: Fleet, exchanges: Exchanges, m: Model, now: float) -> ModelView:
    oldest = m.queue.oldest
    resting = m.loaded and not m.running
    return ModelView(
        name=m.name,
        state=m.state,
        level=m.level if m.state in (State.SLEEPING, State.WAKING, State.FALLING_ASLEEP) else 0,
        devices=m.placement.devices,
        memory=fleet.ledger.most(m.name),
        in_flight=len(m.running),
        queued=len(m.queue),
        oldest_wait=None if oldest is None else now - oldest,
        idle=now - m.idle_since if resting else None,
        since=now - m.changed,
        pinned=m.pinned,
        leases=tuple(m.leases),
        waiting_for=_waiting_for(fleet, exchanges, m, now) if m.demand or len(m.queue) else "",
        failure=m.failure,
    )


def _waiting_for(fleet: Fleet, exchanges: Exchanges, m: Model, now: float) -> str:
    """Why queued requests wait, in a few words."""
    if m.state is State.STARTING:
        return f"its start ({now - m.changed:.0f} of about {m.costs.wake(0):.0f} s)"
    if m.state is State.WAKING:
        return f"its wake ({now - m.changed:.1f} of about {m.costs.wake(m.level):.1f} s)"
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
    wedged = [f"device {a.device.index} is avoided: {a.wedged}" for a in accounts if a.missing]
    taken = [
        f"strangers hold {gib(a.strangers)} on device {a.device.index}" for a in accounts if a.strangers > a.missing
    ]
    return "; ".join(["room", *wedged, *taken])
