"""The frozen view that a policy gets, drawn from the models and the ledger.

Theory of operation. A policy sees everything: each engine that may leave, each replica that waits, each device. To draw
all of it anew for 100 replicas on 8 devices took 2 ms; but between two looks mostly one or two replicas changed. So the
builder keeps each replica's view, and redraws what went stale:

- ``changed``: the replica's state, job or memory is another one: all of its views go;
- ``used``: only requests began or ended: its options to leave are the same, the rest of its view is redrawn;
- a factor of the calibration moved: what is expected of engines that were never measured changed for all;
- host memory, or the choice of level-1 sleepers, changed: so did the levels at which awake engines can sleep.

What a device could free if all slept is a sum over replicas, kept by adding and taking away; what is said of a device's
tenants is found anew only where one of them was redrawn. ``tests/core/test_random.py`` holds all of it equal to what a
new builder draws. What depends on the time alone is not in a view: a policy has ``now``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter

from vllmd.core.costs import sleep_kind, wake_kind
from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit, freed, freed_asleep
from vllmd.core.lifecycle import AWAKE
from vllmd.core.model import INFINITY, Replica
from vllmd.core.policy import (
    DeviceSupply,
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
OVERDUE = 0.001  # seconds that are expected of a command that should have been answered by now


class PolicyInputBuilder:
    """Keeps the views of models that did not change, by device: a look costs what changed since the last one."""

    def __init__(
        self,
        engines: EngineTable,
        swaps: Swaps,
        fit: Fit,
        changed: dict[Replica, None],
        used: dict[Replica, None],
    ) -> None:
        """``changed``, ``used``: those that changed since the last look, or only got or ended requests."""
        self._engines = engines
        self._changed = changed
        self._used = used
        self._fit = fit
        self._swaps = swaps
        self._waiting: dict[Replica, Waiting] = {}
        self._residents: dict[Replica, Resident] = {}
        self._stale: dict[Replica, None] = {}  # may leave, and changed since they were last seen
        self._residents_on: defaultdict[int, dict[Replica, Resident]] = defaultdict(dict)  # by device
        self._tenants: dict[int, Tenants] = {}  # what is said of these
        self._restless: set[int] = set()  # devices of which that is to be said anew
        self._freed_asleep: dict[Replica, dict[int, int]] = {}  # bytes per device that come free if the replica sleeps
        self._sleepable: defaultdict[int, int] = defaultdict(int)  # their sums by device
        self._ends: dict[Replica, float] = {}  # when the command under way is answered, of those that are moving
        self._quiet: dict[int, tuple[Device, DeviceSupply]] = {}  # of devices on which no swap is draining or queued
        self._host: tuple[int, frozenset[str]] = (0, frozenset())
        self._calibrations = 0

    def _redraw(self, r: Replica) -> None:
        """Forget what was drawn of a replica that changed, and correct the sums that it is in."""
        self._waiting.pop(r, None)
        self._ends.pop(r, None)
        self._stale.pop(r, None)
        if may_leave(r):
            self._stale[r] = None
        else:
            self._set_resident(r, None)
        for index, size in self._freed_asleep.pop(r, {}).items():
            self._sleepable[index] -= size
        freed_now = freed_asleep(self._engines.ledger, r, r.footprint.asleep if sleep_levels(r) else 0)
        if freed_now:
            self._freed_asleep[r] = freed_now
            for index, size in freed_now.items():
                self._sleepable[index] += size

    def _set_resident(self, r: Replica, now: Resident | None) -> None:
        """Note the resident as it is now; None: the replica is no resident (any more)."""
        before = self._residents.pop(r, None)
        for index in before.devices if before else ():
            del self._residents_on[index][r]
            self._restless.add(index)
        if now:
            self._residents[r] = now
            for index in now.devices:
                self._residents_on[index][r] = now
                self._restless.add(index)

    def look(self, waiting: Iterable[Replica], deep: frozenset[str]) -> PolicyInput:
        """Draw everything as it is now; ``deep``: ids of the replicas that do not sleep at level 1."""
        engines = self._engines
        for r in self._changed:
            self._redraw(r)
        for r in self._used:
            if r not in self._changed and (before := self._residents.get(r)):
                self._set_resident(r, see_resident(engines, r, before.options))
        self._changed.clear()
        self._used.clear()
        if engines.calibrations != self._calibrations:  # what is expected of engines that were never measured
            self._calibrations = engines.calibrations
            self._waiting.clear()
            self._ends.clear()
            self._stale.update(dict.fromkeys(self._residents))
        host = (engines.ledger.host_budget - engines.ledger.host_promised, deep)
        if host != self._host:  # who can sleep at which level depends on it
            self._host = host
            self._stale.update((r, None) for r, resident in self._residents.items() if not resident.asleep)
        for r in self._stale:
            self._set_resident(r, see_resident(engines, r, options(engines, r, deep)))
        self._stale.clear()
        for index in self._restless:
            self._tenants[index] = Tenants.of(self._residents_on[index].values())
        self._restless.clear()
        return PolicyInput(engines.now, self._see_all(waiting), dict(self._tenants), self._supplies(), KNOBS)

    def _see_all(self, waiting: Iterable[Replica]) -> list[Waiting]:
        """The views of those that wait and may start somewhere, the oldest first."""
        views = []
        for r in waiting:
            w = self._waiting.get(r)
            if w is None and r.spec.when_free:
                w = self.see_newcomer(r)  # that depends on what others hold: it is not kept
            elif w is None:
                w = self._waiting[r] = see_waiting(self._engines, r)
            if not w.held_back:
                views.append(w)
        views.sort(key=_oldest_first)
        return views

    def see_newcomer(self, r: Replica, since: float | None = None) -> Waiting:
        """The view of a replica that waits; with ``when_free`` only on devices that others leave free, none if too few.

        ``since``: readings of the devices from before then count no more; None: from before its oldest request.
        """
        w = see_waiting(self._engines, r)
        if r.spec.when_free is None or r.state is State.SLEEPING or not w.span:
            return w
        free = self._fit.vacant(r, w.oldest if since is None else since)
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


_oldest_first = attrgetter("oldest", "model")


def may_leave(r: Replica) -> bool:
    """Whether a policy may ask it to: it is on with its gate open, or sleeps without frozen requests."""
    if r.kept or r.leaving or not r.placement.devices:
        return False
    return r.state is State.READY or (r.state is State.SLEEPING and not r.running)


def see_waiting(engines: EngineTable, r: Replica) -> Waiting:
    """The view of a replica that is wanted and not on."""
    held = engines.ledger.largest_share(r)
    asleep = r.state is State.SLEEPING
    frozen = len(r.running)
    wanted_since = r.wanted_since  # without a request
    any_device = r.devices or tuple(engines.ledger.accounts)
    here = Waiting(
        model=r.id,
        waiters=r.demand,
        arrived=(r.model.queue.arrived if r.queued else 0.0) + frozen * r.changed + (wanted_since or 0.0),
        oldest=waited_since(r, engines.now),
        load=r.load_time,
        sleep=r.costs.sleep(max(r.spec.sleep_levels, default=0)),
        service=r.costs.seconds("service"),
        need=r.footprint.awake - held if asleep else r.booking,
        devices=r.placement.devices if asleep else any_device,
        span=len(r.placement.devices) if asleep else device_count(engines, r),
        priority=r.model.spec.priority,
        impatient=r.urged or r.model.spec.on_busy == "evict",
        urged=r.urged,
        learnt=r.costs.learnt(wake_kind(r.level if asleep else 0)),
    )
    return here._replace(move=see_move(engines, r, here)) if asleep else here


def waited_since(r: Replica, now: float) -> float:
    """When the oldest of what waits for it came: a request, those frozen in it, an operator's wish."""
    since = (r.oldest, r.changed if r.running and r.state not in AWAKE else None, r.wanted_since)
    return min([t for t in since if t is not None], default=now)


