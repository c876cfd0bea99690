"""The frozen view that a policy gets, drawn from the models and the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter

from vllmd.core.costs import sleep_kind, wake_kind
from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit, freed_asleep
from vllmd.core.lifecycle import AWAKE
from vllmd.core.model import INFINITY, Replica
from vllmd.core.policy import (
    DeviceSupply,
    HostClaim,
    Knobs,
    Move,
    OffloadOption,
    PolicyInput,
    Resident,
    Tenants,
    Waiting,
)
from vllmd.core.swaps import Swaps
from vllmd.core.types import Device, State

KNOBS = Knobs()
SOON = 0.001  # a transfer that should have ended by now


class PolicyInputBuilder:
    """Keeps the views of models that did not change, by device: a look costs what changed since the last one."""

    def __init__(self, engines: EngineTable, swaps: Swaps, fit: Fit, changed: dict[Replica, None]) -> None:
        self._engines = engines
        self._changed = changed  # since the last look; most changes need none
        self._fit = fit
        self._swaps = swaps
        self._waiting: dict[Replica, Waiting] = {}
        self._residents: dict[Replica, Resident] = {}
        self._stale: dict[Replica, None] = {}  # may leave, and changed since they were last seen
        self._here: defaultdict[int, dict[Replica, Resident]] = defaultdict(dict)  # the residents by device
        self._tenants: dict[int, Tenants] = {}  # what there is to say of these
        self._astir: set[int] = set()  # devices of which that is to be said anew
        self._coming: dict[Replica, dict[int, int]] = {}  # bytes per device that would come free if the model slept
        self._sleepable: defaultdict[int, int] = defaultdict(int)  # their sums
        self._ends: dict[Replica, float] = {}  # of those that are moving
        self._quiet: dict[int, tuple[Device, DeviceSupply]] = {}  # of devices on which no swap is draining or queued
        self._host: tuple[int, frozenset[str]] = (0, frozenset())
        self._calibrations = 0

    def _take(self, m: Replica) -> None:
        self._waiting.pop(m, None)
        self._ends.pop(m, None)
        self._stale.pop(m, None)
        if may_leave(m):
            self._stale[m] = None
        else:
            self._house(m, None)
        self._sum(self._coming.pop(m, {}), -1)
        coming = freed_asleep(self._engines.ledger, m, m.footprint.asleep if sleep_levels(m) else 0)
        if coming:
            self._coming[m] = coming
            self._sum(coming, 1)

    def _sum(self, coming: dict[int, int], sign: int) -> None:
        for index, size in coming.items():
            self._sleepable[index] += sign * size

    def _house(self, m: Replica, now: Resident | None) -> None:
        """It is so now; None: it is no resident (any more)."""
        before = self._residents.pop(m, None)
        for index in before.devices if before else ():
            del self._here[index][m]
            self._astir.add(index)
        if now:
            self._residents[m] = now
            for index in now.devices:
                self._here[index][m] = now
                self._astir.add(index)

    def look(self, waiting: Iterable[Replica], shallow: frozenset[str]) -> PolicyInput:
        """Everything as it is now; ``shallow``: who sleeps at level 1 if it must."""
        engines = self._engines
        for m in self._changed:
            self._take(m)
        self._changed.clear()
        if engines.calibrations != self._calibrations:  # what is expected of engines that were never measured
            self._calibrations = engines.calibrations
            self._waiting.clear()
            self._ends.clear()
            self._stale.update(dict.fromkeys(self._residents))
        host = (engines.ledger.host_budget - engines.ledger.host_promised, shallow)
        if host != self._host:  # who can sleep at which level depends on it
            self._host = host
            self._stale.update((m, None) for m, r in self._residents.items() if not r.asleep)
        for m in self._stale:
            self._house(m, see_resident(engines, m, shallow))
        self._stale.clear()
        for index in self._astir:
            self._tenants[index] = Tenants.of(self._here[index].values())
        self._astir.clear()
        seen = [self._waiting.get(m) or self._see_waiting(m) for m in waiting]
        # Not those that wait for others to leave a device free.
        asking = sorted([w for w in seen if w.devices or not w.span], key=_age)
        return PolicyInput(engines.now, asking, dict(self._tenants), self._supplies(), KNOBS)

    def _see_waiting(self, m: Replica) -> Waiting:
        if m.spec.when_free:
            return self.see_newcomer(m)  # that depends on others: it is looked at each time
        seen = self._waiting[m] = see_waiting(self._engines, m)
        return seen

    def see_newcomer(self, m: Replica, since: float | None = None) -> Waiting:
        """What waits for it; for one that starts where others leave devices free, only those, none if too few.

        ``since``: from when the word for that must be; None: from when the oldest came.
        """
        w = see_waiting(self._engines, m)
        if m.spec.when_free is None or m.state is State.SLEEPING or not w.span:
            return w
        free = self._fit.vacant(m, w.oldest if since is None else since)
        if len(free) < w.span:
            return w._replace(devices=())
        return w._replace(devices=tuple(free), needs=tuple(free.values()), need=min(free.values()))

    def _supplies(self) -> dict[int, DeviceSupply]:
        engines, moving, supplies = self._engines, self._engines.moving, {}
        claims = self._swaps.claims() if len(self._swaps) else {}
        for index, account in engines.ledger.accounts.items():
            if account.avoided:
                continue
            free = account.free
            sleepable = free + self._sleepable[index]
            until, mover = 0.0, moving.get(index)
            if mover:
                until = self._ends[mover] = self._ends.get(mover) or ends(mover)
            if index in claims:
                claim, near = claims[index], _nearness(account.device)
                left = min(free, free + claim.coming - claim.need)
                supplies[index] = DeviceSupply(index, left, sleepable, until, True, claim.drain, *near)
                continue
            device, known = self._quiet.get(index, (None, None))
            same = known is not None and (known.free, known.sleepable, known.until) == (free, sleepable, until)
            if known is None or not same or device is not account.device:
                device = account.device
                known = DeviceSupply(index, free, sleepable, until, False, 0.0, *_nearness(device))
                self._quiet[index] = device, known
            supplies[index] = known
        return supplies


def _nearness(device: Device) -> tuple[frozenset[int], int | None, str]:
    return device.links, device.node, device.switch


_age = attrgetter("oldest", "model")


def may_leave(m: Replica) -> bool:
    """Whether a policy may ask it to: it is on with its gate open, or sleeps without frozen requests."""
    if m.kept or m.leaving or not m.placement.devices:
        return False
    return m.state is State.READY or (m.state is State.SLEEPING and not m.running)


def see_waiting(engines: EngineTable, m: Replica) -> Waiting:
    """What waits for a model that is not on."""
    held = engines.ledger.most(m)
    asleep = m.state is State.SLEEPING
    frozen = len(m.running)
    asked = [m.wanted] if m.wanted is not None else []
    urged = m.urged and m.wanted is not None
    any_device = m.devices or tuple(engines.ledger.accounts)
    return Waiting(
        model=m.id,
        waiters=m.demand,
        arrived=(m.model.queue.arrived if m.queued else 0.0) + frozen * m.changed + sum(asked),
        oldest=waited_since(m, engines.now),
        load=m.costs.wake(m.level if asleep else 0),
        sleep=m.costs.sleep(max(m.spec.sleep_levels, default=0)),
        service=m.costs.seconds("service"),
        need=m.footprint.awake - held if asleep else m.booking,
        devices=m.placement.devices if asleep else any_device,
        span=len(m.placement.devices) if asleep else device_count(engines, m),
        priority=m.model.spec.priority,
        impatient=urged or m.model.spec.on_busy == "evict",
        urged=urged,
        learnt=m.costs.learnt(wake_kind(m.level if asleep else 0)),
        move=see_move(engines, m) if asleep else None,
    )


def waited_since(m: Replica, now: float) -> float:
    """When the oldest of what waits for it came: a request, those frozen in it, an operator's wish."""
    since = (m.oldest, m.changed if m.running and m.state not in AWAKE else None, m.wanted)
    return min([t for t in since if t is not None], default=now)


