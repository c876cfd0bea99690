"""Models and their replicas, as operators name and see them.

The scheduler knows engines. A model with one engine has the same name; of several
replicas ``NAME@1`` is the first (the scheduler calls it by the model's name), then
come ``NAME@2`` and so on, or what the configuration calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vllmd.config.types import ModelConfig
from vllmd.core.types import ModelView, State
from vllmd.errors import UnknownModel

# Of several replicas' states the model's is the first one here that any of them has.
BEST_FIRST = (
    *(State.READY, State.DRAINING, State.WAKING, State.STARTING, State.FALLING_ASLEEP),
    *(State.SLEEPING, State.STOPPING, State.FAILED, State.STOPPED),
)
SERVES = frozenset({"serving", "resting", "slow"})


class Roster:
    """The engines of each model."""

    def __init__(self, models: Mapping[str, ModelConfig]) -> None:
        self._replicas: dict[str, dict[str, str]] = {}  # model -> what its replicas are called -> engine
        for name, model in models.items():
            if model.replicas:
                called = [one.name for one in model.replicas.of]
                self._replicas[name] = dict(zip(called, [name, *called[1:]], strict=True))
        self._called = {called: engine for own in self._replicas.values() for called, engine in own.items()}
        self._models = {engine: name for name, own in self._replicas.items() for engine in own.values()}
        self._names = {engine: called for called, engine in self._called.items()}

    def is_replica(self, name: str) -> bool:
        """Whether that is what a replica is called."""
        return name in self._called

    def resolve(self, name: str, model_of: Callable[[str], str]) -> str:
        """The configured name of a model, or what a replica is called. ``model_of`` knows the names of models.

        A replica may also be called ``ALIAS@2``, or by the end of its model's name.
        """
        if name in self._called:
            return name
        short, _, label = name.rpartition("@")
        try:
            return model_of(name)
        except UnknownModel:
            if not short or (called := f"{model_of(short)}@{label}") not in self._called:
                raise
            return called

    def called(self, engine: str) -> str:
        """What operators call an engine."""
        return self._names.get(engine, engine)

    def model(self, name: str) -> str:
        """The model of which that is the name, or what one of its replicas is called."""
        return self._models.get(self._called.get(name, name), name)

    def labels(self, engine: str) -> tuple[str, str]:
        """The model of an engine, and what the engine is called if it is one of several, else ""."""
        return self._models.get(engine, engine), self._names.get(engine, "")

    def engines(self, name: str) -> tuple[str, ...]:
        """The engines of a model, or the one of a replica."""
        if name in self._called:
            return (self._called[name],)
        return tuple(self._replicas[name].values()) if name in self._replicas else (name,)

    def together(self, views: Iterable[ModelView]) -> list[tuple[ModelView, tuple[ModelView, ...]]]:
        """Each model's view, with those of its replicas (none for one that is its only engine)."""
        found: dict[str, list[ModelView]] = {}
        for view in views:
            found.setdefault(view.replica_of or view.name, []).append(view)
        return [self._merged(name, own) if name in self._replicas else (own[0], ()) for name, own in found.items()]

    def _merged(self, name: str, views: Iterable[ModelView]) -> tuple[ModelView, tuple[ModelView, ...]]:
        own = tuple(replace(view, name=self.called(view.name)) for view in self._in_order(name, views))
        return merged(name, own), own

    def _in_order(self, name: str, views: Iterable[ModelView]) -> list[ModelView]:
        """As configured; one that a reload took away, and that has not gone yet, comes last."""
        order = {engine: place for place, engine in enumerate(self._replicas[name].values())}
        return sorted(views, key=lambda view: order.get(view.name, len(order)))


def merged(name: str, views: Sequence[ModelView]) -> ModelView:
    """Several replicas as one model: in the state of the best of them, with all their requests and memory."""
    best = min(views, key=lambda view: (not serves(view), BEST_FIRST.index(view.state)))
    idle = [view.idle for view in views if view.idle is not None]
    waits = [view.oldest_wait for view in views if view.oldest_wait is not None]
    up = any(map(serves, views))
    latencies = [view.latency for view in views if view.latency is not None and serves(view)]
    return replace(
        best,
        name=name,
        devices=tuple(sorted({index for view in views for index in view.devices})),
        memory=sum(view.memory for view in views),
        in_flight=sum(view.in_flight for view in views),
        queued=sum(view.queued for view in views),
        oldest_wait=max(waits, default=None),
        idle=min(idle, default=None) if len(idle) == len([view for view in views if view.devices]) else None,
        pinned=all(view.pinned for view in views),
        leases=tuple(lease for view in views for lease in view.leases),
        waiting_for=next((view.waiting_for for view in views if view.waiting_for and (view.queued or not up)), ""),
        failure="; ".join(f"{view.name}: {view.failure}" for view in views if view.failure and not serves(view)),
        latency=min(latencies, default=None),
    )


def serves(view: ModelView) -> bool:
    """Whether a replica gets requests, or would if it were needed."""
    return view.state is State.READY and view.standing in SERVES


def degraded(views: Iterable[ModelView]) -> bool:
    """Whether a replica is down that ought to serve."""
    return any(view.state is State.FAILED or view.standing in ("slow", "ejected") for view in views)
