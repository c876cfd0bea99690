"""Requests: who is let in, who waits, who is refused and why (1 in ``design.md``)."""

from __future__ import annotations

from typing import NamedTuple

from vllmd.core.common import Core
from vllmd.core.events import RequestAnswered, RequestArrived, RequestFinished, RequestGone
from vllmd.core.eviction import cheapest, fits
from vllmd.core.group import Group
from vllmd.core.lifecycle import AWAKE, LifecycleError
from vllmd.core.model import INFINITY, Model
from vllmd.core.planner import Planner
from vllmd.core.possible import never_fits, pinned_out
from vllmd.core.replicas import Replicas
from vllmd.core.types import State


class Refusal(NamedTuple):
    """A class of ``vllmd.errors``, its message, and seconds after which coming back makes sense."""

    error: str
    message: str
    retry_after: float | None


class Admission:
    """Every request that is owed an end, and the one place where they are let in or refused."""

    def __init__(self, core: Core, planner: Planner, replicas: Replicas) -> None:
        self._core = core
        self._planner = planner
        self._replicas = replicas
        self._requests: dict[str, Model] = {}
        self._queued = 0

    # -- events

    def arrived(self, e: RequestArrived) -> None:
        """1: the first rule that applies decides."""
        core = self._core
        if e.request in self._requests:
            raise LifecycleError(f"the daemon reported request {e.request!r} twice")
        group = None if e.only else core.groups.get(e.model)
        m = self._chosen(group, e) if group else core.models.get(e.only or e.model)
        if m is None or m.removed:
            self._refuse(e, self._all_down(group) if group else _unknown(e.model))  # 1.1
            return
        if e.only and m.replica:
            self._only_there(m, e)
            return
        core.touch(m)
        if self._open(m) and not len(m.queue) and not core.policy.in_order:  # 1.2
            self._requests[e.request] = m
            core.fleet.admit(m, e.request)
            return
        refusal = (
            self._unknown_devices(m) or self._full(m) or self._failed(m) or self._impossible(m) or self._busy(m)
        )  # 1.3 to 1.7
        if refusal:
            self._refuse(e, refusal)
        else:
            self._enqueue(m, e)  # 1.8

    def _only_there(self, m: Model, e: RequestArrived) -> None:
        """8.1: what one replica alone has is to be had while its engine is up; it does not come back with another."""
        self._core.touch(m)
        if m.state is State.READY and not m.full:
            self._requests[e.request] = m
            self._core.fleet.admit(m, e.request)
        else:
            self._refuse(e, Refusal("Unavailable", f"{m.name!r}, which alone has it, is {m.state.value}", 1.0))

    def _chosen(self, group: Group, e: RequestArrived) -> Model | None:
        """8.1: the replica that has it, or that it waits for; None: all are down."""
        now = group.used = self._core.now
        return group.choose(e.avoid, now) or group.heir(self._core.fleet.ledger, now)

    def answered(self, e: RequestAnswered) -> None:
        """The first byte of a replica's answer."""
        m = self._requests.get(e.request)
        if m:
            self._replicas.answered(m, e.request, e.streamed)

    def finished(self, e: RequestFinished) -> None:
        """An admitted request ended. One that is not known any more was rejected meanwhile."""
        m = self._requests.pop(e.request, None)
        if m is None:
            return
        core = self._core
        m.used = core.now
        m.orphans.discard(e.request)
        run = m.running.pop(e.request, None)
        self._replicas.ended(m, e.request, e.failed)
        if run and m.state in AWAKE and not run.frozen and not e.failed:
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
        """Its gate is open: let in what waits, for it or for another replica, as far as there is a place."""
        while (queued := self._next(m)) and self._open(m):
            if self._core.policy.in_order and self._older_elsewhere(queued):
                return
            request, _ = queued.queue.take()
            self._requests[request] = m
            self._queued -= 1
            self._core.fleet.admit(m, request)
            self._core.touch(queued)

    def _next(self, m: Model) -> Model | None:
        """Who has the queue from which ``m`` takes the next one; None: nobody waits."""
        group = self._core.group_of(m)
        if len(m.queue) or group is None:
            return m if len(m.queue) else None
        return min((o for o in group.members if len(o.queue)), key=lambda o: o.queue.oldest or 0.0, default=None)

    def _open(self, m: Model) -> bool:
        """A request could go in now."""
        group = self._core.group_of(m)
        return m.state is State.READY and not m.full and (group is None or m.removed or group.takes(m))

    def hand_over(self, m: Model) -> None:
        """8.6: who waits for a replica that does not serve waits for another one that will, or hears that none does."""
        group, ledger = self._core.group_of(m), self._core.fleet.ledger
        if group is None:
            return
        other = group.better(m, ledger, self._core.now)
        if other:
            self._move_queue(m, other)
        elif group.heir(ledger, self._core.now) is None:
            self._reject_queue(m, self._all_down(group))

    def _move_queue(self, m: Model, other: Model) -> None:
        if other.state is State.FAILED:  # its back-off is over
            self._core.fleet.forgive(other)
        self._requests.update(dict.fromkeys(m.queue, other))
        other.queue.absorb(m.queue)
        self._core.touch(m)
        self._core.news(other)

    def forsake(self, m: Model, error: str, message: str, retry_after: float | None = None) -> None:
        """Nobody wants it loaded any more. Who waits for it waits for another replica, or gets this error."""
        m.wanted = None
        group, failed = self._core.group_of(m), m.state is State.FAILED
        ledger, now = self._core.fleet.ledger, self._core.now
        other = group.better(m, ledger, now, doubtful=failed) if group and len(m.queue) else None
        if other:
            self._move_queue(m, other)
        elif group and len(group.members) > 1 and failed:
            self._reject_queue(m, self._all_down(group))
        else:
            self._reject_queue(m, Refusal(error, message, retry_after))

    def _reject_queue(self, m: Model, refusal: Refusal) -> None:
        for request in list(m.queue):
            self._drop(m, request)
            self._core.fleet.reject(request, *refusal)

    def expire(self, m: Model) -> None:
        """4.1: those who waited as long as they may."""
        timeout = m.spec.queue_timeout
        for request in m.queue.late(timeout, self._core.now) if timeout is not None else ():
            self._drop(m, request)
            message = f"{m.name!r} could not be served within {timeout:g} s"
            self._core.fleet.reject(request, "Unavailable", message, self._patience(m))

    # -- underneath

    def _refuse(self, e: RequestArrived, refusal: Refusal) -> None:
        self._core.fleet.reject(e.request, *refusal)
        self._core.fleet.record("refuse", e.model, refusal.message, {"error": refusal.error})

    def _all_down(self, group: Group) -> Refusal:
        """8.6: with the reason of each."""
        again = min((m.retry_at for m in group.members if m.state is State.FAILED), default=0.0)
        return Refusal("Unavailable", f"no replica of {group.name!r} serves: {group.trouble()}",
                       max(1.0, again - self._core.now))  # fmt: skip

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

    def _unknown_devices(self, m: Model) -> Refusal | None:
        """9.1: it is not on, and nobody knows what there is that it could run on."""
        ledger = self._core.fleet.ledger
        if not m.at_rest or not m.spec.device_count or not ledger.unknown or ledger.asking:
            return None
        return Refusal("Unavailable", ledger.unknown, 5.0)

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


def _unknown(name: str) -> Refusal:
    return Refusal("UnknownModel", f"no model is called {name!r}", None)
