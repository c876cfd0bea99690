"""Which replica of a model is to have a request, or is to come up for those that wait (8.1). Decides; changes nothing.

A model without ``balancing`` has one replica: it takes every request, and is the nominee of every queue.

Among several, *power of two choices*: of two open replicas, taken at random, the request goes to the one with the
smaller product of slowness and requests in flight. Always taking the best one herds all requests onto whichever was
measured a little faster; two choices spread them and come close to the best (Mitzenmacher, 2001).

If none is open, one replica is *nominated* to come up for the queue: the one with the best outlook. The nomination is
found anew whenever something about the model changes, so ranks must be such that acting on a nomination does not make
another replica the nominee: what cannot come up now ranks behind all that can.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Sequence

from vllmd.core.engine_table import EngineTable
from vllmd.core.fit import Fit
from vllmd.core.model import INFINITY, HealthStatus, Model, Replica
from vllmd.core.policy_input import remaining
from vllmd.core.swaps import Swaps
from vllmd.core.types import State

SLOWNESS_FADES = 30.0  # seconds in which what is held against a replica falls to a third
ENOUGH_ANSWERS = 3  # from which on a replica's latency means something
DOUBTFUL = 5  # the rank of an ejected replica, or of one on its way out; that of a failed one is worse by one
OFF = frozenset({State.STOPPED, State.SLEEPING, State.FAILED})
SERVE = frozenset({HealthStatus.SERVING, HealthStatus.SLOW})
# Of several replicas' states the model's is the first one here that any of them has.
BEST_FIRST = (
    *(State.READY, State.DRAINING, State.WAKING, State.STARTING, State.FALLING_ASLEEP),
    *(State.SLEEPING, State.STOPPING, State.FAILED, State.STOPPED),
)
# How soon a model answers, by its state and the level at which it sleeps; any other state comes last.
SOONEST = (
    *((State.READY, 0), (State.WAKING, 1), (State.WAKING, 2), (State.STARTING, 0), (State.SLEEPING, 1)),
    *((State.FALLING_ASLEEP, 1), (State.FALLING_ASLEEP, 2), (State.DRAINING, 0), (State.SLEEPING, 2)),
    (State.STOPPED, 0),
)


class Balancer:
    """Power of two choices among those that serve; among those that do not, the one that will serve soonest."""

    def __init__(self, engines: EngineTable, swaps: Swaps, fit: Fit) -> None:
        self._engines = engines
        self._fit = fit
        self._swaps = swaps
        self._chance = random.Random(0)  # the same events lead to the same decisions

    def choose(self, model: Model, avoid: Collection[str] = ()) -> Replica | None:
        """Of two replicas that have a place, taken at random, the one that will answer sooner. None: none has."""
        if model.spec.balancing is None:
            only, most = model.replicas[0], model.replicas[0].spec.concurrency
            return only if only.state is State.READY and (most is None or len(only.running) < most) else None
        fit = [r for r in in_use(model) if not r.full and r.id not in avoid]
        pair = self._chance.sample(fit, min(2, len(fit)))
        now = self._engines.now
        return min(pair, key=lambda r: slowness(r, now) * (len(r.running) + 1), default=None)

    def nominee(self, model: Model, but: Replica | None = None, most: int = DOUBTFUL + 1) -> Replica | None:
        """The replica that may be the first to serve what waits now; None: all are down. ``most``: the worst rank."""
        if model.rules is None:
            return next(iter(model.replicas), None)
        outlooks = [(outlook, r) for r in model.replicas if r is not but and (outlook := self._outlook(r)) is not None]
        good = [(outlook, r) for outlook, r in outlooks if outlook[0] <= most]
        return min(good, key=lambda pair: pair[0], default=(None, None))[1]

    def _outlook(self, r: Replica) -> tuple[int, bool, float] | None:
        """A replica's rank, the smaller the better, the present nominee before others; None for one that is down."""
        now, other = self._engines.now, r.model.nominee is not r
        if down(r, now) or self._fit.never(r):
            return None
        once_open = {HealthStatus.NEW: 1, HealthStatus.EJECTED: DOUBTFUL}.get(health_status(r), 0)
        if r.state is State.READY:
            return once_open, other, len(r.running)
        if r.state in (State.STARTING, State.WAKING):
            return 1, other, remaining(r, now)
        if r in self._swaps:
            return 2, other, 0.0
        if r.state is State.DRAINING and r.job and r.job.yields:
            # Not better than once its gate is open again: else an ejected one would be nominated, opened, passed over,
            # drained for its proof and nominated again, for ever.
            return max(2, once_open), other, 0.0
        if r.state in OFF and self._fit.unknown(r) and not self._engines.ledger.asking:
            # 9.1: it cannot come up. Ranked as high as one that can, two such would be nominated in turn for ever.
            return DOUBTFUL + 1, other, 0.0
        if r.state in OFF and r.retry_at <= now:
            return 3 if self._fit.has_room(r) else 4, other, load_time(r)
        return DOUBTFUL + (r.state is State.FAILED), other, r.retry_at


