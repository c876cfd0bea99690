"""The interface of all policies: what they may know, what they may answer. ``policies.py`` has those that ship.

A policy is a pure function of a :class:`PolicyInput`. It never sees the
scheduler's state, only this frozen view of it, and answers with at most one
:class:`Plan`; the scheduler asks again, with the view changed by the plan,
until the answer is None. All times are seconds on the core's clock, all
sizes bytes per device. The views are named tuples, not dataclasses, because
they are made anew for every change of a model and a policy must cost
microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

INFINITY = math.inf


class OffloadOption(NamedTuple):
    """One way to take a model off its devices, and what it costs to have it back."""

    level: int  # 1 or 2: sleep at that level; 0: stop
    frees: int  # bytes that come free on each of its devices
    takes: float  # seconds until they are free
    back: float  # seconds to have it serve again afterwards
    learnt: float = 0.0  # of ``takes``, what was measured: nothing until it was done once


class Resident(NamedTuple):
    """A model that holds device memory and may be made to give it up (so: not pinned, not leased, not moving)."""

    model: str
    devices: tuple[int, ...]
    asleep: bool  # it sleeps, and holds only a sleeper's remainder; its one way is to stop
    options: tuple[OffloadOption, ...]  # the preferred one first, stopping last
    since: float  # when it became ready
    used: float  # when a request last came or ended
    running: int  # requests in its engine
    queued: int  # requests that wait for a place in it
    service: float  # learnt seconds per request
    rate: float  # arrivals per second, as of rate_at; falls by e in 60 s without one
    rate_long: float  # the same over a long time: falls by e in 900 s
    rate_at: float
    freezable: bool  # its running requests may be frozen
    refrozen: bool  # one of them was frozen twice already
    priority: float
    drain_limit: float = INFINITY  # seconds after which its running requests are cut
    began: float = INFINITY  # when the oldest of its running requests was admitted
    need: int = 0  # bytes on each device for a start elsewhere
    allowed: tuple[int, ...] = ()  # devices on which it may be; empty: it is not to be moved
    displaced: bool = False  # it sleeps because another one needed its place
    moved: float = -INFINITY  # when it was last moved to another device


class Waiting(NamedTuple):
    """A model that is wanted and not on. A load that an operator asked for counts as one request."""

    model: str
    waiters: int  # requests that wait for it, those frozen in its sleeping engine included
    arrived: float  # sum of their times of queueing: the sum of their ages is waiters * now - arrived
    oldest: float  # when the oldest of them came
    load: float  # seconds to have it serve: a wake or a cold start
    sleep: float  # seconds to put it to sleep again
    service: float  # learnt seconds per request
    need: int  # bytes it needs on each device beyond what it holds there; negative if it holds more (a measurement)
    devices: tuple[int, ...]  # where it may go; for a sleeper, where it is
    span: int  # how many of them it takes; 0: none at all
    priority: float
    impatient: bool  # on_busy: evict, or an operator asked for it: it has no patience with busy ones
    learnt: float = 0.0  # of ``load``, what was measured: nothing until it was done once
    needs: tuple[int, ...] = ()  # the need on each of ``devices`` where they differ; ``need`` is then the least
    urged: bool = False  # an operator asked for it: not even those that were just loaded are spared
    move: Move | None = None  # of a sleeper that may serve elsewhere as well

    @property
    def held_back(self) -> bool:
        """Whether it waits for others to leave devices free: there is none that it may use now."""
        return self.span > 0 and not self.devices

    def need_on(self, device: int) -> int:
        """Bytes that it needs on this one of its devices."""
        return self.needs[self.devices.index(device)] if self.needs else self.need

    def without(self, devices: frozenset[int]) -> Waiting:
        """The same, not on these."""
        left = tuple(index for index in self.devices if index not in devices)
        return self._replace(devices=left, needs=tuple(map(self.need_on, left)) if self.needs else ())


class Move(NamedTuple):
    """How a sleeper could serve elsewhere: stopped where it is, and started there."""

    stop: OffloadOption
    there: Waiting  # the same, where it could go; ``load`` is then for both


class DeviceSupply(NamedTuple):
    """A device that can be used. Wedged ones are not shown."""

    device: int  # its index
    free: int  # bytes free for a newcomer, the reserve, external memory and claims subtracted; may be negative
    sleepable: int  # bytes that would be free if all that are awake or on the move there slept (pinned ones stay)
    until: float  # when the start, wake, sleep or stop under way on it ends, as expected; 0 if none is
    claimed: bool  # a swap is draining or queued there
    drain: float  # where claimed: expected seconds until that swap can use the device
    links: frozenset[int] = frozenset()  # devices that it is joined with directly
    node: int | None = None  # its NUMA node
    switch: str = ""  # of PCIe, above it


class Tenants(NamedTuple):
    """The residents that are on one device."""

    awake: tuple[Resident, ...] = ()
    asleep: tuple[Resident, ...] = ()
    idle: int = 0  # bytes that come free if all that are awake and idle sleep
    takes: float = 0.0  # seconds until these sleep, one after the other
    pressed: bool = False  # a busy one may have to leave before the deadline: it can be frozen, or has a drain limit
    light: int = 0  # bytes that come free if those that sleep, and start quickly, stop

    @classmethod
    def of(cls, residents: Collection[Resident]) -> Tenants:
        """What there is to say of these."""
        awake, asleep, frees, takes, pressed, quick = [], [], 0, 0.0, False, 0
        for r in residents:
            if r.asleep:
                asleep.append(r)
                if r.options[-1].back < LIGHT:
                    quick += r.options[-1].frees
                continue
            awake.append(r)
            if not r.running and not r.queued:
                frees += r.options[0].frees
                takes += r.options[0].takes
            elif r.freezable or r.drain_limit < INFINITY:
                pressed = True
        return cls(tuple(awake), tuple(asleep), frees, takes, pressed, quick)

    @property
    def all(self) -> tuple[Resident, ...]:
        """The replicas that hold memory of devices, awake or asleep."""
        return (*self.awake, *self.asleep)


LIGHT = 30.0  # seconds: half of the deadline


def light(r: Resident) -> bool:
    """A sleeper that starts so quickly that it may be stopped rather than that a busy one is waited for."""
    return r.asleep and r.options[-1].back < LIGHT


class PolicyInput(NamedTuple):
    """All that a policy may know."""

    now: float
    waiting: Sequence[Waiting]  # oldest first
    tenants: Mapping[int, Tenants]  # by index of their device; none of one that has none
    supplies: Mapping[int, DeviceSupply]  # by index
    knobs: Knobs

    @property
    def residents(self) -> list[Resident]:
        """Each once, though it may be on several devices."""
        return list({r.model: r for tenants in self.tenants.values() for r in tenants.all}.values())

    def on(self, devices: Sequence[int]) -> Sequence[Resident]:
        """The residents on any of these devices, each once."""
        if len(devices) == 1:
            return self.tenants.get(devices[0], NOBODY).all
        return list({r.model: r for index in devices for r in self.tenants.get(index, NOBODY).all}.values())


NOBODY = Tenants()


class Knobs(NamedTuple):
    """The numbers of the policy; ``design.md`` tells how they were found."""

    deadline: float = 60.0  # a waiter older than this, or than all who wait need to be served, asks no price: ...
    drains: float = 2.0  # ... their loads and sleeps, and for each so many of its requests
    dear: float = 24.0  # seconds that all swaps waited for take together, from which on nobody overtakes
    kappa: float = 0.25  # the share of a plan's price that must have been waited where requests are to be frozen
    patience: float = 40.0  # how many times dearer regret is where running requests must be drained: see Adaptive
    residency: float = 1.0  # q: a busy model stays for so many times what the swap costs
    budgets: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)  # drain budgets tried where requests can be frozen
    used: float = 300.0  # seconds for which a model counts as being used after its last request
    again: float = 20.0  # a model is moved again only after so many times what its start takes
    victims: int = 4  # so many are searched for the best set; more leave only where fewer are not enough


class Victim(NamedTuple):
    """A model that leaves, and how."""

    model: str
    option: OffloadOption


class Plan(NamedTuple):
    """Bring ``target`` onto ``devices`` after ``victims`` have left.

    ``drain``: seconds that the victims' running requests get before they are
    frozen; infinite: they finish. A target among its own victims is stopped
    where it sleeps, and started on ``devices``. ``numbers`` and ``why`` are for the record.
    """

    target: str
    devices: tuple[int, ...]
    victims: tuple[Victim, ...] = ()
    drain: float = INFINITY
    why: str = ""
    numbers: Mapping[str, float | int | str] = {}
    unasked: bool = False  # nobody waits for it: it is moved while that costs nobody anything


class Outlook(NamedTuple):
    """What is to happen for a waiter for whom nothing has begun."""

    seconds: float  # until it serves, as expected, at the latest
    why: str  # what it waits for, readable


def running_there(number: int) -> str:
    """So many requests in brackets, to be put behind the names of victims; "" for none."""
    return f" ({number} request{'s run' if number > 1 else ' runs'} there)" if number else ""


class Policy(Protocol):
    """What the scheduler asks of a policy."""

    name: str
    moves: bool  # models that are being used are moved to where they fit beside each other

    def choose(self, s: PolicyInput) -> Plan | None:
        """The next swap to begin (one without victims is a plain start or wake), or None: not yet."""

    def outlook(self, s: PolicyInput, model: str) -> Outlook | None:
        """What one of those who wait is waiting for; None: it cannot be said."""


def drain_time(service: float, running: int) -> float:
    """Expected seconds until ``running`` requests have ended: the longest of so many exponential ones, nearly."""
    return service * (1 + math.log(running) / 2) if running else 0.0