def see_move(engines: EngineTable, m: Replica) -> Move | None:
    """How a sleeper could serve elsewhere; None if it cannot: there is nowhere, or requests are frozen in it."""
    devices = elsewhere(engines, m)
    if not devices:
        return None
    c, held = m.costs, engines.ledger.held(m)
    stop = OffloadOption(0, min(held.values(), default=0), c.sleep(0), c.wake(0), c.learnt("stop"))
    needs = tuple(m.booking - held.get(index, 0) for index in devices)
    learnt = c.learnt("stop") + c.learnt("start") if c.learnt("start") else 0.0
    return Move(stop, stop.takes + stop.back, learnt, min(needs), devices, needs if held.keys() & set(devices) else ())


def elsewhere(engines: EngineTable, m: Replica) -> tuple[int, ...]:
    """The devices to which it may be moved; those of a model over several devices may be partly the same."""
    accounts = engines.ledger.accounts
    if len(accounts) < 2 or m.running or m.spec.when_free or m.removed or not m.placement.devices:
        return ()
    here = m.placement.devices if len(m.placement.devices) == 1 else ()
    devices = tuple(i for i in m.devices or accounts if i in accounts and i not in here)
    return devices if len(devices) >= m.spec.device_count and set(devices) != set(m.placement.devices) else ()


