"""Swaps: victims drain and leave, then the target starts or wakes. One at a time per device.

A swap is a plan of the policy under way. It holds no engine and gives no command to one but through its victims' jobs,
so it can be called off at any moment: what has not left stays. While it lasts it *claims* its devices and those of its
victims. The policy sees a claimed device with what the swap will leave of it, and begins no other swap there; and what
comes free is not given to anybody else, because until the target's command is out the ledger has nothing booked for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from vllmd.core.commands import ReadAhead, StopReadAhead
from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit
from vllmd.core.lifecycle import AWAKE, Kind, Reason
from vllmd.core.model import INFINITY, Job, Replica
from vllmd.core.policy import OffloadOption, Plan, drain_time
from vllmd.core.types import State


class Claim(NamedTuple):
    """What a swap that is draining or queued means for a device."""

    need: int  # bytes that its target will take there
    coming: int  # bytes that victims will still free there
    drain: float  # expected seconds until it can use the device


@dataclass(slots=True)
class Swap:
    """A plan under way: ``victims`` that have not left yet, then ``target``."""

    target: Replica
    devices: tuple[int, ...]
    victims: dict[Replica, OffloadOption]
    deadline: float  # when victims' requests are frozen
    begun: float
    why: str
    unasked: bool  # nobody needs to wait for it: it is moved to where it fits better


class Swaps:
    """All swaps that are draining or queued; once the target's command is out there is nothing left to do."""

    def __init__(self, engines: EngineTable, replicas: dict[str, Replica], fit: Fit) -> None:
        self.engines = engines
        self._fit = fit
        self.replicas = replicas
        self._by_target: dict[Replica, Swap] = {}

    def __contains__(self, target: Replica) -> bool:
        return target in self._by_target

    def __len__(self) -> int:
        return len(self._by_target)

    def targets(self) -> Collection[Replica]:
        """The replicas that have a swap of their own."""
        return self._by_target.keys()

    def get(self, target: Replica) -> Swap | None:
        """The swap for ``target``, if there is one."""
        return self._by_target.get(target)

    def begin(self, plan: Plan) -> None:
        """Close the gates of the awake victims; sleepers are only stopped when their turn comes."""
        now, target = self.engines.now, self.replicas[plan.target]
        victims = {self.replicas[v.model]: v.option for v in plan.victims}
        self._by_target[target] = Swap(target, plan.devices, victims, now + plan.drain, now, plan.why, plan.unasked)
        if target in victims:
            target.moved = now
        reads_files = target.state is not State.SLEEPING or target.level == 2
        if reads_files and (victims or self.engines.holder(plan.devices)):  # the disk is idle until then
            sleepers = [r for r, option in victims.items() if option.level == 1 and r.level != 1]
            self.engines.hint(ReadAhead(target.id, sum([r.footprint.host for r in sleepers])))
        for r, option in victims.items():
            goal = "to start on another device" if r is target else f"to make room for {plan.target}"
            kind, freeze_at = (Kind.SLEEP, now + plan.drain) if option.level else (Kind.STOP, INFINITY)
            why, cut_at = f"{goal}: {plan.why}", now + r.drain_limit
            self.engines.ask(r, Job(kind, Reason.SWAP, why, now, option.level, freeze_at, cut_at, target=target))

    def left(self, r: Replica) -> None:
        """A victim gave up its memory (or died of it)."""
        for swap in self._by_target.values():
            swap.victims.pop(r, None)

    def cancel(self, target: Replica) -> None:
        """Nobody wants ``target`` any more: victims that have not left yet stay."""
        swap = self._by_target.pop(target, None)
        if swap:
            self.engines.hint(StopReadAhead(target.id))
            for r in swap.victims:
                self.engines.release(r)

    def lapsed(self) -> dict[Replica, str]:
        """Targets whose swap is not to be, and why: nobody waits, they cannot start now, or a victim stays."""
        why = {t: "nobody waits for it any more" for t, swap in self._by_target.items() if not _wanted(t, swap)}
        for t, swap in self._by_target.items():
            stays = [r.id for r in swap.victims if r.job is None or r.job.target is not t]
            if stays and t not in why:
                why[t] = f"{', '.join(stays)} is not to leave any more"
        return why

    def advance(self) -> list[Replica]:
        """Start or wake each target whose victims are gone and whose devices are at rest. Returns those targets."""
        moved = []
        for r, swap in list(self._by_target.items()):
            if swap.victims or self.engines.holder(swap.devices):
                continue
            del self._by_target[r]
            moved.append(r)
            if self._fit.has_room_on(r, swap.devices):
                self._launch(r, swap.devices)
            else:
                self.engines.record("replan", r, f"after the swap {self._fit.shortage(r, swap.devices)}")
                self.engines.hint(StopReadAhead(r.id))
        return moved

    def _launch(self, r: Replica, devices: tuple[int, ...]) -> None:
        """Wake it where it sleeps, or start it on ``devices``."""
        if r.state is State.SLEEPING:
            self.engines.wake(r)
        elif r.spec.when_free and devices:
            given = self._fit.grant(r, devices)
            self.engines.record("free", r, given.why, given.numbers)
            self.engines.start(r, devices, given.size)
        else:
            self.engines.start(r, devices)

    def claims(self) -> dict[int, Claim]:
        """The devices on which a swap is draining or queued."""
        claims: dict[int, Claim] = {}
        for swap in self._by_target.values():
            leaving = list(swap.victims)
            drain = max([self.drain_left(swap, r) for r in leaving if r.state in AWAKE], default=0.0)
            for index in {*swap.devices, *[index for r in leaving for index in r.placement.devices]}:
                if index in claims:
                    continue
                need, target = 0, swap.target
                if index in swap.devices:  # a target that is moved holds memory now, and will need that of a start
                    need = (target.booking if target in swap.victims else self._fit.need_on(target, index)) or 0
                coming = sum([swap.victims[r].frees for r in leaving if index in r.placement.devices])
                claims[index] = Claim(need, coming, drain)
        return claims

    def until_served(self, swap: Swap) -> float:
        """Expected seconds until the target serves."""
        target = swap.target
        drain = max([self._drained_in(swap, r) for r in swap.victims if r.state in AWAKE], default=0.0)
        leave = sum(option.takes for option in swap.victims.values())
        anew = target in swap.victims or target.state is not State.SLEEPING
        return drain + leave + target.costs.wake(0 if anew else target.level)

    def _drained_in(self, swap: Swap, r: Replica) -> float:
        """The same as ``drain_left``, but what runs longer than the victim's drain limit is cut off."""
        left = self.drain_left(swap, r)
        return left if r.job is None else min(left, max(0.0, r.job.cut_at - self.engines.now))

    def drain_left(self, swap: Swap, r: Replica) -> float:
        """Expected seconds until the victim's requests have ended. One that drained long will take long yet."""
        if not r.running:
            return 0.0
        expected = max(drain_time(r.costs.seconds("service"), len(r.running)), self.engines.now - swap.begun)
        return min(expected, max(0.0, swap.deadline - self.engines.now)) if r.freezable else expected


def _wanted(r: Replica, swap: Swap) -> bool:
    """Whether a swap still has a purpose: its target is waited for, or is moved, and can start or will be able to."""
    on_its_way = swap.unasked or r in swap.victims
    able = r.state in (State.STOPPED, State.SLEEPING) or (on_its_way and r.state in (State.READY, State.DRAINING))
    return (r.demand > 0 or swap.unasked) and (able or (on_its_way and r.state is State.STOPPING))
