"""The proxy's gate. A request that passes here is told to the core exactly twice: when it arrives, and when it ends.

What lies between (waiting, admission, rejection, a client that leaves, a cut)
may happen in any order; ``_PendingRequest`` keeps the account.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllmd import errors
from vllmd.config.types import ModelConfig, RequestRules
from vllmd.core import commands, events
from vllmd.daemon.failure_text import for_clients
from vllmd.daemon.names import Names
from vllmd.engines.base import Engine, Listen
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.gate import Permit, Target
from vllmd.proxy.upstream import Unreached

REACH_TRIES, REACH_PAUSE = 20, 0.1  # so often a request finds nobody listening, and seconds between


@dataclass
class _PendingRequest:
    """One request between its arrival and its ending."""

    request: str
    model: str
    key: str
    only: str
    tried: tuple[str, ...]  # the engines that failed it before
    admitted: asyncio.Future[Listen]
    permit: _Permit | None = None


class AdmissionGate:
    """Implements ``vllmd.proxy.gate.Gate`` over the core."""

    def __init__(
        self,
        post: Callable[[events.Event], None],
        where: Callable[[str], Listen | None],
        engine_of: Callable[[ModelConfig], Engine],
        opened: asyncio.Event,
    ) -> None:
        self._opened = opened
        self._before: set[asyncio.Future[None]] = set()  # requests that wait for us to open; the core knows none yet
        self._empty = asyncio.Event()
        self.refusal: errors.VllmdError | None = None  # what everybody is told instead, while it is set
        self._post = post
        self._where = where
        self._engine_of = engine_of
        self._tickets: dict[str, _PendingRequest] = {}
        self._numbers = itertools.count(1)
        self.phase_of: Callable[[str], str] = lambda model: ""
        self.on_unreached: Callable[[str], None] = lambda engine: None  # nobody listens there
        self.on_retry: Callable[[str], None] = lambda engine: None  # a request goes from it to another replica
        self.configure({}, {})

    def configure(
        self,
        models: Mapping[str, ModelConfig],
        engines: Mapping[str, ModelConfig],
        keep_alive_limit: float | None = None,
    ) -> None:
        """Take the models of a new configuration, and their engines: each model's one, or its replicas.

        ``keep_alive_limit`` is in seconds, None for none; 0.0: no client's word counts.
        """
        self._keep_alive_limit = keep_alive_limit
        self._models = dict(models)
        self._engines = dict(engines)
        self._names = Names(models.values())
        self._firsts = {engine.replica_of or name: name for name, engine in reversed(list(engines.items()))}
        self._targets: dict[str, Target] = {}

    @property
    def open(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self._tickets) + len(self._before)

    # -- what the proxy asks ---------------------------------------------------------------

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """What the client's name for a model means. Raises UnknownModel or BadRequest (ambiguous)."""
        if self.refusal:
            raise self.refusal.with_traceback(None)  # or each raise would add to the one that is kept
        model = self._names.resolve(name, caller.may_use)
        return self._target(model, self._firsts[model])  # for what is alike in all replicas, the first one's

    def resolve_engine(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, or the id of a replica. Raises as ``resolve`` does."""
        if self.refusal and not (name in self._engines and self._engines[name].replica_of):
            raise self.refusal.with_traceback(None)
        return self._names.with_replica(name, self._engines, caller.may_use)

    def _target(self, name: str, engine: str) -> Target:
        if name not in self._targets:
            config = self._engines[engine]
            kind = self._engine_of(config)
            served, routes = kind.served_name(config), kind.routes(config)
            rules = config.request if config.request != RequestRules() else None
            model = config.replica_of or config.name
            names = frozenset((model, *self._models.get(model, config).aliases))
            own_api = frozenset(kind.own_api(config))
            self._targets[name] = Target(name, served, routes, kind.headers(), rules, own_api, names)
        return self._targets[name]

    async def acquire(self, model: str, key: str, request_id: str, only: str = "", body: bytes = b"") -> Permit:
        """Wait until the request is admitted. Raises VllmdError; cancelled when the client leaves."""
        if not self._opened.is_set():
            await self._opening()
        return await self._admitted(model, key, only)

    async def _opening(self) -> None:
        """Wait until we have opened. Raises Unavailable at a shutdown."""
        waiting = asyncio.get_running_loop().create_future()
        self._before.add(waiting)

        def let_in(_: object) -> None:
            if not waiting.done():
                waiting.set_result(None)

        opened = asyncio.ensure_future(self._opened.wait())
        opened.add_done_callback(let_in)
        try:
            await waiting
        finally:
            opened.cancel()
            self._before.discard(waiting)
            self._say_if_empty()

    async def _admitted(self, model: str, key: str, only: str, tried: tuple[str, ...] = ()) -> Permit:
        admitted = asyncio.get_running_loop().create_future()
        ticket = _PendingRequest(f"{next(self._numbers)}", model, key, only, tried, admitted)
        self._tickets[ticket.request] = ticket
        self._post(events.RequestArrived(ticket.request, model, key, frozenset(tried), only))
        try:
            upstream = await ticket.admitted
        except asyncio.CancelledError:
            self._left(ticket)
            raise
        ticket.permit = ticket.permit or _Permit(self, ticket, upstream, model)
        return ticket.permit

    async def retry(self, ticket: _PendingRequest, engine: str, error: errors.VllmdError) -> Permit:
        """Once more, to another replica; one that is the only engine only if nobody listened there. Raises ``error``.

        Whoever did not listen has just died, and the core will hear of it.
        """
        replicas = self._models[ticket.model].replicas if ticket.model in self._models else None
        if replicas is None and isinstance(error, Unreached) and len(ticket.tried) < REACH_TRIES:
            self.on_unreached(engine)
            await asyncio.sleep(REACH_PAUSE)
        elif replicas is None or ticket.only or len(ticket.tried) >= replicas.retries:
            raise error
        else:
            self.on_retry(engine)
        return await self._admitted(ticket.model, ticket.key, ticket.only, (*ticket.tried, engine))

    def loading(self, model: str) -> str:
        """What a waiting client may be told, such as ``loading weights``."""
        return self.phase_of(model)

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """Tell the core that the model is wanted again, for as long as the configuration allows."""
        limit = self._keep_alive_limit
        if (limit is None or limit > 0) and model in self._models and self._opened.is_set():
            self._post(events.KeptAlive(model, key, seconds if limit is None else min(seconds, limit)))

    # -- what the core says ----------------------------------------------------------------

    async def emptied(self, limit: float) -> bool:
        """Wait until no request is open, at most ``limit`` seconds."""
        self._empty.clear()
        if not self.open:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), limit)
        except TimeoutError:
            return False
        return True

    def _drop(self, request: str) -> _PendingRequest | None:
        ticket = self._tickets.pop(request, None)
        self._say_if_empty()
        return ticket

    def _say_if_empty(self) -> None:
        if not self.open:
            self._empty.set()

    def admit(self, command: commands.Admit) -> None:
        """Let it pass; an engine that is no longer there ends it at once."""
        ticket = self._tickets[command.request]
        upstream = self._where(command.replica)
        ticket.permit = _Permit(self, ticket, upstream or Listen(), command.replica)
        if ticket.admitted.cancelled():
            return  # the client left in this very moment: enter() ends it
        if upstream is None:
            ticket.admitted.set_exception(errors.UpstreamFailed(f"the engine of {command.replica} is gone"))
            ticket.permit.done()
        else:
            ticket.admitted.set_result(upstream)

    def reject(self, command: commands.Reject) -> None:
        """Refuse it; the core owes and is owed nothing more."""
        ticket = self._drop(command.request)
        if ticket and not ticket.admitted.done():
            kind: type[errors.VllmdError] = getattr(errors, command.error)
            message = for_clients(command.message)
            if kind is errors.EngineFailed:
                message = f"{ticket.model}: {message}"
            ticket.admitted.set_exception(kind(message, retry_after=command.retry_after))
            ticket.admitted.exception()  # read once: a client that just left must not make asyncio complain

    def cut(self, command: commands.CutRequest) -> None:
        """Break off an admitted request; its permit still ends as every other."""
        ticket = self._tickets.get(command.request)
        if ticket and ticket.permit:
            ticket.permit.cut(command.reason)

    def reject_waiting(self, why: str) -> None:
        """At shutdown: whoever still waits is told to come back."""
        for waiting in self._before:
            if not waiting.done():
                waiting.set_exception(errors.Unavailable(why, retry_after=5))
                waiting.exception()  # read once: a client that just left must not make asyncio complain
        for ticket in [ticket for ticket in self._tickets.values() if ticket.permit is None]:
            if not ticket.admitted.done():
                ticket.admitted.set_exception(errors.Unavailable(why, retry_after=5))
                self._left(ticket)

    def _left(self, ticket: _PendingRequest) -> None:
        if ticket.permit is not None:
            ticket.permit.done()
        elif self._drop(ticket.request):
            self._post(events.RequestGone(ticket.request))

    def target_of(self, ticket: _PendingRequest, engine: str) -> Target | None:
        """What the model's name means to one of several replicas; None for an engine that is the only one."""
        model = self._models.get(ticket.model)
        return self._target(engine, engine) if model and model.replicas and engine in self._engines else None

    def answered(self, ticket: _PendingRequest, streamed: bool) -> None:
        """The head of a replica's answer came."""
        self._post(events.RequestAnswered(ticket.request, streamed))

    def ended(self, ticket: _PendingRequest, tokens: int | None, failed: str) -> None:
        """An admitted request is over."""
        self._drop(ticket.request)
        self._post(events.RequestFinished(ticket.request, tokens, failed))


class _Permit:
    """An admitted request; ``done`` may be called again and counts once."""

    def __init__(self, admission_gate: AdmissionGate, ticket: _PendingRequest, upstream: Listen, engine: str) -> None:
        self.upstream = upstream
        self.target = admission_gate.target_of(ticket, engine)
        self._admission_gate = admission_gate
        self._ticket = ticket
        self._engine = engine
        self._over = False
        self._on_cut: Callable[[str], None] | None = None
        self._cut: str | None = None

    def answered(self, streamed: bool) -> None:
        """The head of a replica's answer came."""
        self._admission_gate.answered(self._ticket, streamed)

    def done(self, tokens: int | None = None, failed: str = "") -> None:
        """The request ended, however it did."""
        if not self._over:
            self._over = True
            self._on_cut = None  # it leads to the request's body, which is to be freed now and not by a late collection
            self._admission_gate.ended(self._ticket, tokens, failed)

    async def retry(self, error: errors.VllmdError) -> Permit:
        """Leave to send it once more. Raises ``error`` where that makes no sense."""
        return await self._admission_gate.retry(self._ticket, self._engine, error)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(reason)`` when the daemon breaks the request off (at once if it has)."""
        if not self._over:
            self._on_cut = callback
        if self._cut is not None:
            callback(self._cut)

    def cut(self, reason: str) -> None:
        """Break it off."""
        self._cut = reason
        if self._on_cut:
            self._on_cut(reason)
