"""The proxy's gate. A request that passes here is told to the core exactly twice: when it arrives, and when it ends.

What lies between (waiting, admission, rejection, a client that leaves, a cut)
may happen in any order; ``_Ticket`` keeps the account.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllmd import errors
from vllmd.config.types import ModelConfig, RequestRules
from vllmd.core import commands, events
from vllmd.daemon.names import Names
from vllmd.engines.base import Engine, Listen
from vllmd.proxy.gate import Passage, Target


@dataclass
class _Ticket:
    """One request between its arrival and its ending."""

    request: str
    model: str
    admitted: asyncio.Future[Listen]
    passage: _Passage | None = None


class Turnstile:
    """Implements ``vllmd.proxy.gate.Gate`` over the core."""

    def __init__(
        self,
        post: Callable[[events.Event], None],
        where: Callable[[str], Listen | None],
        engine_of: Callable[[ModelConfig], Engine],
        opened: asyncio.Event,
    ) -> None:
        self._opened = opened
        self._empty = asyncio.Event()
        self.refusal: errors.VllmdError | None = None  # what everybody is told instead, while it is set
        self._post = post
        self._where = where
        self._engine_of = engine_of
        self._tickets: dict[str, _Ticket] = {}
        self._numbers = itertools.count(1)
        self.phase_of: Callable[[str], str] = lambda model: ""
        self.configure({})

    def configure(self, models: Mapping[str, ModelConfig]) -> None:
        """Take the models of a new configuration."""
        self._models = dict(models)
        self._names = Names(models.values())
        self._targets: dict[str, Target] = {}

    @property
    def open(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self._tickets)

    # -- what the proxy asks ---------------------------------------------------------------

    def resolve(self, name: str) -> Target:
        """What the client's name for a model means. Raises UnknownModel or BadRequest (ambiguous)."""
        if self.refusal:
            raise self.refusal
        model = self._names.resolve(name)
        if model not in self._targets:
            config = self._models[model]
            engine = self._engine_of(config)
            served, routes = engine.served_name(config), engine.routes(config)
            rules = config.request if config.request != RequestRules() else None
            self._targets[model] = Target(model, served, routes, engine.headers(), rules)
        return self._targets[model]

    async def enter(self, model: str, key: str, request_id: str) -> Passage:
        """Wait until the request is admitted. Raises VllmdError; cancelled when the client leaves."""
        await self._opened.wait()
        ticket = _Ticket(f"{next(self._numbers)}", model, asyncio.get_running_loop().create_future())
        self._tickets[ticket.request] = ticket
        self._post(events.RequestArrived(ticket.request, model, key))
        try:
            upstream = await ticket.admitted
        except asyncio.CancelledError:
            self._left(ticket)
            raise
        ticket.passage = ticket.passage or _Passage(upstream, self._ender(ticket))
        return ticket.passage

    def loading(self, model: str) -> str:
        """What a waiting client may be told, such as ``loading weights``."""
        return self.phase_of(model)

    # -- what the core says ----------------------------------------------------------------

    async def emptied(self, limit: float) -> bool:
        """Wait until no request is open, at most ``limit`` seconds."""
        self._empty.clear()
        if not self._tickets:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), limit)
        except TimeoutError:
            return False
        return True

    def _drop(self, request: str) -> _Ticket | None:
        ticket = self._tickets.pop(request, None)
        if not self._tickets:
            self._empty.set()
        return ticket

    def admit(self, command: commands.Admit) -> None:
        """Let it pass; an engine that is no longer there ends it at once."""
        ticket = self._tickets[command.request]
        upstream = self._where(command.model)
        ticket.passage = _Passage(upstream or Listen(), self._ender(ticket))
        if ticket.admitted.cancelled():
            return  # the client left in this very moment: enter() ends it
        if upstream is None:
            ticket.admitted.set_exception(errors.UpstreamFailed(f"the engine of {command.model} is gone"))
            ticket.passage.done()
        else:
            ticket.admitted.set_result(upstream)

    def reject(self, command: commands.Reject) -> None:
        """Refuse it; the core owes and is owed nothing more."""
        ticket = self._drop(command.request)
        if ticket and not ticket.admitted.done():
            kind: type[errors.VllmdError] = getattr(errors, command.error)
            message = f"{ticket.model}: {command.message}" if kind is errors.EngineFailed else command.message
            ticket.admitted.set_exception(kind(message, retry_after=command.retry_after))
            ticket.admitted.exception()  # read once: a client that just left must not make asyncio complain

    def cut(self, command: commands.CutRequest) -> None:
        """Break off an admitted request; its passage still ends as every other."""
        ticket = self._tickets.get(command.request)
        if ticket and ticket.passage:
            ticket.passage.cut(command.reason)

    def reject_waiting(self, why: str) -> None:
        """At shutdown: whoever still waits is told to come back."""
        for ticket in [ticket for ticket in self._tickets.values() if ticket.passage is None]:
            if not ticket.admitted.done():
                ticket.admitted.set_exception(errors.Unavailable(why, retry_after=5))
                self._left(ticket)

    def _left(self, ticket: _Ticket) -> None:
        if ticket.passage is not None:
            ticket.passage.done()
        elif self._drop(ticket.request):
            self._post(events.RequestGone(ticket.request))

    def _ender(self, ticket: _Ticket) -> Callable[[int | None], None]:
        def end(tokens: int | None) -> None:
            self._drop(ticket.request)
            self._post(events.RequestFinished(ticket.request, tokens))

        return end


class _Passage:
    """An admitted request; ``done`` may be called again and counts once."""

    def __init__(self, upstream: Listen, end: Callable[[int | None], None]) -> None:
        self.upstream = upstream
        self._end: Callable[[int | None], None] | None = end
        self._on_cut: Callable[[str], None] | None = None
        self._cut: str | None = None

    def done(self, tokens: int | None = None) -> None:
        """The request ended, however it did."""
        end, self._end = self._end, None
        if end:
            end(tokens)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(reason)`` when the daemon breaks the request off (at once if it has)."""
        self._on_cut = callback
        if self._cut is not None:
            callback(self._cut)

    def cut(self, reason: str) -> None:
        """Break it off."""
        self._cut = reason
        if self._on_cut:
            self._on_cut(reason)
