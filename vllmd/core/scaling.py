"""How many of a model's replicas are to serve, and which of them are brought up (8.4, 8.5 in ``design.md``).

Two thresholds with a time each, as autoscalers have them, so that the number does not swing: one more after
``busy_for`` seconds of more than ``busy`` requests per replica, one fewer only where half of what one fewer could take
was enough for ``calm_for``. Nobody leaves for a second replica: it is a matter of comfort, and the eviction of another
model is not worth that. All of this is for models with ``replicas:`` only.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllmd.core.balancing import OFF, in_flight, load_time, resting
from vllmd.core.common import Core
from vllmd.core.health import HealthChecks
from vllmd.core.lifecycle import AWAKE, Reason
from vllmd.core.model import INFINITY, Model, Replica
from vllmd.core.planner import RECENT, Planner
from vllmd.core.types import ReplicaRules, State

ROOM_INTERVAL = 5.0  # seconds between two looks for room for another replica


class Scaling:
    """How many replicas of each model are wanted, and bringing up those that are missing."""

    def __init__(self, core: Core, planner: Planner, health: HealthChecks) -> None:
        self._core = core
        self._planner = planner
        self._health = health

    @property
    def due(self) -> float:
        """When time alone changes something for a model with several replicas."""
        return min([model.scale.due for model in self._core.balanced], default=INFINITY)

    def upkeep(self) -> Iterator[None]:
        """Probe replicas that have to show that they serve, and bring up as many as are wanted.

        It is for each model that was reviewed, or whose time has come. What a step has set in motion is settled before
        the next one, and may have models reviewed again.
        """
        core = self._core
        while models := {**core.for_upkeep, **{model: None for model in core.balanced if model.scale.due <= core.now}}:
            core.for_upkeep.clear()
            for model in models:
                if model.rules is None:
                    continue
                for r in model.replicas:
                    self._health.look_at(r)
                self._scale(model, model.rules)
                yield from self._bring_up(model, model.rules)
                model.scale.due = self._due(model, model.rules)
            yield

    # -- an operator's word

    def halt(self, r: Replica) -> None:
        """An operator took it down: it stays down while others serve. With the last of them all are free again."""
        if r.health is None:
            return
        r.health.halted = True
        healths = [other.health for other in r.model.replicas if other.health]
        if all(health.halted for health in healths):
            r.model.used = -INFINITY  # and none comes up before somebody asks
            for health in healths:
                health.halted = False

    def resume(self, r: Replica) -> None:
        """Let the replica come up again."""
        if r.health:
            r.health.halted = False

    def bring_up_soon(self, r: Replica) -> None:
        """Have the replica come up where it fits beside what is there: nobody leaves for a second one."""
        r.model.used = self._core.now
        if r.model.rules:
            r.model.scale.tried = -INFINITY

    def share_age(self, r: Replica) -> None:
        """A replica that is wanted is unused since the model's last use, whichever of them had it."""
        model = r.model
        if model.rules and r not in resting(model):
            busy = any(other.running for other in model.replicas)
            r.idle_since = max(r.idle_since, self._core.now if busy else model.used)

    # -- how many (8.4)

    def _scale(self, model: Model, rules: ReplicaRules) -> None:
        """One more or one fewer, when there was too much or too little for long enough."""
        scale, now, load = model.scale, self._core.now, _load(model)
        least, most = max(1, rules.least), len([r for r in model.replicas if r.spec.device_count])
        scale.wanted = max(least, min(scale.wanted, most))
        crowded = load > rules.busy * scale.wanted and scale.wanted < most
        calm = scale.wanted > least and load * 2 <= rules.busy * (scale.wanted - 1)
        scale.crowded = min(scale.crowded, now) if crowded else INFINITY
        scale.calm = min(scale.calm, now) if calm else INFINITY
        if scale.crowded + rules.busy_for <= now:
            scale.wanted, scale.crowded, scale.tried = scale.wanted + 1, INFINITY, -INFINITY
            what, why = "grow", f"{load} requests are more than {scale.wanted - 1} of its replicas"
        elif scale.calm + rules.calm_for <= now:
            scale.wanted, scale.calm = scale.wanted - 1, INFINITY
            what, why = "shrink", f"{load} requests are few enough for {scale.wanted} of its replicas"
        else:
            return
        self._core.engines.record(what, model, why, {"requests": load, "wanted": scale.wanted})

    # -- which (8.5)

    def _bring_up(self, model: Model, rules: ReplicaRules) -> Iterator[None]:
        """Bring up the missing replicas where they fit beside what is there; nobody leaves for them."""
        core, scale = self._core, model.scale
        if not self._in_use(model, rules) or core.now < scale.tried + ROOM_INTERVAL:
            return
        missing = list(self._missing(model, rules))
        if not missing:
            return
        scale.tried = core.now
        number = max(scale.wanted, rules.least)
        for r in missing:
            if r.state is State.FAILED:
                core.engines.forgive(r)
            why = f"{model.name} is to have {number} replicas here" if r.spec.device_count else f"{model.name} is used"
            # On a device of another replica it would not help, unless it is to use certain devices, or sleeps there.
            fixed = r.devices or r.state is State.SLEEPING
            taken = [index for other in model.replicas if other is not r for index in other.placement.devices]
            if self._planner.start_beside(r, Reason.REPLICA, why, core.now - RECENT, frozenset(() if fixed else taken)):
                yield

    def _missing(self, model: Model, rules: ReplicaRules) -> Iterator[Replica]:
        """The replicas to be brought up: all that take no device, and of the others as many as are wanted."""
        up = [r for r in model.replicas if r.state in AWAKE or r.state in (State.STARTING, State.WAKING)]
        short = max(model.scale.wanted, rules.least) - len([r for r in up if r.spec.device_count])
        off = [r for r in model.replicas if r.state in OFF and not (r.demand or r.leaving)]
        may = [r for r in off if not r.disabled_because and not (r.health and r.health.halted)]
        able = [r for r in may if r.retry_at <= self._core.now]
        for r in sorted(able, key=load_time):
            if not r.spec.device_count:
                yield r
            elif short > 0:
                short -= 1
                yield r

    def _in_use(self, model: Model, rules: ReplicaRules) -> bool:
        """Whether missing replicas are brought up: clients use the model, or somebody asked for it."""
        recently = self._core.now < model.used + rules.calm_for
        return recently or _load(model) > 0 or any(r.wanted_since is not None for r in model.replicas)

    # -- time

    def _due(self, model: Model, rules: ReplicaRules) -> float:
        """When time alone changes something for the model's replicas."""
        scale, now = model.scale, self._core.now
        due = min(scale.crowded + rules.busy_for, scale.calm + rules.calm_for)
        due = min([due, *(self._health.due(r) for r in model.replicas)])
        if self._in_use(model, rules):
            retries = [r.retry_at for r in model.replicas if r.state is State.FAILED and r.retry_at > now]
            due = min([due, *retries])
            if any(True for _ in self._missing(model, rules)):
                due = min(due, scale.tried + ROOM_INTERVAL)
        return due


def _load(model: Model) -> int:
    """Clients' requests that run or wait."""
    return sum(map(in_flight, model.replicas)) + len(model.queue)
