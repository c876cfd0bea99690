"""The replicas of one model, and which of them is to have a request. Decides; changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

from vllmd.core.ledger import Ledger
from vllmd.core.lifecycle import AWAKE
from vllmd.core.model import INFINITY, Model, Standing
from vllmd.core.possible import has_room, never_fits
from vllmd.core.situation import remaining
from vllmd.core.types import ReplicaRules, State

FORGET = 30.0  # seconds in which what is held against a replica falls to a third
ENOUGH = 3  # answers from which a replica's latency means something
QUICK = 0.1  # seconds; whoever answers sooner is not slow, however fast the others are
DOUBTFUL = 5  # the outlook of one that was ejected, or is on its way out; that of a failed one is worse
OFF = frozenset({State.STOPPED, State.SLEEPING, State.FAILED})


class Group:
    """One model's replicas, in the order of the configuration; the first bears the model's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[Model] = []
        self.wanted = 1  # how many of those that take devices are to serve
        self.used = -INFINITY  # when a request last came
        self.crowded = INFINITY  # since when there is too much for those who serve
        self.calm = INFINITY  # since when one fewer would be enough
        self.tried = -INFINITY  # when one was last looked for room for
        self.due = INFINITY  # when time alone changes something
        self._chance = random.Random(0)  # the same events lead to the same decisions

    @property
    def rules(self) -> ReplicaRules:
        """What all of them have alike."""
        return self.members[0].spec.replicas

    # -- who gets a request

    def choose(self, avoid: Iterable[str], now: float) -> Model | None:
        """Power of two choices: of two open ones, taken at random, the one that will answer sooner. None: none is."""
        fit = [m for m in self._open() if not m.full and m.name not in avoid]
        pair = self._chance.sample(fit, min(2, len(fit)))
        return min(pair, key=lambda m: self.slowness(m, now) * (len(m.running) + 1), default=None)

    def takes(self, m: Model) -> bool:
        """Whether ``m`` is among those who get requests now."""
        return any(each is m for each in self._open())

    def _open(self) -> list[Model]:
        """Those in use; else those at rest; else those set aside for being slow: better late than never."""
        ready = [m for m in self.members if m.state is State.READY]
        serving = [m for m in ready if standing(m) is Standing.SERVING]
        resting = self.resting()
        return [m for m in serving if m not in resting] or serving or [m for m in ready if standing(m) is Standing.SLOW]

    def resting(self) -> list[Model]:
        """Those who serve beyond what is wanted: they get nothing, so that their idle rules take their course."""
        up = [m for m in self.members if m.spec.device_count and m.state is State.READY]
        return up[max(self.wanted, self.rules.least) :]

    def slowness(self, m: Model, now: float) -> float:
        """How many times later than the fastest's its answers begin. It falls towards 1 as it ages, and is tried anew.

        Streams are held against streams, whole answers against whole ones: those take as long as they are.
        """
        r = m.replica
        if r is None or not r.latencies:
            return 1.0
        ratios = [latency.value / (self.fastest(kind) or latency.value) for kind, latency in r.latencies.items()]
        return 1.0 + (max(1.0, *ratios) - 1.0) * math.exp(-max(0.0, now - r.seen) / FORGET)

    def fastest(self, streamed: bool, but: Model | None = None) -> float | None:
        """Seconds to the first byte of the fastest that serves, by more than a few answers; None if none is known."""
        serving = [m for m in self.members if m is not but and m.on and standing(m) is Standing.SERVING]
        known = [m.replica.latencies.get(streamed) for m in serving if m.replica]
        return min([latency.value for latency in known if latency and latency.answers >= ENOUGH], default=None)

    def quickest(self, but: Model) -> float | None:
        """Seconds of the quickest probe of those that serve; None if no other does."""
        others = [m.replica for m in self.members if m is not but and m.replica and m.state is State.READY]
        known = [r.took for r in others if r.standing is Standing.SERVING]
        return min([took for took in known if took is not None], default=None)

    # -- who may serve yet

    def heir(self, ledger: Ledger, now: float) -> Model | None:
        """The one that may be the first to serve who waits now; None: all are down."""
        return self._likeliest(self.members, ledger, now, DOUBTFUL + 1)

    def better(self, m: Model, ledger: Ledger, now: float, *, doubtful: bool = False) -> Model | None:
        """One to wait for instead of ``m``, which does not serve and is not about to; perhaps a ``doubtful`` one."""
        others = [other for other in self.members if other is not m]
        return self._likeliest(others, ledger, now, DOUBTFUL + 1 if doubtful else DOUBTFUL - 1)

    def _likeliest(self, among: Iterable[Model], ledger: Ledger, now: float, most: int) -> Model | None:
        outlooks = [(outlook, m) for m in among if (outlook := self._outlook(m, ledger, now)) and outlook[0] <= most]
        return min(outlooks, key=lambda pair: pair[0], default=(None, None))[1]

    def _outlook(self, m: Model, ledger: Ledger, now: float) -> tuple[int, float] | None:
        """The smaller the better; None for one that is down."""
        if self.down(m, now) or never_fits(ledger, m):
            return None
        if m.state is State.READY:
            rank = {Standing.NEW: 1, Standing.EJECTED: DOUBTFUL}.get(standing(m), 0)
            return rank, len(m.running) + len(m.queue)
        if m.state in (State.STARTING, State.WAKING):
            return 1, remaining(m, now)
        if m.state is State.DRAINING and m.leave and m.leave.yields:
            return 2, 0.0
        if m.state in OFF and m.retry_at <= now:
            return 3 if has_room(ledger, m) else 4, load_time(m)
        return DOUBTFUL + (m.state is State.FAILED), m.retry_at

    def down(self, m: Model, now: float) -> bool:
        """It will not serve whoever comes now: it is gone, has failed for good, or failed one probe after another."""
        if m.removed or (m.replica and m.replica.halted):
            return True
        if m.state is State.FAILED:
            return m.given_up and m.retry_at > now
        ejected = m.state is State.READY and standing(m) is Standing.EJECTED
        return ejected and m.replica is not None and m.replica.failed > self.rules.retries

    def trouble(self) -> str:
        """What is wrong with each that is down, for whoever is refused."""
        return "; ".join(f"{m.name}: {why}" for m in self.members if (why := ailment(m)))

    # -- how many are wanted

    @property
    def local(self) -> list[Model]:
        """Those that take devices here."""
        return [m for m in self.members if m.spec.device_count and not m.removed]

    @property
    def load(self) -> int:
        """Clients' requests that run or wait."""
        return sum(in_flight(m) + len(m.queue) for m in self.members)

    @property
    def up(self) -> list[Model]:
        """Those with an engine that serves, or is on its way to."""
        return [m for m in self.members if m.state in AWAKE or m.state in (State.STARTING, State.WAKING)]

    def taken(self, m: Model) -> frozenset[int]:
        """Devices on which another one would not help: those of the others, unless ``m`` is to use certain ones."""
        if m.spec.devices or m.state is State.SLEEPING:
            return frozenset()
        return frozenset(index for other in self.members if other is not m for index in other.placement.devices)

    def missing(self, now: float) -> Iterator[Model]:
        """Those that ought to be brought up: all that take no device, and of the others as many as are wanted."""
        short = max(self.wanted, self.rules.least) - len([m for m in self.up if m.spec.device_count])
        off = [m for m in self.members if m.state in OFF and not (m.demand or m.leave or m.asked or m.removed)]
        able = [m for m in off if m.retry_at <= now and not (m.replica and m.replica.halted)]
        for m in sorted(able, key=load_time):
            if not m.spec.device_count:
                yield m
            elif short > 0:
                short -= 1
                yield m


def in_flight(m: Model) -> int:
    """Clients' requests in its engine: a probe is not one."""
    return len(m.running) - (m.replica is not None and m.replica.probe in m.running)


def load_time(m: Model) -> float:
    """Seconds until it serves; none for one that runs elsewhere."""
    return m.costs.wake(m.level if m.state is State.SLEEPING else 0) if m.spec.device_count else 0.0


def standing(m: Model) -> Standing:
    """What its answers have earned it."""
    return m.replica.standing if m.replica else Standing.SERVING


def ailment(m: Model) -> str:
    """Why a replica does not serve although it should; "" if nothing is wrong with it."""
    if m.state is State.FAILED:
        return m.failure
    return m.replica.why if m.replica and m.state is State.READY else ""
