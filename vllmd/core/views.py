"""The snapshot: everything worth showing, copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllmd.core.balancing import best, in_flight, level, resting, serves
from vllmd.core.common import Core
from vllmd.core.idle import idle_due
from vllmd.core.model import INFINITY, HealthStatus, Model, Replica
from vllmd.core.planner import Planner
from vllmd.core.policy import PolicyInput
from vllmd.core.policy_input import waited_since
from vllmd.core.types import DeviceView, ModelView, ReplicaView, Snapshot, State
from vllmd.sizes import in_words

UNWELL = frozenset({"slow", "ejected"})

Outlooks = Callable[[Replica], str]  # what a replica waits for, by the plan; "" if that cannot be said


def snapshot(core: Core, planner: Planner, now: float, models: Iterable[Model]) -> Snapshot:
    """A snapshot of these models, all devices, host memory, and the last decisions.

    The view of a model that nobody has used since the daemon began says the same at any time, so it is kept: of ten
    thousand models nearly all are such.
    """
    drawn: list[PolicyInput] = []  # when the first one waits for the policy

    def outlook(r: Replica) -> str:
        if not drawn:
            drawn.append(planner.preview())
        expected = planner.outlook(r, drawn[0])
        return expected.why if expected else ""

    engines = core.engines
    return Snapshot(
        at=now,
        models=tuple(
            [each.unused_view or draw_unused(core, each) or _model(core, each, now, outlook) for each in models]
        ),
        devices=tuple(
            DeviceView(
                a.device.index, a.device.memory, a.device.reserve, a.promised, a.external, a.wedged, bool(a.drained)
            )
            for a in engines.ledger.accounts.values()
        ),
        host_memory=engines.ledger.host_budget,
        host_promised=engines.ledger.host_promised,
        decisions=tuple(engines.decisions),
        host_standbys=engines.ledger.standbys,
        drained=engines.ledger.drained,
    )


def _model(core: Core, model: Model, now: float, outlook: Outlooks) -> ModelView:
    """The replicas as one: in the state of the best of them, with all their requests and memory."""
    replicas = (*model.replicas, *model.retired)
    views = tuple(_replica(core, r, now, outlook) for r in replicas)
    first = views[replicas.index(best(replicas))]
    up = [view for r, view in zip(replicas, views, strict=True) if serves(r)]
    idle = [view.idle for view in views if view.idle is not None]
    loaded = [view for view in views if view.devices]
    oldest = model.queue.oldest
    failures = [(view.id, view.failure) for view in views if view.failure and (not model.rules or view not in up)]
    return ModelView(
        name=model.name,
        state=first.state,
        level=first.level,
        devices=tuple(sorted({index for view in views for index in view.devices})) if len(views) > 1 else first.devices,
        memory=sum([view.memory for view in views]),
        in_flight=sum([view.in_flight for view in views]),
        queued=len(model.queue),
        oldest_wait=None if oldest is None else now - oldest,
        idle=min(idle, default=None) if len(views) == 1 or len(idle) == len(loaded) else None,
        since=first.since,
        pinned=all(view.pinned for view in views),
        leases=tuple(model.leases),
        waiting_for=next((view.waiting_for for view in views if view.waiting_for and (view.queued or not up)), ""),
        failure="; ".join(f"{name}: {why}" if model.rules else why for name, why in failures),
        health=first.health,
        latency=min([view.latency for view in up if view.latency is not None], default=None),
        replicas=views,
        balanced=model.rules is not None,
        serving=len(up),
        degraded=bool(model.rules) and any(view.state is State.FAILED or view.health in UNWELL for view in views),
        disabled=model.disabled_because,
        expected=0 if model.rules else first.expected,
        never=first.never if all(view.never for view in views) else "",
        rests_in=min([view.rests_in for view in views if view.rests_in is not None], default=None),
    )


def draw_unused(core: Core, model: Model) -> ModelView | None:
    """The view, a tenth as dear, of a model with one engine that nobody has used or wants; None for any other.

    It is kept with the model until something changes there.
    """
    r = model.replicas[0] if len(model.replicas) == 1 else None
    if r is None or r in core.active or not r.untouched or model.retired or model.rules or model.leases or r.failure:
        return None
    if model.disabled_because:
        return None
    bound, never, expected = r.devices[0] if len(r.devices) == 1 else None, core.fit.never(r), _expected(r)
    at_rest = (State.STOPPED, 0, (), 0, 0, 0, None, None, None, r.pinned, (), "", "")
    model.unused_view = ModelView(
        model.name,
        *at_rest,
        replicas=(ReplicaView(r.id, *at_rest, bound=bound, never=never, expected=expected),),
        never=never,
        expected=expected,
        balanced=False,
        serving=0,
        degraded=False,
    )
    return model.unused_view


def _replica(core: Core, r: Replica, now: float, outlook: Outlooks) -> ReplicaView:
    engines, oldest = core.engines, r.oldest
    unused = (r.is_on or r.state is State.SLEEPING) and not in_flight(r)
    health = ""
    if r.health and r.is_on:
        health = "resting" if r in resting(r.model) else r.health.status.value
    return ReplicaView(
        name=r.id,
        state=r.state,
        level=level(r),
        devices=r.placement.devices,
        memory=engines.ledger.largest_share(r),
        in_flight=in_flight(r),
        queued=r.queued,
        oldest_wait=None if oldest is None else now - oldest,
        idle=now - r.idle_since if unused else None,
        since=None if r.untouched else now - r.changed,
        pinned=r.pinned,
        leases=tuple(r.leases),
        waiting_for=_waiting_for(core, r, now, outlook) if r.demand else "",
        failure=r.failure or (r.health.why if r.health else ""),
        health=health,
        latency=r.health.latency if r.health else None,
        bound=r.devices[0] if len(r.devices) == 1 else None,
        disabled=r.disabled_because,
        expected=_expected(r),
        never="" if r.loaded else core.fit.never(r),
        rests_in=None if (due := idle_due(r)) == INFINITY else max(0.0, due - now),
    )


def _expected(r: Replica) -> int:
    """Bytes per device that its engine is to take; 0 where each start takes a share of what others leave free."""
    return 0 if r.spec.when_free and r.spec.when_free.shares else r.engine_memory


def _waiting_for(core: Core, r: Replica, now: float, outlook: Outlooks) -> str:
    """Why queued requests wait, in a few words."""
    if r.state is State.STARTING:
        usual = r.costs.wake(0) if r.start.ends is None else r.start.ends - r.changed
        return f"its start ({_so_far(now - r.changed, usual)})"
    if r.state is State.WAKING:
        return f"its wake ({_so_far(now - r.changed, r.costs.wake(r.level))})"
    if r.health and r.state is State.READY and r.health.status is not HealthStatus.SERVING:
        return f"its answer to a probe{' after: ' * bool(r.health.why)}{r.health.why}"
    if r.state is State.READY:
        return f"a place in the engine ({len(r.running)} run at a time)"
    if r.state is State.FAILED:
        return f"a restart in {max(0.0, r.retry_at - now):.0f} s after: {r.failure}"
    if r.state not in (State.STOPPED, State.SLEEPING):
        return f"the end of its {r.state.value.replace('_', ' ')}"
    return _waiting_for_room(core, r, now, outlook)


def _so_far(passed: float, usual: float) -> str:
    """How long it has taken, and of how much, as long as that says anything."""
    digits = 1 if max(passed, usual) < 10 else 0
    about = f" of about {usual:.{digits}f}" if usual > passed else ""
    return f"{passed:.{digits}f}{about} s" + (f", {usual:.{digits}f} s usually" if 0.05 <= usual <= passed else "")


def _waiting_for_room(core: Core, r: Replica, now: float, outlook: Outlooks) -> str:
    """Why a replica that is wanted and not on waits: the nearest cause first, at last what devices lack."""
    engines, swap = core.engines, core.swaps.get(r)
    if swap and swap.victims:
        return outlook(r)
    held_back = core.fit.held_back(r, waited_since(r, now))
    if held_back:
        return held_back.why
    holder = engines.holder(swap.devices if swap else r.placement.devices or tuple(engines.ledger.accounts))
    if holder:
        return f"{holder.id}, which is {holder.state.value.replace('_', ' ')}"
    if expected := outlook(r):
        return expected
    accounts = engines.ledger.accounts.values()
    wedged = [f"device {a.device.index} is avoided: {a.wedged}" for a in accounts if a.avoided]
    taken = [
        f"other programs hold {in_words(a.external)} on device {a.device.index}"
        for a in accounts
        if a.external > a.missing
    ]
    kept = [other for other in core.replicas.values() if other.kept and other.loaded and other is not r]
    beside = [f"{other.id} ({'pinned' if other.pinned else 'leased'})" for other in kept]
    room = f"room beside {', '.join(beside)}" if beside else "room"
    return "; ".join([room, *wedged, *taken])
