"""What people ask: load, sleep, stop, pins, leases, a new configuration (3 in ``design.md``)."""

from __future__ import annotations

from collections.abc import Iterable

from vllmd.core.admission import Admission
from vllmd.core.common import Core
from vllmd.core.events import (
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    ModelsChanged,
    PinSet,
    SleepAsked,
    StopAsked,
)
from vllmd.core.model import INFINITY, Leave, Model
from vllmd.core.replicas import Replicas
from vllmd.core.types import ModelSpec, State


class Wishes:
    """An operator's word is done, drained first; only force cuts."""

    def __init__(self, core: Core, admission: Admission, replicas: Replicas) -> None:
        self._core = core
        self._admission = admission
        self._replicas = replicas
        self.preload: dict[str, Model] = {}  # to be loaded where they fit, in order
        self.preloading = False  # not before TimePassed: what already runs is adopted first

    def begin(self, specs: Iterable[ModelSpec]) -> None:
        """The models of the first configuration."""
        names = [self.add(spec).name for spec in specs]
        self._replicas.regroup(names)

    def load(self, e: LoadAsked) -> None:
        """3.1: wanted, as by a request; a failure's back-off does not count for an operator."""
        m = self._core.model(e.model)
        self._core.touch(m)
        self._replicas.resume(m)
        m.asked, m.deepen = None, False
        if m.leave and m.leave.cause != "exchange":
            self._core.stay(m)
        if m.state is State.FAILED:
            self._core.fleet.forgive(m)
        group = self._core.group_of(m)
        if e.beside and group:
            group.used, group.tried = self._core.now, -INFINITY
        elif m.state is not State.READY and m.wanted is None:
            m.wanted = self._core.now

    def sleep(self, e: SleepAsked) -> None:
        """3.2: level 3 stops."""
        if e.level not in (1, 2):
            self.stop(StopAsked(e.model))
            return
        m = self._core.model(e.model)
        m.wanted = None
        self._replicas.halt(m)
        self._core.leave(m, Leave(e.level, "operator", "an operator asked for it", cut_at=self._core.cut_at(m)))

    def stop(self, e: StopAsked) -> None:
        """3.3: who waits now is told; who comes later starts it anew. A failure is forgotten."""
        m = self._core.model(e.model)
        self._replicas.halt(m)
        self._admission.forsake(m, "Unavailable", f"{m.name!r} was stopped by an operator", 1.0)
        m.failures, m.failure, m.given_up, m.room_retried, m.sleep_failures = 0, "", False, False, 0
        if m.state is State.FAILED:
            self._core.fleet.forgive(m)
        if e.force:
            self._force(m)
        else:
            self._core.leave(m, Leave(0, "operator", "an operator asked for it", cut_at=self._core.cut_at(m)))

    def _force(self, m: Model) -> None:
        """At once if it is the one that moves; else as soon as its devices are at rest."""
        self._core.fleet.cut(m, "the model was stopped by force")
        leave = Leave(0, "operator", "an operator forced it", kill=True)
        if m.state in (State.STARTING, State.FALLING_ASLEEP, State.WAKING):
            self._core.fleet.stop(m, leave.why, kill=True)
            self._core.touch(m)
        else:
            self._core.leave(m, leave)

    def pin(self, e: PinSet) -> None:
        """3.4: a pinned model is no victim, and no idle rule touches it."""
        m = self._core.model(e.model)
        m.pinned = e.pinned
        m.idle_since = max(m.idle_since, self._core.now)
        self._keep(m)

    def lease(self, e: LeaseTaken) -> None:
        """3.5: kept until its deadline."""
        m = self._core.model(e.model)
        for other in self._core.models.values():
            if other is not m and e.lease in other.leases:
                self.end_lease(other, e.lease, stop=False)
        m.leases[e.lease] = INFINITY if e.deadline is None else e.deadline
        self._keep(m)

    def _keep(self, m: Model) -> None:
        self._core.news(m)
        if m.kept and m.leave and m.leave.cause in ("exchange", "idle", "lease", "deepen", "moved"):
            self._core.stay(m)

    def release(self, e: LeaseReleased) -> None:
        """The lease ended early."""
        for m in [m for m in self._core.models.values() if e.lease in m.leases]:
            self.end_lease(m, e.lease, e.stop)

    def end_lease(self, m: Model, lease: str, stop: bool) -> None:
        """3.5: the last one to go may stop the model; its idle age counts from here."""
        del m.leases[lease]
        m.idle_since = max(m.idle_since, self._core.now)
        self._core.news(m)
        if stop and not m.kept:
            m.wanted = None
            why = f"its last lease, {lease!r}, ended"
            self._core.leave(m, Leave(0, "lease", why, cut_at=self._core.cut_at(m)))

    # -- configuration

    def changed(self, e: ModelsChanged) -> None:
        """3.6: new ones are added, changed ones know it, those gone drain, stop and are forgotten."""
        specs = {spec.name: spec for spec in e.models}
        for gone in [m for name, m in self._core.models.items() if name not in specs]:
            self._remove(gone)
        for name, spec in specs.items():
            m = self._core.models.get(name)
            if m is None:
                self.add(spec)
            else:
                self._respec(m, spec, name in e.restart)
        self._replicas.regroup(specs)

    def add(self, spec: ModelSpec) -> Model:
        """A model nobody knew before."""
        m = Model(spec, self._core.costs.open(spec), self._core.now)
        m.pinned = spec.pinned
        self._core.models[spec.name] = m
        if spec.preload:
            self.preload[m.name] = m
            self.preloading = False
        return m

    def _respec(self, m: Model, spec: ModelSpec, restart: bool) -> None:
        if m.pinned == m.spec.pinned:  # an operator's pin outlives a reload
            m.pinned = spec.pinned
        m.spec, m.removed = spec, False
        m.costs = self._core.costs.open(spec)
        self._core.waiting.pop(m.name, None)  # it is looked at again whether it can fit
        self._core.news(m)
        if restart:
            self._core.leave(m, Leave(0, "config", "its configuration changed", cut_at=self._core.cut_at(m)))

    def _remove(self, m: Model) -> None:
        m.removed, m.pinned = True, False
        m.leases.clear()
        self.preload.pop(m.name, None)
        self._admission.forsake(m, "UnknownModel", f"{m.name!r} was removed from the configuration")
        why = "it was removed from the configuration"
        self._core.leave(m, Leave(0, "config", why, cut_at=self._core.cut_at(m)))
