"""How many of a model's replicas are to serve, and which of them are brought up (8.4, 8.5 in ``design.md``)."""

from __future__ import annotations

from collections.abc import Iterator

from vllmd.core.balancing import OFF, in_flight, load_time, resting
from vllmd.core.common import Core
from vllmd.core.health import HealthChecks
from vllmd.core.lifecycle import AWAKE, Reason
from vllmd.core.model import INFINITY, Model, Replica
from vllmd.core.planner import RECENT, Planner
from vllmd.core.types import ReplicaRules, State

AGAIN = 5.0  # seconds between two looks for room for another replica


class Scaling:
    """Of models that have ``balancing``; nothing here applies to the others."""

    def __init__(self, core: Core, planner: Planner, health: HealthChecks) -> None:
        self._core = core
        self._planner = planner
        self._health = health

    @property
    def due(self) -> float:
        """When time alone changes something for one of them."""
        return min([model.scale.due for model in self._core.balanced], default=INFINITY)

    def upkeep(self) -> Iterator[None]:
        """Probe who has to show himself, bring up as many as are wanted.

        What a step has set in motion is carried out before the next one.
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

    def wish(self, r: Replica) -> None:
        """Have the replica come up where it fits beside what is there: nobody leaves for a second one."""
        r.model.used, r.model.scale.tried = self._core.now, -INFINITY

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
        scale.crowded = self._since(scale.crowded, load > rules.busy * scale.wanted and scale.wanted < most)
        fewer = scale.wanted > least and load * 2 <= rules.busy * (scale.wanted - 1)
        scale.calm = self._since(scale.calm, fewer)
        if scale.crowded + rules.busy_for <= now:
            scale.wanted, scale.crowded, scale.tried = scale.wanted + 1, INFINITY, -INFINITY
            self._record("grow", model, load, f"more than {scale.wanted - 1}")
        elif scale.calm + rules.calm_for <= now:
            scale.wanted, scale.calm = scale.wanted - 1, INFINITY
            self._record("shrink", model, load, f"few enough for {scale.wanted}")

    def _since(self, before: float, holds: bool) -> float:
        return min(before, self._core.now) if holds else INFINITY

    def _record(self, what: str, model: Model, load: int, are: str) -> None:
        numbers = {"requests": load, "wanted": model.scale.wanted}
        self._core.engines.record(what, model, f"{load} requests are {are} of its replicas", numbers)

    # -- which (8.5)

    def _bring_up(self, model: Model, rules: ReplicaRules) -> Iterator[None]:
        """Bring up the missing replicas where they fit beside what is there; nobody leaves for them."""
        core, scale = self._core, model.scale
        if not self._in_use(model, rules) or core.now < scale.tried + AGAIN:
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
            if self._planner.bring(r, Reason.REPLICA, why, core.now - RECENT, _taken(r)):
                yield

    def _missing(self, model: Model, rules: ReplicaRules) -> Iterator[Replica]:
        """The replicas to be brought up: all that take no device, and of the others as many as are wanted."""
        up = [r for r in model.replicas if r.state in AWAKE or r.state in (State.STARTING, State.WAKING)]
        short = max(model.scale.wanted, rules.least) - len([r for r in up if r.spec.device_count])
        off = [r for r in model.replicas if r.state in OFF and not (r.demand or r.leaving)]
        able = [r for r in off if r.retry_at <= self._core.now and not r.off and not (r.health and r.health.halted)]
        for r in sorted(able, key=load_time):
            if not r.spec.device_count:
                yield r
            elif short > 0:
                short -= 1
                yield r

    def _in_use(self, model: Model, rules: ReplicaRules) -> bool:
        recently = self._core.now < model.used + rules.calm_for
        return recently or _load(model) > 0 or any(r.start_asked is not None for r in model.replicas)

    # -- time

    def _due(self, model: Model, rules: ReplicaRules) -> float:
        scale, now = model.scale, self._core.now
        due = min(scale.crowded + rules.busy_for, scale.calm + rules.calm_for)
        due = min([due, *(self._health.due(r) for r in model.replicas)])
        if self._in_use(model, rules):
            retries = [r.retry_at for r in model.replicas if r.state is State.FAILED and r.retry_at > now]
            due = min([due, *retries])
            if any(True for _ in self._missing(model, rules)):
                due = min(due, scale.tried + AGAIN)
        return due


def _load(model: Model) -> int:
    """Clients' requests that run or wait."""
    return sum(map(in_flight, model.replicas)) + len(model.queue)


def _taken(r: Replica) -> frozenset[int]:
    """Devices on which it would not help: those of the others, unless it is to use certain ones."""
    if r.devices or r.state is State.SLEEPING:
        return frozenset()
    return frozenset(index for other in r.model.replicas if other is not r for index in other.placement.devices)