# -- who gets a request


def in_use(model: Model) -> list[Replica]:
    """Replicas that get requests; else those at rest; else those set aside for being slow: better late than never."""
    ready = [r for r in model.replicas if r.state is State.READY]
    serving = [r for r in ready if health_status(r) is HealthStatus.SERVING]
    spare = resting(model)
    return (
        [r for r in serving if r not in spare] or serving or [r for r in ready if health_status(r) is HealthStatus.SLOW]
    )


def resting(model: Model) -> list[Replica]:
    """Replicas that serve beyond what is wanted: they get nothing, so that their idle rules take their course."""
    if model.rules is None:
        return []
    up = [r for r in model.replicas if r.spec.device_count and r.state is State.READY]
    return up[max(model.scale.wanted, model.rules.least) :]


def slowness(r: Replica, now: float) -> float:
    """How many times later than the fastest's its answers begin. It falls towards 1 as it ages, and is tried anew.

    Streams are held against streams, whole answers against whole ones: those take as long as they are.
    """
    if r.health is None or not r.health.latencies:
        return 1.0
    known = r.health.latencies.items()
    ratios = [latency.value / (fastest(r.model, streamed) or latency.value) for streamed, latency in known]
    return 1.0 + (max(1.0, *ratios) - 1.0) * math.exp(-max(0.0, now - r.health.seen) / SLOWNESS_FADES)


def fastest(model: Model, streamed: bool, but: Replica | None = None) -> float | None:
    """Seconds to the first byte of the fastest that serves, by more than a few answers; None if none is known."""
    serving = [r for r in model.replicas if r is not but and r.is_on and health_status(r) is HealthStatus.SERVING]
    known = [r.health.latencies.get(streamed) for r in serving if r.health]
    return min([latency.value for latency in known if latency and latency.answers >= ENOUGH_ANSWERS], default=None)


def quickest(but: Replica) -> float | None:
    """Seconds of the quickest probe of the others that serve; None if no other does."""
    others = [r.health for r in but.model.replicas if r is not but and r.health and r.state is State.READY]
    known = [health.took for health in others if health.status is HealthStatus.SERVING]
    return min([took for took in known if took is not None], default=None)


def health_status(r: Replica) -> HealthStatus:
    """The health that a replica's answers have earned it."""
    return r.health.status if r.health else HealthStatus.SERVING


# -- which of its replicas a model is judged by


def best(replicas: Sequence[Replica]) -> Replica:
    """The one that serves, or is nearest to serving."""
    return min(replicas, key=lambda r: (not serves(r), BEST_FIRST.index(r.state)))


def serves(r: Replica) -> bool:
    """Whether it gets requests, or would if it were needed."""
    return r.state is State.READY and (not r.model.rules or r in resting(r.model) or health_status(r) in SERVE)


def level(r: Replica) -> int:
    """At which it sleeps, is put to sleep, or was asleep when it was woken; else 0."""
    return r.level if r.state in (State.SLEEPING, State.WAKING, State.FALLING_ASLEEP) else 0


# -- who does not


def down(r: Replica, now: float) -> bool:
    """Whether the replica serves no request that comes now: it is gone, failed for good, or failed several probes."""
    if r.removed or r.disabled_because or (r.health and r.health.halted):
        return True
    if r.state is State.FAILED:
        return r.given_up and r.retry_at > now
    if r.health is None or r.model.rules is None:
        return False
    ejected = r.is_on and r.health.status is HealthStatus.EJECTED
    return ejected and r.health.failed > r.model.rules.retries


def ailment(r: Replica) -> str:
    """Why a replica does not serve although it should; "" if nothing is wrong with it."""
    if r.disabled_because:
        return f"disabled: {r.disabled_because}"
    if r.state is State.FAILED:
        return r.failure
    return r.health.why if r.health and r.state is State.READY else ""


def back_in(replicas: Iterable[Replica], now: float) -> float:
    """Seconds until the first that has failed may be tried again, at least one."""
    again = min((r.retry_at for r in replicas if r.state is State.FAILED), default=-INFINITY)
    return max(1.0, again - now)


def in_flight(r: Replica) -> int:
    """Clients' requests in its engine: a probe is not one."""
    return len(r.running) - (r.health is not None and r.health.probe in r.running)


def load_time(r: Replica) -> float:
    """Seconds until it serves; none for one that runs elsewhere."""
    return r.load_time if r.spec.device_count else 0.0
