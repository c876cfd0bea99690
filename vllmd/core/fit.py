"""Does it fit? What an engine needs of a device, and what a device has for it, in bytes. No other file answers that.

It is kept in one file because the same question is asked at five moments (may the request wait, does the policy see
room, who would have to leave, does the plan still hold when its turn comes, what is the client told), and an engine
that fits by one answer and not by another waits for ever, or is started to fail.

A *supply* says what each device has for one engine, what that engine holds there itself included:

- ``alone``: with the devices to itself. What does not fit so never will;
- ``beside``: beside certain others, such as the pinned ones;
- ``beside_kept``: beside other programs, and the replicas that must stay (pinned or leased): the most that swaps
  could ever give it. Nothing on a device that is avoided;
- ``now``: with nobody leaving.

What the policy sees of a device (``policy.DeviceSupply``) has the same ``free``, and ``sleepable``: what would be free
if all that are awake slept (``freed_asleep``). What fits by that view stands at the end.

A model with ``when_free`` starts only on devices that others leave free. Others are those who will still be there:
other programs, and the replicas that must stay. Those that can leave do not count: they are not somebody else's work
that a start would disturb, their memory is booked to the byte, and if they counted, a model would wait for ever for
what one swap can give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from vllmd.core.lack import lack
from vllmd.core.ledger import NEVER, Account, Ledger
from vllmd.core.model import INFINITY, Replica
from vllmd.core.policy import NOBODY, DeviceSupply, PolicyInput, Resident, Tenants, Waiting
from vllmd.core.types import State
from vllmd.sizes import in_words

Supply = Mapping[int, int]  # device index -> bytes


def need(r: Replica, a: Account, others: int) -> int | None:
    """Bytes of the device that a start of ``r`` takes while others hold ``others`` of it; None: it does not start."""
    rule = r.spec.when_free
    if rule is None:
        return r.booking
    if others >= rule.used_below:
        return None
    if not rule.shares:
        return r.booking
    share = rule.share(_free_ratio(a, others))
    return None if share is None else math.ceil(share * a.device.memory)


def freed_asleep(ledger: Ledger, r: Replica, rest: int) -> dict[int, int]:
    """Bytes per device that would come free if it slept, and kept ``rest`` of each; none of one that stays."""
    if r.kept or r.state is State.SLEEPING:
        return {}
    return {index: max(0, share - rest) for index, share in ledger.held(r).items()}


def freed(ledger: Ledger, r: Replica, level: int) -> int:
    """Bytes that come free on each of its devices if it sleeps at ``level``, or stops (0)."""
    held = min(ledger.held(r).values(), default=0)
    return max(0, held - r.footprint.asleep) if level else held


def _free_ratio(a: Account, others: int) -> float:
    return (a.device.memory - others) / a.device.memory


class Grant(NamedTuple):
    """What a start takes, by how free its devices are at that moment."""

    size: int | None  # bytes per device; None: by its footprint
    why: str
    numbers: Mapping[str, float | int | str]


class Wait(NamedTuple):
    """Why a start waits for others."""

    why: str
    numbers: Mapping[str, float | int | str]
    unread: bool  # some device is yet to be looked at


class Fit:
    """The supplies, and the questions about them, of the devices of one ledger."""

    def __init__(self, ledger: Ledger, active: Collection[Replica], moving: Mapping[int, Replica]) -> None:
        """``active``: the replicas that hold anything are among these. ``moving``: devices where a command is out."""
        self._ledger = ledger
        self._active = active
        self._moving = moving

    # -- supplies

    def alone(self) -> Supply:
        """Everything that can be promised, of the devices that are there."""
        return {index: a.capacity for index, a in self._ledger.accounts.items() if not a.gone}

    def beside(self, others: Iterable[Replica]) -> dict[int, int]:
        """What can be promised beside what these replicas hold; bytes by device."""
        left = {index: a.capacity for index, a in self._ledger.accounts.items()}
        for other in others:
            for index, share in self._ledger.held(other).items():
                left[index] -= share
        return left

    def beside_kept(self, r: Replica | None) -> Supply:
        """Without what other programs, and the replicas that must stay, hold; -1 where the device is avoided."""
        left = self.beside([other for other in self._active if other.kept and other is not r])
        accounts = self._ledger.accounts
        return {i: -1 if accounts[i].avoided else size - accounts[i].external for i, size in left.items()}

    def now(self, r: Replica) -> Supply:
        """With nobody leaving; -1 where the device is avoided."""
        held = self._ledger.held(r)
        return {i: -1 if a.avoided else a.free + held.get(i, 0) for i, a in self._ledger.accounts.items()}

    # -- questions

    def unknown(self, r: Replica) -> str:
        """Why nobody knows what there is that it could run on; "" if it is known, or it needs no device."""
        return self._ledger.unknown if r.spec.device_count else ""

    def allowed(self, r: Replica) -> list[Account]:
        """The devices that it may use, of those that are there."""
        found = (self._ledger.accounts.get(index) for index in dict.fromkeys(r.devices or self._ledger.accounts))
        return [account for account in found if account and not account.gone]

    def wakes(self, r: Replica, supply: Supply) -> bool:
        """Whether it could wake where it sleeps."""
        return all(supply.get(index, -1) >= r.footprint.awake for index in r.placement.devices)

    def starts(self, r: Replica, supply: Supply) -> int:
        """On how many devices it could start."""
        sizes = [(a.device.index, need(r, a, a.capacity - supply[a.device.index])) for a in self.allowed(r)]
        return sum(size is not None and supply[index] >= size for index, size in sizes)

    def has_room(self, r: Replica) -> bool:
        """Whether it could start, or wake where it sleeps, with nobody leaving."""
        if self._ledger.held(r):
            return self.wakes(r, self.now(r))
        return not self._ledger.has_devices or self.starts(r, self.now(r)) >= r.spec.device_count

    def has_room_on(self, r: Replica, devices: Sequence[int]) -> bool:
        """Whether it could start on these, or wake where it sleeps, at this moment."""
        supply = self.now(r)
        if r.state is State.SLEEPING:
            return self.wakes(r, supply)
        needs = {index: self.need_on(r, index) for index in devices}
        return all(size is not None and supply[index] >= size for index, size in needs.items())

    def any_could_move(self, sleepers: Iterable[Replica], devices: Iterable[int]) -> bool:
        """Whether one of these devices, at rest, has room for a start of one of these sleepers."""
        accounts = [account for index in devices if (account := self._ledger.accounts.get(index))]
        usable = [a.free for a in accounts if not a.avoided and a.device.index not in self._moving]
        roomiest = max(usable, default=-1)
        return any(r.booking <= roomiest for r in sleepers)

    def need_on(self, r: Replica, index: int) -> int | None:
        """Bytes that it needs on the device beyond what it holds there, negative if that is more than it needs.

        None: others do not leave that device free.
        """
        if r.state is State.SLEEPING:
            return r.footprint.awake - self._ledger.held(r).get(index, 0)
        if r.spec.when_free is None:
            return r.booking
        a = self._ledger.accounts[index]
        return need(r, a, a.capacity - self.beside_kept(r)[index])

    def shortage(self, r: Replica, devices: Iterable[int]) -> str:
        """What each of these devices lacks for it, readable."""
        lacks = []
        for index in devices:
            a, size = self._ledger.accounts[index], self.need_on(r, index)
            if size is None:
                held = in_words(a.external)
                lacks.append(f"others do not leave device {index} free: other programs hold {held} there")
            else:
                lacks.append(f"device {index} has {in_words(a.free)} of {in_words(size)} needed")
        return "; ".join(lacks)

    # -- what can never be, with the arithmetic, so that nobody waits for it

    def never(self, r: Replica) -> str:
        """Why ``r`` cannot fit even with these devices to itself; empty if it can, be it by waking where it sleeps."""
        count = r.spec.device_count
        if not self._ledger.has_devices or not count:
            return ""
        if r.state is State.SLEEPING and self.wakes(r, self.alone()):
            return ""
        accounts = {a.device.index: a for a in self.allowed(r)}
        lacks = lack([a.device for a in accounts.values()], count, lambda device: need(r, accounts[device.index], 0))
        return lacks.of(repr(r.id)) if lacks else ""

    def pinned_out(self, r: Replica) -> str:
        """Why pinned models leave no room for ``r``; empty if they do.

        Those are named of which one would be enough; where none is, all.
        """
        count = r.spec.device_count
        if not self._ledger.has_devices or not count:
            return ""
        pinned = [p for p in self._active if p.pinned and p.loaded and p is not r]
        if self.starts(r, self.beside(pinned)) >= count:
            return ""
        without = [p for p in pinned if self.starts(r, self.beside([q for q in pinned if q is not p])) >= count]
        names = ", ".join(f"{p.id!r}" for p in without or pinned)
        if r.spec.when_free:
            return f"{r.id!r} starts on devices that others leave free, and pinned models ({names}) do not leave enough"
        return f"{r.id!r} needs {in_words(r.booking)} on {_devices(count)}, and pinned models ({names}) leave less"

    def stuck(self, sleepers: Iterable[Replica]) -> dict[Replica, str]:
        """Sleepers that cannot wake where they are although they could start elsewhere, and why."""
        common, found = self.beside_kept(None), {}
        for r in sleepers:
            supply = self.beside_kept(r) if r.kept else common
            bad = [index for index in r.placement.devices if supply.get(index, -1) < r.footprint.awake]
            if bad and self.starts(r, supply) >= r.spec.device_count:
                found[r] = f"it cannot wake on device {bad[0]}, and can start elsewhere"
        return found

    # -- devices that others leave free

    def vacant(self, r: Replica, since: float = -INFINITY) -> dict[int, int]:
        """The devices on which ``r`` may start now, with what it would take of each.

        ``since``: what was read before counts no more. When nothing is loaded nobody looks at the devices.
        """
        supply = self.beside_kept(r)
        sizes = {a.device.index: need(r, a, a.capacity - supply[a.device.index]) for a in self.allowed(r)}
        accounts = self._ledger.accounts
        usable = {i: size for i, size in sizes.items() if not accounts[i].avoided and _read(accounts[i], since)}
        return {index: size for index, size in usable.items() if size is not None}

    def grant(self, r: Replica, devices: Sequence[int]) -> Grant:
        """For a start on vacant devices: the share that the fullest of them allows."""
        supply, accounts = self.beside_kept(r), [self._ledger.accounts[index] for index in devices]
        used, fullest = max(
            ((a.capacity - supply[a.device.index], a) for a in accounts),
            key=lambda pair: -_free_ratio(pair[1], pair[0]),
        )
        free = _free_ratio(fullest, used)
        why = f"others hold {in_words(used)} of device {fullest.device.index}{', the fullest' * (len(accounts) > 1)}"
        why = f"{why}, {free:.3f} of it is free"
        where = ",".join(map(str, devices))
        numbers: dict[str, float | int | str] = {"devices": where, "used": used, "free": round(free, 4)}
        share = r.spec.when_free.share(free) if r.spec.when_free else None
        if share is None:
            return Grant(None, why, numbers)
        size = math.ceil(share * min(a.device.memory for a in accounts))
        return Grant(size, f"{why}: it takes {share:g}, {in_words(size)}", {**numbers, "share": share, "memory": size})

    def held_back(self, r: Replica, since: float) -> Wait | None:
        """What keeps a start of ``r`` waiting, and for what; None where others leave it enough devices."""
        rule = r.spec.when_free
        if rule is None or r.state is State.SLEEPING or not self._ledger.has_devices:
            return None
        if len(self.vacant(r, since)) >= r.spec.device_count:
            return None
        supply = self.beside_kept(r)
        used = {a.device.index: (a, a.capacity - supply[a.device.index]) for a in self.allowed(r)}
        devices = "a free device" if r.spec.device_count == 1 else f"{r.spec.device_count} free devices"
        least = f", at least {min(rule.shares):g} of it free" if rule.shares else ""
        reasons = filter(None, [_reason(r, a, others, since) for a, others in used.values()])
        why = f"{devices} (others use less than {in_words(rule.used_below)}{least}): {'; '.join(reasons)}"
        numbers = {f"used_{index}": others for index, (_, others) in used.items()}
        return Wait(why, {"used_below": rule.used_below, **numbers}, not all(_read(a, since) for a, _ in used.values()))


def _read(a: Account, since: float) -> bool:
    return a.read_at is None or (a.read_at != NEVER and a.read_at >= since)


def _reason(r: Replica, a: Account, others: int, since: float) -> str:
    index = a.device.index
    if a.avoided:
        return f"device {index} is avoided: {a.wedged}"
    if not _read(a, since):
        return f"device {index} is yet to be looked at"
    if need(r, a, others) is not None:
        return ""
    kept = others - a.external
    holders = [f"other programs hold {in_words(a.external)}"] * (a.external > 0)
    holders += [f"models that stay hold {in_words(kept)}"] * (kept > 0)
    return f"{' and '.join(holders)} on device {index}, {_free_ratio(a, others):.3f} is free"


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


# -- on a policy's view


def fits(s: PolicyInput, w: Waiting) -> tuple[int, ...] | None:
    """The devices on which ``w`` can be started or woken at once; None: it does not fit.

    First the smallest that nobody uses, which leaves the large ones to large
    models; else that with most room. Of several, where there is a choice, those
    that are joined directly, else those of one NUMA node: layers that are split
    over them exchange data all the time.
    """
    if not w.span:
        return ()
    if len(w.devices) == 1:
        only = s.supplies.get(w.devices[0])
        return w.devices if only and only.free >= w.need_on(only.device) and _at_once(only, w) else None
    good = [
        supply
        for index in w.devices
        if (supply := s.supplies.get(index)) and supply.free >= w.need_on(index) and _at_once(supply, w)
    ]
    if len(good) < w.span:
        return None
    # Devices that nobody uses first, of those the smallest; then the emptiest of those that are shared.
    good.sort(key=lambda d: (True, -d.free, d.device) if d.free < d.sleepable else (False, d.free, d.device))
    return tuple(sorted([supply.device for supply in _near(good, w.span)]))


def _near(good: Sequence[DeviceSupply], span: int) -> Sequence[DeviceSupply]:
    """The first ``span`` of them, or better ones: the nearest kind of which there are enough together."""
    if 1 < span < len(good):
        for near in NEAR:
            for first in good:
                together = [first]
                for supply in good:
                    if supply is not first and all(near(supply, other) for other in together):
                        together.append(supply)
                if len(together) >= span:
                    return together[:span]
    return good[:span]


def _at_once(supply: DeviceSupply, w: Waiting) -> bool:
    """Nothing is under way there, and a swap that is draining there can wait for so long."""
    return not supply.until and (not supply.claimed or w.load <= supply.drain)


NEAR: tuple[Callable[[DeviceSupply, DeviceSupply], bool], ...] = (  # from the nearest on
    lambda one, other: other.device in one.links,  # joined directly
    lambda one, other: bool(one.switch) and one.switch == other.switch,
    lambda one, other: one.node is not None and one.node == other.node,
)


def distance(supply: DeviceSupply, others: Iterable[DeviceSupply]) -> int:
    """How far it is from the farthest of the others: 0 joined directly, and so on as in ``NEAR``; 0 where none are."""
    steps = [next((n for n, near in enumerate(NEAR) if near(supply, other)), len(NEAR)) for other in others]
    return max(steps, default=0)


def roomiest(s: PolicyInput) -> int:
    """Bytes free on the device at rest that has most of them: what needs more fits nowhere just now."""
    return max([supply.free for supply in s.supplies.values() if not supply.until], default=0)


def may_fit(w: Waiting, roomiest: int) -> bool:
    """Whether it is worth asking on which devices ``w`` fits as they are; ``roomiest`` as of :func:`roomiest`."""
    return not w.span or w.need <= roomiest


def room_for_these(s: PolicyInput, models: Collection[str]) -> dict[int, int]:
    """Bytes that each device has for these residents together: what they hold, and what the idle awake would free."""
    room = {index: supply.free for index, supply in s.supplies.items()}
    for r in s.residents:
        frees = r.options[-1].frees if r.model in models else 0 if r.asleep else r.options[0].frees
        for index in r.devices:
            if index in room:
                room[index] += frees
    return room


def unclaimed(s: PolicyInput, w: Waiting) -> list[DeviceSupply]:
    """Where a swap for ``w`` may begin: no other one is draining or queued there. Empty if they are too few."""
    supplies = [each for index in w.devices if (each := s.supplies.get(index)) and not each.claimed] if w.span else []
    return supplies if len(supplies) >= w.span else []


def after_sleeps(supplies: Iterable[DeviceSupply], w: Waiting) -> list[int]:
    """The devices on which it would be enough for ``w`` if all others slept."""
    return [supply.device for supply in supplies if if_all_slept(supply, w)]


def if_all_slept(supply: DeviceSupply, w: Waiting) -> bool:
    """Whether the device has enough for ``w`` once all others there sleep."""
    return supply.sleepable >= w.need_on(supply.device)


def if_the_idle_slept(supply: DeviceSupply, there: Tenants, w: Waiting) -> bool:
    """The same once those sleep that are idle."""
    return supply.free + there.idle >= w.need_on(supply.device)


def if_the_light_left(supply: DeviceSupply, there: Tenants, w: Waiting) -> bool:
    """The same once, besides, those sleepers have stopped that start quickly."""
    return supply.free + there.idle + there.light >= w.need_on(supply.device)


def enough(w: Waiting, free: Mapping[int, int]) -> tuple[int, ...]:
    """The roomiest devices that ``w`` needs, with so many bytes free on each; none if they are too few."""
    good = sorted([index for index in free if free[index] >= w.need_on(index)], key=lambda index: (-free[index], index))
    return tuple(sorted(good[: w.span])) if len(good) >= w.span else ()


def spare(s: PolicyInput, index: int, but: str = "") -> int:
    """Bytes of the device that would be free if all that are being used there were awake, ``but`` for that one."""
    free, asked = s.supplies[index].free, {w.model for w in s.waiting}
    for r in s.tenants.get(index, NOBODY).asleep:
        if r.model != but and (r.model in asked or s.now - r.used < s.knobs.used):
            free -= max(0, r.need - r.options[-1].frees)
    return free


def can_move(s: PolicyInput, r: Resident, devices: Sequence[int]) -> bool:
    """Whether a resident can be stopped where it is and started there, at once and with nobody else leaving."""
    for index in {*r.devices, *devices}:
        supply = s.supplies.get(index)
        if supply is None or supply.until or supply.claimed:
            return False
        own = r.options[-1].frees if index in r.devices else 0
        if index in devices and supply.free + own < r.need:
            return False
    return True