def device_count(engines: EngineTable, m: Replica) -> int:
    """How many devices it takes; none on a machine without any."""
    return m.spec.device_count if engines.ledger.accounts else 0


def see_resident(engines: EngineTable, m: Replica, shallow: frozenset[str]) -> Resident:
    """A model that could leave."""
    rate = m.costs.rate
    return Resident(
        model=m.id,
        devices=m.placement.devices,
        asleep=m.state is State.SLEEPING,
        options=options(engines, m, shallow),
        since=m.ready_at,
        used=m.used,
        running=len(m.running),
        queued=m.queued,
        service=m.costs.seconds("service"),
        rate=rate.value,
        rate_long=m.costs.rate_long.value,
        rate_at=rate.at,
        freezable=m.freezable,
        refrozen=m.spec.preempt and any(run.frozen > 1 for run in m.running.values()),
        priority=m.model.spec.priority,
        drain_limit=INFINITY if m.spec.drain_limit is None else m.spec.drain_limit,
        began=min([run.began for run in m.running.values()], default=INFINITY),
        need=m.booking,
        allowed=() if m.spec.when_free or m.removed else m.devices or tuple(engines.ledger.accounts),
        displaced=m.displaced,
        moved=m.moved,
    )


def options(engines: EngineTable, m: Replica, shallow: frozenset[str]) -> tuple[OffloadOption, ...]:
    """How it can leave its devices, the preferred way first, stopping last."""
    held = min(engines.ledger.held(m).values(), default=0)
    stop = OffloadOption(0, held, m.costs.sleep(0), m.costs.wake(0), m.costs.learnt("stop"))
    if m.state is State.SLEEPING:
        return (stop,)
    rest = max(0, held - m.footprint.asleep)
    c = m.costs
    naps = [OffloadOption(n, rest, c.sleep(n), c.wake(n), c.learnt(sleep_kind(n))) for n in levels(engines, m, shallow)]
    return (*naps, stop)


def levels(engines: EngineTable, m: Replica, shallow: frozenset[str]) -> list[int]:
    """The sleep levels it can use now, the preferred one first."""
    usable = sleep_levels(m)
    if 1 in usable and engines.ledger.host_free_for(m) < m.footprint.host:
        usable -= {1}
    return sorted(usable, reverse=m.id not in shallow)


def sleep_levels(m: Replica) -> frozenset[int]:
    """What its engine supports; one that failed at it twice is stopped instead."""
    return m.spec.sleep_levels if m.sleep_failures < 2 else frozenset()


def ends(m: Replica) -> float:
    """When the command that ``m`` is under is answered, as expected; that may be over."""
    if m.state is State.STARTING and m.start.ends is not None:
        return m.start.ends
    bringing_up = m.state in (State.STARTING, State.WAKING)
    level = m.level if m.state in (State.WAKING, State.FALLING_ASLEEP) else 0
    return m.changed + (m.costs.wake(level) if bringing_up else m.costs.sleep(level))


def remaining(m: Replica, now: float) -> float:
    """Expected seconds until the command that ``m`` is under is answered."""
    return max(SOON, ends(m) - now)


def host_claims(engines: EngineTable, models: Iterable[Replica]) -> list[HostClaim]:
    """Who could sleep at level 1, and what it would save."""
    claims = []
    for m in models:
        if 1 in m.spec.sleep_levels:
            deep = m.costs.wake(2 if 2 in m.spec.sleep_levels else 0)
            gain = max(0.0, deep - m.costs.wake(1))
            claims.append(HostClaim(m.id, m.footprint.host, gain, m.costs.rate_long.read(engines.now)))
    return claims