def see_move(engines: EngineTable, r: Replica, here: Waiting) -> Move | None:
    """How a sleeper could serve elsewhere; None if it cannot: there is nowhere, or requests are frozen in it."""
    devices = elsewhere(engines, r)
    if not devices:
        return None
    c, held, booking = r.costs, engines.ledger.held(r), r.booking
    stop = option(engines, r, 0)
    needs = tuple([booking - held.get(index, 0) for index in devices]) if held.keys() & set(devices) else ()
    there = here._replace(
        load=stop.takes + stop.back,
        learnt=c.learnt("stop") + c.learnt("start") if c.learnt("start") else 0.0,
        need=min(needs, default=booking),
        devices=devices,
        needs=needs,
    )
    return Move(stop, there)


def elsewhere(engines: EngineTable, r: Replica) -> tuple[int, ...]:
    """The devices to which it may be moved; those of a model over several devices may be partly the same."""
    accounts = engines.ledger.accounts
    if len(accounts) < 2 or r.running or r.spec.when_free or r.removed or not r.placement.devices:
        return ()
    here = r.placement.devices if len(r.placement.devices) == 1 else ()
    devices = tuple(i for i in r.devices or accounts if i in accounts and i not in here)
    return devices if len(devices) >= r.spec.device_count and set(devices) != set(r.placement.devices) else ()


