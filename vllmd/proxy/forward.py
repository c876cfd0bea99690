"""The way of a model's request: ``Relay.forward``, one procedure from the whole request to the last byte of its answer.

The problem. Most of a request's time is the engine's: tokens come one after another for minutes, and each must cost
the daemon next to nothing. So the answer's bytes do not pass through ``forward``. They go from the engine's connection
(``upstream.Upstream``) to the client's (``connection.Connection``) within the callback that received them, by way of
an ``AnswerRelay``, while ``forward`` waits for a single future: that all of it has passed, or why it has not.

The invariants:

- A request holds one permit at a time, and gives it back exactly once. That happens before the client has the last
  byte of its answer: the next request of a client whose key may have one at a time must not find the last one there.
- A request is sent a second time only if no engine can have answered the first: a kept connection turned out to be
  closed before a byte of the answer, or nobody listened, or (where the daemon's rules allow it: ``Permit.retry``)
  it failed before the client had a byte of its answer.
- A client that leaves has its task cancelled, and the engine's connection is closed at once, so that the engine stops
  generating.

What a client sees of an engine's end: 502 before the answer began, a visible truncation in the middle of it.

Each request is a task of its own. It costs two turns of the event loop that a callback would not. Both ways around
them were tried and given up: a coroutine that is run by hand brought rules (no time limit before the first wait,
nothing after the last one), and a loop that begins and resumes tasks within the callback that read what they wait for
gained nothing at 64 connections (0.97 of the requests per second), and 6 % at one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial

from vllmd.errors import EngineFailed, UpstreamFailed, VllmdError
from vllmd.proxy import tokens, usage
from vllmd.proxy.account import Account, Recorder, Trace, Tracer
from vllmd.proxy.answer import EVENT_STREAM, Answer, OptionRefusal, Refusal, UpstreamRequest, answer_for, relocated
from vllmd.proxy.exchange import Exchange, chunk
from vllmd.proxy.framing import Framing
from vllmd.proxy.gate import Address, Gate, Permit
from vllmd.proxy.heads import ResponseHead, forwardable, write_fields
from vllmd.proxy.http import ANTHROPIC_PATH, Request
from vllmd.proxy.limits import Limits
from vllmd.proxy.loading_heartbeat import Heartbeats, LoadingHeartbeat
from vllmd.proxy.model_requests import ModelRequests, StoredResponses
from vllmd.proxy.peek import Parts
from vllmd.proxy.routing import Handler
from vllmd.proxy.tokens import TAIL
from vllmd.proxy.upstream import Pool, Upstream, host_field

# Of the client's fields an engine never sees these: its key, its cookies, and what we write ourselves.
KEPT_BACK = frozenset(
    b"host content-length expect authorization x-api-key api-key cookie accept-encoding x-request-id"
    b" apikey x-goog-api-key x-auth-token x-access-token x-auth-key ocp-apim-subscription-key x-litellm-api-key"
    b" openai-api-key anthropic-api-key"
    b" forwarded x-vllmd-keep-alive x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip"
    b" origin access-control-request-method access-control-request-headers".split()
)
KEPT_BACK_TRACED = KEPT_BACK | {b"traceparent"}  # which the engine has from us then
RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')
REPLICA_FAILURES = frozenset({502, 503, 504})  # statuses of one replica, instead of which another may serve
MOST_TAIL = 16 * TAIL
OPENING = 8192  # bytes at an answer's beginning in which its id or its first usage is looked for
RESPONSES = "/v1/responses"
LONGEST_ID = 256  # bytes of a response's id with its key

Parse = Callable[[Exchange], Awaitable[UpstreamRequest | None]]


class Relay:
    """The handlers of all routes that are relayed to engines, and the connections to engines that they share."""

    def __init__(
        self, gate: Gate, limits: Limits, recorder: Recorder | None = None, tracer: Tracer | None = None
    ) -> None:
        """``recorder`` decides whether bodies are noted, ``tracer`` which requests are traced."""
        self.requests = ModelRequests(gate, limits)
        self.pool = Pool(limits)
        self.gate = gate
        self.limits = limits
        self.heartbeats = Heartbeats(limits)
        self._recorder = recorder
        self._tracer = tracer
        self._not_asked: set[str] = set()  # engines that refuse to be asked for the usage of a stream

    def forget(self, engine: str) -> None:
        """Forget what was noted of an engine that has ended: its stored responses, and what it refuses."""
        self.requests.responses.forget(engine)
        self._not_asked.discard(engine)

    def handler(self, parse: Parse) -> Handler:
        """What answers the requests of a route; ``parse``, one of ``ModelRequests``, says what each asks for."""
        return partial(self.forward, parse)

    async def forward(self, parse: Parse, exchange: Exchange) -> None:
        """Send one request to an engine, and the engine's answer to the client.

        Raises VllmdError for what ``parse`` refuses; the client has been told of whatever goes wrong later.
        """
        # 1. Parse and authorise. Who the caller is was found by the head (routing.Router.begin), before the body was
        #    read; which model it wants, and whether it may have that one, only the whole request tells.
        wanted = await parse(exchange)
        if wanted is None:
            return
        request, model = exchange.request, wanted.target.model
        offer = wanted.target.offer
        exchange.model, exchange.offer = model, offer
        account = exchange.account = self._account(wanted, request)
        if self.limits.now.request_timeout is not None:
            exchange.expire(self.limits.now.request_timeout)
        heartbeat = LoadingHeartbeat(
            exchange, model, wanted.asked.model, stream=wanted.asked.stream, limits=self.limits, gate=self.gate
        )
        acquiring = self.gate.acquire(
            model, request.caller.name, wanted.only, wanted.asked.body, heartbeat.begin, offer, wanted.public
        )
        try:
            while True:
                # 2. Acquire: the key's limits, the model's queue, and an engine that is awake.
                try:
                    permit = await acquiring
                finally:
                    heartbeat.end()
                sent, failure = wanted if permit.target is None else wanted.at(permit.target), None
                account.admit(sent.target.model)
                answer = AnswerRelay(exchange, sent, heartbeat, permit, self.requests.responses)
                try:
                    permit.on_cut(answer.cut)
                    if heartbeat.wanted:
                        answer.beat_by(self.heartbeats)
                    # 3. Connect, 4. send, 5. relay: the answer passes while this waits.
                    where = permit.upstream
                    connection = self.pool.take(where) or await self.pool.connect(where)
                    # A second time if the engine had closed the connection meanwhile, or refuses stream_options.
                    while not await answer.through(connection, *self._message(request, sent, where, answer)):
                        connection = await self.pool.connect(where)
                    return
                except VllmdError as error:
                    # What raised the error may hold it, and its traceback holds the variables of every function on the
                    # way: in that cycle of references the request's body would stay, which body_memory no longer
                    # counts, until the cycle collector finds it.
                    failure = error.with_traceback(None)
                    if answer.reached_client or exchange.over:
                        raise
                    acquiring = permit.retry(failure)  # awaited once this permit is given back
                finally:
                    # 6. Release, unless the answer's last byte has done so already.
                    answer.close(failure)
        except VllmdError as error:
            heartbeat.fail(error.with_traceback(None))
        finally:
            if wanted.keep_alive is not None:
                self.gate.keep_alive(model, request.caller.name, wanted.keep_alive)

    def _account(self, wanted: UpstreamRequest, request: Request) -> Account:
        """What is noted of the request from now on. The client is told of bodies, if somebody has that switched on."""
        account, recorder, called = Account(stream=wanted.asked.stream), self._recorder, wanted.target.called
        if self._tracer is not None:
            account.trace = self._tracer.begin(request)
        if recorder and recorder.active and recorder.begin(account, called, request.caller.name, wanted.asked.body):
            request.answer_fields = (*request.answer_fields, ("x-vllmd-recorded", "bodies"))
        return account

    def _message(
        self, request: Request, sent: UpstreamRequest, where: Address, answer: AnswerRelay
    ) -> tuple[bytes, Parts, int]:
        """The head and the body that the engine is sent, and the body's size.

        ``answer`` is told if the engine is asked for the usage of a stream, and the client did not ask for it.
        """
        target, asked = sent.target, sent.asked
        if answer.usage_refused:
            self._not_asked.add(target.model)
        answer.hides_usage = (
            asked.stream and usage.to_be_asked(asked, sent.route, target.rules) and target.model not in self._not_asked
        )
        body = usage.asking(asked, target.served_name) if answer.hides_usage else asked.renamed(target.served_name)
        size = sum(map(len, body))
        account = answer.account
        return request_head(request, sent, where, size, account.trace if account else None), body, size


class AnswerRelay:
    """One answer on its way from an engine's connection, which reports to it (``upstream.Sink``), to the client."""

    def __init__(
        self,
        exchange: Exchange,
        sent: UpstreamRequest,
        heartbeat: LoadingHeartbeat,
        permit: Permit,
        responses: StoredResponses,
    ) -> None:
        self._exchange = exchange
        self.account = exchange.account
        self._recorded = exchange.account.answer if exchange.account is not None else None
        self._sent = sent
        self._heartbeat = heartbeat
        self._permit: Permit | None = permit  # None once it was given back
        self._over: asyncio.Future[None] | None = None
        self._error: VllmdError | None = None
        self._resend = False  # a kept connection was closed before a byte of the answer
        self._upstream: Upstream | None = None
        self._answer: Answer | None = None
        self._heartbeats: Heartbeats | None = None  # while no byte of the body has come, and the client wants to know
        self._plain_events = False  # events that end with their last chunk or the connection: comments may precede them
        self._size = 0  # bytes of the body that came
        self._tail: bytes | bytearray = b""  # the last of them, TAIL or more
        self._opening = b""  # the first of them, as long as they are of interest
        self._responses = responses
        self._looks = exchange.request.path in (RESPONSES, ANTHROPIC_PATH)  # at the opening
        self.hides_usage = False  # the engine is asked for the usage of a stream, and the client did not
        self.usage_refused = False  # the engine takes no such question
        self._status = 0

    @property
    def reached_client(self) -> bool:
        """Whether the client has bytes of the engine's answer."""
        return self._heartbeat.answer_begun

    async def through(self, upstream: Upstream, head: bytes, body: Parts, size: int) -> bool:
        """Send the request, whose body has ``size`` bytes, and wait until the answer has passed.

        False if nothing of it has: ``upstream`` was a kept connection, and is closed; or ``usage_refused``. Raises
        VllmdError.
        """
        self._upstream, self._resend, self.usage_refused = upstream, False, False
        if self._error is None:  # not cut off while it connected
            self._over = asyncio.get_running_loop().create_future()
            upstream.send(self._exchange.request.method, head, body, size, self)
            self._exchange.on_pause = self._on_pause
            if self._exchange.paused:
                self._on_pause(True)
            await self._over
        if self._error is not None:
            raise self._error
        return not self._resend

    def close(self, failure: VllmdError | None) -> None:
        """Close and give back whatever still is not; nothing more reaches the client. ``failure``: why it failed."""
        self._exchange.on_pause = None
        if self._heartbeats is not None:
            self._quiet()
        if self._upstream is not None:
            self._upstream.abort()
        if self._permit is not None:
            self._error = self._error or failure
            self._release()

    def cut(self, reason: str) -> None:
        """The daemon breaks the request off."""
        self._settle(EngineFailed(f"the request was broken off: {reason}"))

    def _release(self) -> None:
        """Give the permit back, with what the answer's usage says that it took."""
        permit, self._permit = self._permit, None
        if permit is not None:
            failed = self._error.message if self._error is not None else ""
            sent = self._sent
            took = tokens.told(self._tail, self._opening if self._exchange.request.path == ANTHROPIC_PATH else b"")
            if took is None and self._status == 200 and sent.route.endswith(tokens.COUNTED):  # untold, or broken off
                took = tokens.reckoned(sent.route, sent.asked.body, self._size, stream=sent.asked.stream)
            if self.account is not None:
                self.account.tokens = took
            permit.release(took, self._size, failed)

    # -- what the engine's connection says

    def head(self, head: ResponseHead, framing: Framing) -> None:
        """The engine's head has come: decide how its body goes to the client (``answer_for``)."""
        self._status = head.status
        if self._recorded is not None:
            self._recorded.chunked = head.chunked
        if self._permit is not None and self._permit.target is not None:
            if head.status in REPLICA_FAILURES:
                self._answer = Refusal(head.status, framing)
                return
            self._permit.answered(head.content_type.startswith(EVENT_STREAM))
        if head.has_location and self._permit is not None:
            head = relocated(head, self._permit.upstream, self._sent.outside)
        self._plain_events = head.status == 200 and head.length is None and head.content_type.startswith(EVENT_STREAM)
        if self.hides_usage and head.status in usage.UNKNOWN_MEMBER:
            self._answer = OptionRefusal(self._exchange, self._heartbeat, head, framing)
            return
        exchange, beat = self._exchange, self._heartbeat
        self._answer = answer_for(exchange, self._sent, beat, head, framing, hides_usage=self.hides_usage)

    def data(self, data: bytes) -> None:
        """More of the body has come, framing included: hand it on, and keep its end, where the usage is."""
        size = len(data)
        self._size += size
        if self._heartbeats is not None and size:
            self._quiet()
        tail = self._tail
        if size >= TAIL or not tail:
            self._tail = data[-TAIL:]
        elif len(tail) > MOST_TAIL:  # what is too old goes when there is much of it, not at each piece
            self._tail = tail[-TAIL:] + data
        else:
            if not isinstance(tail, bytearray):
                self._tail = tail = bytearray(tail)
            tail += data
        if self._looks:
            self._look(data)
        if self._recorded is not None:
            self._recorded.more(data)
        if self._answer is not None:
            self._answer.more(data)

    def _look(self, data: bytes) -> None:
        """At the beginning are a response's id, perhaps cut in two, and the tokens of the prompt of a message."""
        seen = len(self._opening)
        self._opening += data[: OPENING - seen]
        self._looks = len(self._opening) < OPENING
        if self._exchange.request.path == RESPONSES:
            named = RESPONSE_ID.search(self._opening, max(0, seen - LONGEST_ID))
            if named:
                self._looks = False
                self._responses.note(named[1].decode(), self._sent.target.model, self._sent.asked.model)

    def whole(self) -> None:
        """The answer is complete: the engine's connection is free again, and the client's request is over."""
        self._upstream = None
        self._exchange.on_pause = None
        if isinstance(self._answer, Refusal):
            self._settle(self._answer.error())
            return
        if isinstance(self._answer, OptionRefusal) and self._answer.ours:
            self._answer, self._resend, self.usage_refused = None, True, True
            self._settle(None)
            return
        self._release()
        if self._answer is not None:
            self._answer.end()
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def lost(self, reason: str, *, untouched: bool) -> None:
        """The engine's connection broke off."""
        self._resend = untouched and self._upstream is not None and self._upstream.reused
        self._upstream = None
        self._settle(None if self._resend else UpstreamFailed(f"the engine broke off: {reason}"))

    def _settle(self, error: VllmdError | None) -> None:
        self._error = self._error or error
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def _on_pause(self, paused: bool) -> None:
        if self._upstream is not None:
            (self._upstream.pause if paused else self._upstream.resume)()

    # -- signs of life while the engine reads the prompt

    def beat_by(self, heartbeats: Heartbeats) -> None:
        """Have ``beat`` called from time to time until the answer's body begins."""
        self._heartbeats = heartbeats
        heartbeats.add(self)

    def beat(self) -> None:
        """A sign of life: behind a head of our own, or, if the engine has sent its head, as the body's first bytes."""
        if self._answer is None:
            self._heartbeat.reading()
        elif self._plain_events:
            comment = b": reading the prompt\n\n"
            self._exchange.write(comment if self._exchange.ends_with_connection else chunk(comment))

    def _quiet(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.discard(self)
            self._heartbeats = None


def request_head(
    request: Request, sent: UpstreamRequest, where: Address, length: int, trace: Trace | None = None
) -> bytes:
    """What an engine is sent before a body of ``length`` bytes: the client's fields less what is not its business."""
    headers, target, for_what = request.headers, sent.target, (sent.path, trace is not None)
    known = headers.sent
    if known is not None and known[0] is where and known[1] is target and known[2] == for_what:
        same = known[3]  # a client's requests on one connection are mostly for one model
    else:
        if headers.onward is None:
            headers.onward = write_fields(forwardable(headers.raw, but=KEPT_BACK))
        onward = headers.onward
        if trace is not None:  # the client's own would be a second one; which of them counts, nobody says
            onward = write_fields(forwardable(headers.raw, but=KEPT_BACK_TRACED))
        line = f"{request.method} {where.prefix}{sent.path} HTTP/1.1\r\nhost: {host_field(where)}\r\n"
        more = "".join([f"{name.lower()}: {value}\r\n" for name, value in target.headers])
        if where.key:
            more += f"authorization: Bearer {where.key}\r\n"
        same = line.encode("ascii") + onward + more.encode("latin-1")
        headers.sent = where, target, for_what, same
    if trace is not None:
        same += b"traceparent: %b\r\n" % trace.field.encode("ascii")
    return b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (same, request.id.encode("ascii"), length)
