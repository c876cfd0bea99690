"""Requests: who is let in, who waits, who is refused and why (1 in ``design.md``)."""

from __future__ import annotations

from typing import NamedTuple

from vllmd.core.balancing import DOUBTFUL, SOONEST, Balancer, ailment, back_in, best, in_flight, level
from vllmd.core.commands import RejectReason
from vllmd.core.common import Core
from vllmd.core.events import PoolAsked, RequestAnswered, RequestArrived, RequestFinished, RequestGone
from vllmd.core.eviction import cheapest
from vllmd.core.fit import fits
from vllmd.core.health import HealthChecks
from vllmd.core.idle import rules_due
from vllmd.core.lifecycle import AWAKE, LifecycleError
from vllmd.core.model import INFINITY, Model, Replica
from vllmd.core.planner import Planner
from vllmd.core.policy_input import remaining
from vllmd.core.types import Decision, State

PROMISED = 5.0  # seconds in which a request that was told its model arrives, or does not


class Refusal(NamedTuple):
    """Why, in words, and seconds after which coming back makes sense."""

    error: RejectReason
    message: str
    retry_after: float | None = None


class Admission:
    """Every request that is owed an end, and the one place where they are let in or refused."""

    def __init__(self, core: Core, planner: Planner, balancer: Balancer, health: HealthChecks) -> None:
        self._core = core
        self._planner = planner
        self._balancer = balancer
        self._health = health
        self._queued: dict[str, Model] = {}  # request -> the model that it waits for
        self._admitted: dict[str, Replica] = {}  # request -> where it runs

    # -- events

    def arrived(self, e: RequestArrived) -> None:
        """1: the first rule that applies decides."""
        core = self._core
        if e.request in self._admitted or e.request in self._queued:
            raise LifecycleError(f"the daemon reported request {e.request!r} twice")
        model = core.models.get(e.model)
        if model is None or not model.replicas:
            self._refuse(e, Refusal(RejectReason.UNKNOWN_MODEL, f"no model is called {e.model!r}"))  # 1.1
            return
        if model.disabled_because:
            self._refuse(e, Refusal(RejectReason.DISABLED, model.disabled_because))  # 1.1
            return
        if e.only and model.rules:
            self._only_there(model, e)
            return
        model.used = core.engines.now
        if model.promised:
            model.promised = model.promised[1:]
        chosen = self._balancer.choose(model, e.avoid)
        r = chosen or self._nominate(model)
        if r is None:
            self._refuse(e, self._all_down(model))
            return
        if chosen and not model.queue:  # 1.2
            self._admitted[e.request] = chosen
            core.engines.admit(chosen, e.request)
            core.mark_request(chosen)
            return
        core.mark_for_review(r)
        refusal = self._refusal(model, r)  # 1.3 to 1.7
        if refusal:
            self._refuse(e, refusal)
        else:
            self._queued[e.request] = model  # 1.8
            model.enqueue(e.request, e.key, core.now, e.rank)

    def admit_at_once(self, request: str, name: str) -> str | None:
        """1.2, where only that applies: the replica that has the request; None, nothing changed, where more may apply.

        The same as ``arrived`` and the command that follows, without either: see ``Scheduler.admit_at_once``.
        """
        core, model = self._core, self._core.models.get(name)
        if model is None or not model.replicas or model.disabled or model.promised:
            return None
        r = model.replicas[0]
        most = r.spec.concurrency
        if not core.only_serves(r) or r.disabled or r.health or (most is not None and len(r.running) >= most):
            return None
        if request in self._admitted or request in self._queued:
            return None
        model.used = core.engines.now
        self._admitted[request] = r
        core.engines.begin(r, request)
        core.note_use(r, INFINITY)
        return r.id

    def finish_at_once(self, request: str) -> bool:
        """``finished`` for one that did not fail, where nothing follows from it; False, and nothing changed: it may."""
        core, r = self._core, self._admitted.get(request)
        if r is None or r.spec.preempt or r.health or not core.only_serves(r):
            return False
        began = r.running.get(request)
        if began is None or r.frozen:
            return False
        now = core.engines.now
        due = INFINITY if len(r.running) > 1 or r.pinned else rules_due(r, now)
        if due <= now:  # it is to rest at once
            return False
        del self._admitted[request], r.running[request]
        r.used = now
        (r.learnt or r.costs).observe("service", now - began)
        if not r.running:
            r.idle_since = now
        core.note_use(r, due)
        return True

    def _only_there(self, model: Model, e: RequestArrived) -> None:
        """8.1: what one replica alone has is to be had while its engine is up; it does not come back with another."""
        r = next(iter(model.replicas), None) if e.only == model.name else self._core.replicas.get(e.only)
        if r is None or r.model is not model:
            self._refuse(e, Refusal(RejectReason.UNAVAILABLE, f"{e.only!r}, which alone has it, is gone"))
            return
        self._core.mark_for_review(r)
        if r.state is State.READY and not r.full:
            self._admit(r, e.request)
        else:
            self._refuse(e, Refusal(RejectReason.UNAVAILABLE, f"{r.id!r}, which alone has it, is {r.state.value}", 1.0))

    def _admit(self, r: Replica, request: str) -> None:
        self._admitted[request] = r
        self._core.engines.admit(r, request)

    def pooled(self, e: PoolAsked) -> None:
        """1.9: of a pool's models the one that answers soonest, by its state; of several that run the least busy.

        Its request comes when its body has been read, and counts from now on: of two at once each gets another model.
        """
        core = self._core

        def distance(model: Model) -> tuple[bool, int, int]:
            state = best(model.replicas).state, level(best(model.replicas))
            model.promised = tuple([at for at in model.promised if core.now - at < PROMISED])
            open_ = sum(map(in_flight, model.replicas)) + len(model.queue) + len(model.promised)
            place = SOONEST.index(state) if state in SOONEST else len(SOONEST)
            return bool(model.disabled_because), place, open_ if state[0] is State.READY else 0

        known = [core.models[name] for name in e.models if name in core.models]
        model = min([model for model in known if model.replicas], key=distance, default=None)
        if model:
            model.promised = (*model.promised, core.now)
        core.engines.answer(e.ask, model.name if model else "")

    def answered(self, e: RequestAnswered) -> None:
        """The first byte of an answer."""
        r = self._admitted.get(e.request)
        if r and r.health:
            self._health.answered(r, e.request, e.streamed)

    def finished(self, e: RequestFinished) -> None:
        """An admitted request ended. One that is not known any more was rejected meanwhile."""
        r = self._admitted.pop(e.request, None)
        if r is None:
            return
        core, now = self._core, self._core.engines.now
        r.used = now
        was_frozen, began = e.request in r.frozen, r.end(e.request)
        if r.health:
            self._health.ended(r, e.request, e.failed)
        if began is None:
            core.mark_for_review(r)
            return
        if r.state in AWAKE and not was_frozen and not e.failed:
            r.costs.observe("service", now - began)
        if not r.running:
            r.idle_since = now
            core.news[r] = None
        core.mark_request(r)

    def gone(self, e: RequestGone) -> None:
        """The client of a waiting request left."""
        model = self._queued.get(e.request)
        if model:
            self._drop(model, e.request)
            self._core.for_review[model] = None
        else:
            self.finished(RequestFinished(e.request))

    # -- the queue

    def serve(self, model: Model) -> None:
        """5.1: those with an open gate let in what waits; for the rest the replica is found that is to come up."""
        queue = model.queue
        while queue and (r := self._balancer.choose(model)):
            request, _ = queue.take()
            del self._queued[request]
            self._admit(r, request)
        if queue:
            nominee = self._nominate(model)
            if nominee is None:
                self.reject_queue(model, self._all_down(model))  # 8.6
            elif nominee.state is State.DRAINING and nominee.job and nominee.job.yields:
                self._core.engines.call_off(nominee)
                self.serve(model)
        elif model.rules:
            model.nominee = None

    def _nominate(self, model: Model) -> Replica | None:
        """8.1: who is to come up for the queue; its back-off is over, if it has failed."""
        before, model.nominee = model.nominee, self._balancer.nominee(model)
        r = model.nominee
        if r and r is not before and r.state is State.FAILED and r.retry_at <= self._core.now:
            self._core.engines.forgive(r)
        return r

    def reject_waiters(self, r: Replica, error: RejectReason, message: str, retry_after: float | None = None) -> None:
        """The replica does not come up: its waiters wait for another replica, or get this error."""
        model, failed = r.model, r.state is State.FAILED
        self._core.engines.unwant(r)
        self._core.mark_for_review(r)
        if not model.queue or model.nominee is not r:
            return
        several = model.rules is not None
        worst = DOUBTFUL + 1 if failed else DOUBTFUL - 1
        if several and self._balancer.nominee(model, but=r, most=worst):
            return
        if several and len(model.replicas) > 1 and failed:
            self.reject_queue(model, self._all_down(model))
        else:
            self.reject_queue(model, Refusal(error, message, retry_after))

    def reject_queue(self, model: Model, refusal: Refusal) -> None:
        """Nobody who waits for it is served."""
        for request in list(model.queue):
            self._drop(model, request)
            self._core.engines.reject(request, *refusal)

    def _drop(self, model: Model, request: str) -> None:
        del self._queued[request]
        model.queue.remove(request)

    def expire(self, model: Model) -> None:
        """4.1: those who waited as long as they may."""
        timeout = model.spec.queue_timeout
        for request in model.queue.late(timeout, self._core.now) if timeout is not None else ():
            self._drop(model, request)
            message = f"{model.name!r} could not be served within {timeout:g} s"
            patience = self._patience(model.nominee) if model.nominee else 1.0
            self._core.engines.reject(request, RejectReason.UNAVAILABLE, message, patience)

    # -- refusals

    def _refuse(self, e: RequestArrived, refusal: Refusal) -> None:
        engines = self._core.engines
        engines.reject(e.request, *refusal)
        engines.note(Decision(engines.now, "refuse", e.model, refusal.message, {"error": refusal.error}))

    def _all_down(self, model: Model) -> Refusal:
        """8.6: with the reason of each; 1.5 where none of them could ever fit, so that no client tries it again."""
        too_large = {r: why for r in model.replicas if not r.loaded and (why := self._core.fit.never(r))}
        if too_large and len(too_large) == len(model.replicas):
            return Refusal(RejectReason.MODEL_TOO_LARGE, next(iter(too_large.values())))
        reasons = [f"{r.id}: {why}" for r in model.replicas if (why := ailment(r) or too_large.get(r, ""))]
        message = f"no replica of {model.name!r} serves: {'; '.join(reasons)}"
        return Refusal(RejectReason.UNAVAILABLE, message, back_in(model.replicas, self._core.now))

    def _refusal(self, model: Model, r: Replica) -> Refusal | None:
        """Why a request that no replica can take now is not to wait either; ``r``: the replica that would come up."""
        fit, settings = self._core.fit, self._core.settings
        unknown = fit.unknown(r)
        if unknown and r.at_rest and not self._core.engines.ledger.asking:  # 9.1
            return Refusal(RejectReason.UNAVAILABLE, unknown, 5.0)
        least = 0 if r.is_on else 1  # with a limit of 0 a request waits all the same for the load that it causes itself
        if len(model.queue) >= max(least, model.spec.queue_limit):  # 1.3
            message = f"{_waiting(len(model.queue))} for {model.name!r}, its limit"
            return Refusal(RejectReason.TOO_MANY_REQUESTS, message, self._patience(r))
        if len(self._queued) >= max(least, settings.queue_limit):
            message = f"{_waiting(len(self._queued))} on this server, its limit"
            return Refusal(RejectReason.TOO_MANY_REQUESTS, message, self._patience(r))
        if r.state is State.FAILED:
            backoff = r.retry_at - self._core.now
            if backoff > 0 and r.given_up:  # 1.4
                return Refusal(RejectReason.ENGINE_FAILED, r.failure, backoff)
            if backoff <= 0:
                self._core.engines.forgive(r)
        # Whether it fits was asked for the first of a queue: the others wait for the same engine.
        if not r.loaded and not model.queue:
            if why := fit.never(r):  # 1.5
                return Refusal(RejectReason.MODEL_TOO_LARGE, why)
            if why := fit.pinned_out(r):  # 1.6
                return Refusal(RejectReason.UNAVAILABLE, why, self._patience(r))
        return self._busy(r) if model.spec.on_busy == "reject" else None

    def _busy(self, r: Replica) -> Refusal | None:
        """1.7: the replica would need memory of models that work; None: it comes up already, or the idle are enough."""
        if r in self._core.swaps or r.state not in (State.STOPPED, State.SLEEPING):
            return None
        s = self._planner.look()
        w = self._planner.builder.see_newcomer(r, since=-INFINITY)
        if w.held_back:
            return None
        idle = [each for each in s.residents if not each.running and not each.queued and each.model != r.id]
        if fits(s, w) is not None or cheapest(s, w, idle, lambda each, option: 1.0) is not None:
            return None
        message = f"{r.model.name!r} needs memory that busy models hold"
        return Refusal(RejectReason.UNAVAILABLE, message, self._patience(r))

    def _patience(self, r: Replica) -> float:
        """Seconds after which coming back makes sense: by then something will have moved."""
        if r.is_on:
            return max(1.0, r.costs.seconds("service"))
        if r.state in (State.STARTING, State.WAKING):
            return max(1.0, remaining(r, self._core.now))
        outlook = self._planner.outlook(r)
        if outlook:
            return max(1.0, outlook.seconds)
        return max(1.0, r.load_time)


def _waiting(number: int) -> str:
    return "no request may wait" if number == 0 else "1 request waits" if number == 1 else f"{number} requests wait"