def device_count(engines: EngineTable, r: Replica) -> int:
    """How many devices it takes; none on a machine without any."""
    return r.spec.device_count if engines.ledger.has_devices else 0


def see_resident(engines: EngineTable, r: Replica, options: tuple[OffloadOption, ...]) -> Resident:
    """The view of a replica that could leave, by these options."""
    rate = r.costs.rate
    return Resident(
        model=r.id,
        devices=r.placement.devices,
        asleep=r.state is State.SLEEPING,
        options=options,
        since=r.ready_at,
        used=r.used,
        running=len(r.running),
        queued=r.queued,
        service=r.costs.seconds("service"),
        rate=rate.value,
        rate_long=r.costs.rate_long.value,
        rate_at=rate.at,
        freezable=r.freezable,
        refrozen=r.spec.preempt and any(often > 1 for often in r.frozen.values()),
        priority=r.model.spec.priority,
        drain_limit=r.drain_limit,
        began=min(r.running.values(), default=INFINITY),
        need=r.booking,
        allowed=() if r.spec.when_free or r.removed else r.devices or tuple(engines.ledger.accounts),
        displaced=r in engines.displaced,
        moved=r.moved,
    )


def options(engines: EngineTable, r: Replica, deep: frozenset[str]) -> tuple[OffloadOption, ...]:
    """How it can leave its devices, the preferred way first, stopping last."""
    usable = [] if r.state is State.SLEEPING else levels(engines, r, deep)
    return tuple([option(engines, r, level) for level in (*usable, 0)])


def option(engines: EngineTable, r: Replica, level: int) -> OffloadOption:
    """How it leaves by sleeping at ``level``, or by stopping (0)."""
    c = r.costs
    return OffloadOption(
        level, freed(engines.ledger, r, level), c.sleep(level), c.wake(level), c.learnt(sleep_kind(level))
    )


def levels(engines: EngineTable, r: Replica, deep: frozenset[str]) -> list[int]:
    """The sleep levels it can use now, the preferred one first."""
    usable = sleep_levels(r)
    if 1 in usable and engines.ledger.host_free_for(r) < r.footprint.host:
        usable -= {1}
    return sorted(usable, reverse=r.id in deep)


def sleep_levels(r: Replica) -> frozenset[int]:
    """What its engine supports; one that failed at it twice is stopped instead."""
    return r.spec.sleep_levels if r.sleep_failures < 2 else frozenset()


def ends(r: Replica) -> float:
    """When the command that ``r`` is under is answered, as expected; that may be over."""
    if r.state is State.STARTING and r.start.ends is not None:
        return r.start.ends
    bringing_up = r.state in (State.STARTING, State.WAKING)
    level = r.level if r.state in (State.WAKING, State.FALLING_ASLEEP) else 0
    return r.changed + (r.costs.wake(level) if bringing_up else r.costs.sleep(level))


def remaining(r: Replica, now: float) -> float:
    """Expected seconds until the command that ``r`` is under is answered."""
    return max(OVERDUE, ends(r) - now)


def sleep_deep(engines: EngineTable, replicas: Iterable[Replica], budget: int) -> frozenset[str]:
    """Sleepers not at level 1: host memory, ``budget`` bytes, goes to the replicas that save most by it.

    That is the arrival rate of hours times the seconds by which a wake from level 1 is shorter, per byte.
    """
    claims, deep = [], set()
    for r in replicas:
        if 1 in r.spec.sleep_levels:
            gain = max(0.0, r.costs.wake(2 if 2 in r.spec.sleep_levels else 0) - r.costs.wake(1))
            size = r.footprint.host
            claims.append((-r.costs.rate_long.read(engines.now) * gain / max(size, 1), r.id, size))
    for _, name, size in sorted(claims):
        if size <= budget:
            budget -= size
        else:
            deep.add(name)
    return frozenset(deep)
