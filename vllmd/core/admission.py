"""Requests: who is let in, who waits, who is refused and why (1 in ``design.md``)."""

from __future__ import annotations

from typing import NamedTuple

from vllmd.core.common import Core
from vllmd.core.events import RequestArrived, RequestFinished, RequestGone
from vllmd.core.eviction import cheapest, fits
from vllmd.core.lifecycle import AWAKE, LifecycleError
from vllmd.core.model import INFINITY, Model
from vllmd.core.planner import Planner
from vllmd.core.possible import never_fits, pinned_out
from vllmd.core.types import State


class Refusal(NamedTuple):
    """A class of ``vllmd.errors``, its message, and seconds after which coming back makes sense."""

    error: str
    message: str
    retry_after: float | None


class Admission:
    """Every request that is owed an end, and the one place where they are let in or refused."""

    def __init__(self, core: Core, planner: Planner) -> None:
        self._core = core
        self._planner = planner
        self._requests: dict[str, Model] = {}
        self._queued = 0

    # -- events

    def arrived(self, e: RequestArrived) -> None:
        """1: the first rule that applies decides."""
        core = self._core
        if e.request in self._requests:
            raise LifecycleError(f"the daemon reported request {e.request!r} twice")
        m = core.models.get(e.model)
        if m is None or m.removed:  # 1.1
            core.fleet.reject(e.request, "UnknownModel", f"no model is called {e.model!r}")
            return
        m.costs.arrived(core.now)
        m.used = core.now
        core.touch(m)
        if m.state is State.READY and not m.full and not len(m.queue) and not core.policy.in_order:  # 1.2
            self._requests[e.request] = m
            core.fleet.admit(m, e.request)
            return
        refusal = self._full(m) or self._failed(m) or self._impossible(m) or self._busy(m)  # 1.3 to 1.7
        if refusal:
            core.fleet.reject(e.request, *refusal)
            core.fleet.record("refuse", m.name, refusal.message, {"error": refusal.error})
        else:
            self._enqueue(m, e)  # 1.8

    def finished(self, e: RequestFinished) -> None:
        """An admitted request ended. One that is not known any more was rejected meanwhile."""
        m = self._requests.pop(e.request, None)
        if m is None:
            return
        core = self._core
        m.used = core.now
        m.orphans.discard(e.request)
        run = m.running.pop(e.request, None)
        if run and m.state in AWAKE and not run.frozen:
            m.costs.observe("service", core.now - run.began)
        if run and not m.running:
            m.idle_since = core.now
            core.replan = True
        core.touch(m)

    def gone(self, e: RequestGone) -> None:
        """The client of a waiting request left."""
        m = self._requests.get(e.request)
        if m and e.request in m.queue:
            self._drop(m, e.request)
            self._core.touch(m)
        elif m:
            self.finished(RequestFinished(e.request))

    # -- for the other parts

    def admit(self, m: Model) -> None:
        """Its gate is open: let in what waits, as far as there is a place."""
        while len(m.queue) and not m.full and not (self._core.policy.in_order and self._older_elsewhere(m)):
            request, _ = m.queue.take()
            self._queued -= 1
            self._core.fleet.admit(m, request)

    def reject_all(self, m: Model, error: str, message: str, retry_after: float | None = None) -> None:
        """Everybody who waits for it gets this error, and nobody wants it loaded any more."""
        m.wanted = None
        for request in list(m.queue):
            self._drop(m, request)
            self._core.fleet.reject(request, error, message, retry_after)

    def expire(self, m: Model) -> None:
        """4.1: those who waited as long as they may."""
        timeout = m.spec.queue_timeout
        for request in m.queue.late(timeout, self._core.now) if timeout is not None else ():
            self._drop(m, request)
            message = f"{m.name!r} could not be served within {timeout:g} s"
            self._core.fleet.reject(request, "Unavailable", message, self._patience(m))

    # -- underneath

    def _enqueue(self, m: Model, e: RequestArrived) -> None:
        self._requests[e.request] = m
        m.queue.add(e.request, e.key, self._core.now)
        self._queued += 1
        if m.state is State.DRAINING and m.leave and m.leave.yields:
            self._core.fleet.reopen(m)

    def _drop(self, m: Model, request: str) -> None:
        del self._requests[request]
        m.queue.remove(request)
        self._queued -= 1

    def _older_elsewhere(self, m: Model) -> bool:
        oldest = m.queue.oldest
        others = (other.queue.oldest for other in self._core.models.values() if other is not m)
        return any(other is not None and oldest is not None and other < oldest for other in others)

    def _full(self, m: Model) -> Refusal | None:
        if len(m.queue) >= m.spec.queue_limit:  # 1.3
            message = f"{len(m.queue)} requests already wait for {m.name!r}, its limit"
        elif self._queued >= self._core.settings.queue_limit:
            message = f"{self._queued} requests already wait on this server, its limit"
        else:
            return None
        return Refusal("TooManyRequests", message, self._patience(m))

    def _failed(self, m: Model) -> Refusal | None:
        if m.state is not State.FAILED:
            return None
        left = m.retry_at - self._core.now
        if left > 0 and m.given_up:  # 1.4
            return Refusal("EngineFailed", m.failure, left)
        if left <= 0:
            self._core.fleet.forgive(m)
        return None

    def _impossible(self, m: Model) -> Refusal | None:
        if m.loaded or len(m.queue):
            return None
        ledger = self._core.fleet.ledger
        why = never_fits(ledger, m)
        if why:  # 1.5
            return Refusal("ModelTooLarge", why, None)
        why = pinned_out(ledger, m, self._core.models.values())
        return Refusal("Unavailable", why, self._patience(m)) if why else None  # 1.6

    def _busy(self, m: Model) -> Refusal | None:
        coming = m.name in self._core.exchanges or m.state not in (State.STOPPED, State.SLEEPING)
        if m.spec.on_busy != "reject" or coming:
            return None
        s = self._planner.look()
        w = self._planner.observer.see_newcomer(m, since=-INFINITY)
        if w.span and not w.devices:  # it waits for others to leave a device free
            return None
        idle = [r for r in s.residents if not r.running and not r.queued and r.model != m.name]
        if fits(s, w) is not None or cheapest(s, w, idle, lambda r, way: 1.0) is not None:
            return None
        message = f"{m.name!r} needs memory that busy models hold"
        return Refusal("Unavailable", message, self._patience(m))  # 1.7

    def _patience(self, m: Model) -> float:
        """Seconds after which coming back makes sense: by then something will have moved."""
        if m.on:
            return max(1.0, m.costs.seconds("service"))
        return max(1.0, m.costs.wake(m.level if m.state is State.SLEEPING else 0))
