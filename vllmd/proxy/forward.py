"""The way of a model's request: ``Relay.forward``, one procedure from the whole request to the answer's last byte.

Most of a request's time is the engine's: tokens come one after another for minutes, and each must cost the daemon
next to nothing. So the answer's bytes do not pass through ``forward``. They go from the engine's connection
(``upstream.Upstream``) to the client's (``connection.Connection``) within the callback that received them, by way of
an ``AnswerRelay``, while ``forward`` waits for a single future: that all of it has passed, or why it has not.

The invariants:

- A request holds one permit at a time, and gives it back exactly once, before the client has the last byte of its
  answer. Otherwise a client whose key may have one request at a time would be refused its next one.
- A request is sent a second time only if no engine can have answered the first: a kept connection turned out to be
  closed before a byte of the answer, or no process listened, or (where the daemon's rules allow it: ``Permit.retry``)
  it failed before the client had a byte of its answer.
- When the client disconnects, the request's task is cancelled and the engine's connection is closed at once, so that
  the engine stops generating.

What a client sees of an engine's failure: 502 before the answer began, a visible truncation in the middle of it.

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
from vllmd.proxy.answer import Answer, OptionRefusal, Refusal, UpstreamRequest, answer_for, relocated
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
from vllmd.proxy.tokens import TAIL_BYTES
from vllmd.proxy.upstream import OutOfFiles, Pool, Upstream, host_field

# Fields of the client's that no engine gets: its credentials, and those that ``request_head`` writes itself.
KEPT_BACK = frozenset(
    b"host content-length expect authorization x-api-key api-key cookie accept-encoding x-request-id"
    b" apikey x-goog-api-key x-auth-token x-access-token x-auth-key ocp-apim-subscription-key x-litellm-api-key"
    b" openai-api-key anthropic-api-key"
    b" forwarded x-vllmd-keep-alive x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip"
    b" origin access-control-request-method access-control-request-headers".split()
)
KEPT_BACK_TRACED = KEPT_BACK | {b"traceparent"}  # a traced request carries the daemon's own
RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')
RESPONSE_ID_BYTES = 256  # at most, with its key
REPLICA_FAILURES = frozenset({502, 503, 504})  # statuses of one replica, instead of which another may serve
MAX_TAIL_BYTES = 16 * TAIL_BYTES  # kept of an answer for its end; cut when so many have collected, not at each piece
OPENING_BYTES = 8192  # of an answer, in which its id or its first usage is looked for
RESPONSES = "/v1/responses"

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
        self._without_usage_option: set[str] = set()  # engines that refuse ``stream_options``

    def forget(self, engine: str) -> None:
        """Forget what was noted of an engine that has ended: its stored responses, and what it refuses."""
        self.requests.responses.forget(engine)
        self._without_usage_option.discard(engine)

    def handler(self, parse: Parse) -> Handler:
        """The handler of a route whose requests ``parse``, a method of ``ModelRequests``, reads."""
        return partial(self.forward, parse)

    async def forward(self, parse: Parse, exchange: Exchange) -> None:
        """Send one request to an engine, and the engine's answer to the client.

        Raises VllmdError for what ``parse`` refuses. A later failure is answered here.
        """
        # 1. Parse and authorise. The caller was identified by the head (routing.Router.begin), before the body was
        #    read. Only the body tells which model is meant, and so whether the caller may use it.
        upstream_request = await parse(exchange)
        if upstream_request is None:
            return
        parsed, target, key = upstream_request.parsed, upstream_request.target, exchange.request.caller.name
        exchange.model, exchange.offer = target.model, target.offer
        account = exchange.account = self._open_account(upstream_request, exchange.request)
        if self.limits.now.request_timeout is not None:
            exchange.expire(self.limits.now.request_timeout)
        heartbeat = LoadingHeartbeat(exchange, target.model, parsed.model, parsed.stream, self.limits, self.gate)
        only, body, waits = upstream_request.only_replica, parsed.raw, heartbeat.start
        try:
            # 2. Acquire: the key's limits, the model's queue, and an engine that is awake.
            permit = self.gate.try_acquire(target.model, key, only, body, waits, target.offer)
            permit = permit or await heartbeat.during(
                self.gate.acquire(target.model, key, only, body, waits, target.offer, upstream_request.public_path)
            )
            while True:
                attempt = upstream_request if permit.target is None else upstream_request.for_replica(permit.target)
                account.admit(attempt.target.model)
                answer = AnswerRelay(exchange, account, attempt, heartbeat, permit, self.requests.responses)
                try:
                    permit.on_cut(answer.cut)
                    if heartbeat.enabled:
                        answer.send_signs_of_life(self.heartbeats)
                    # 3. Connect, 4. send, 5. relay: the answer passes while this waits.
                    address = answer.address
                    connection = self.pool.get_idle(address) or await self.pool.connect(address)
                    # A second time if the engine had closed the connection meanwhile, or refuses stream_options.
                    while not await answer.relay(connection, *self._message(exchange.request, attempt, answer)):
                        connection = await self.pool.connect(address)
                    return
                except VllmdError as error:
                    # The frame that raised the error may hold it, and its traceback holds the variables of every
                    # function on the way: in that cycle of references the request's body, which body_memory no longer
                    # counts, would stay until the cycle collector runs.
                    failure = error.with_traceback(None)
                    answer.note_failure(failure)
                    if heartbeat.answer_begun or exchange.over:
                        raise
                finally:
                    # 6. Release, unless the answer's last byte has done so already.
                    answer.close()
                permit = await heartbeat.during(permit.retry(failure))
        except VllmdError as error:
            heartbeat.fail(error.with_traceback(None))
        finally:
            if upstream_request.keep_alive is not None:
                self.gate.keep_alive(target.model, key, upstream_request.keep_alive)

    def _open_account(self, upstream_request: UpstreamRequest, request: Request) -> Account:
        """What is noted of the request from now on. If its body is recorded, a field of the answer tells the client."""
        parsed, recorder, name = upstream_request.parsed, self._recorder, upstream_request.target.permit_name
        account = Account(parsed.stream)
        if self._tracer is not None:
            account.trace = self._tracer.begin(request)
        if recorder and recorder.active and recorder.begin(account, name, request.caller.name, parsed.raw):
            request.answer_fields = (*request.answer_fields, ("x-vllmd-recorded", "bodies"))
        return account

    def _message(self, request: Request, attempt: UpstreamRequest, answer: AnswerRelay) -> tuple[bytes, Parts, int]:
        """The head and the body for the engine, and the body's size in bytes.

        Sets ``answer.hides_usage`` if the message asks for a usage that the client did not ask for.
        """
        target, parsed = attempt.target, attempt.parsed
        if answer.usage_refused:
            self._without_usage_option.add(target.model)
        answer.hides_usage = (
            parsed.stream
            and usage.must_request_usage(parsed, attempt.route, target.rules)
            and target.model not in self._without_usage_option
        )
        name = target.served_name
        body = usage.with_usage_option(parsed, name) if answer.hides_usage else parsed.with_model(name)
        size = sum(map(len, body))
        return request_head(request, attempt, answer.address, size, answer.account.trace), body, size


class AnswerRelay:
    """One answer on its way to the client. The engine's connection reports to it (``upstream.Sink``)."""

    # What is set on the way; here, because each request pays for what is set as it begins.
    _done: asyncio.Future[None] | None = None  # the answer has passed, or ``_error`` says why not
    _resend = False  # a kept connection was closed before a byte of the answer
    _upstream: Upstream | None = None
    _answer: Answer | None = None
    _takes_comments = False  # it is a stream whose head does not give its length: comments may precede it
    _opening = b""  # the first bytes of the body, as long as they are of interest
    _status = 0

    def __init__(
        self,
        exchange: Exchange,
        account: Account,
        attempt: UpstreamRequest,
        heartbeat: LoadingHeartbeat,
        permit: Permit,
        responses: StoredResponses,
    ) -> None:
        self._exchange = exchange
        self.account = account
        self.address = permit.upstream
        self.hides_usage = False  # the message asks for a usage that the client did not ask for
        self.usage_refused = False  # the engine takes no such option
        self._recorded = account.answer  # where the body is noted, if it is
        self._attempt = attempt
        self._heartbeat = heartbeat
        self._permit: Permit | None = permit  # None once it was given back
        self._error: VllmdError | None = None
        self._heartbeats: Heartbeats | None = None  # until the first byte of the body, if the client is sent comments
        self._size = 0  # bytes of the body that came
        self._tail = bytearray()  # the last of them, TAIL_BYTES or more
        self._attentive = True  # the next piece is looked at (``_attend``): mostly only the first one is
        self._reads_opening = exchange.request.path in (RESPONSES, ANTHROPIC_PATH)
        self._responses = responses

    async def relay(self, upstream: Upstream, head: bytes, body: Parts, size: int) -> bool:
        """Send the request, whose body has ``size`` bytes, and wait until the answer has passed.

        False if nothing was passed on and the request must be sent again: ``upstream`` was a kept connection and is
        closed, or ``usage_refused``. Raises VllmdError.
        """
        self._upstream, self._resend, self.usage_refused = upstream, False, False
        if self._error is None:  # else it was cut off while it connected
            self._done = upstream.loop.create_future()
            upstream.send(self._exchange.request.method, head, body, size, self)
            self._exchange.follow_pauses(self._on_pause)
            await self._done
        if self._error is not None:
            raise self._error
        return not self._resend

    def note_failure(self, error: VllmdError) -> None:
        """Have the permit given back with the error, unless another one was the first."""
        self._error = self._error or error

    def close(self) -> None:
        """Release the permit and close the engine's connection, unless that is done."""
        self._exchange.on_pause = None
        if self._heartbeats is not None:
            self._stop_signs_of_life()
        if self._upstream is not None:
            self._upstream.abort()
        self._release()

    def cut(self, reason: str) -> None:
        """The daemon breaks the request off."""
        self._settle(EngineFailed(f"the request was broken off: {reason}"))

    def _release(self) -> None:
        """Give the permit back, with the tokens that the request took."""
        permit, self._permit = self._permit, None
        if permit is None:
            return
        attempt = self._attempt
        used = tokens.from_usage(self._tail, self._opening if self._exchange.request.path == ANTHROPIC_PATH else b"")
        if used is None and self._status == 200 and attempt.route.endswith(tokens.COUNTED):  # no usage, or broken off
            used = tokens.estimate(attempt.route, attempt.parsed.raw, self._size, stream=attempt.parsed.stream)
        self.account.tokens = used
        error = self._error  # without a file descriptor for a connection the daemon fails, not the engine
        failed = error.message if error is not None and not isinstance(error, OutOfFiles) else ""
        permit.release(used, self._size, failed)

    def _settle(self, error: VllmdError | None) -> None:
        self._error = self._error or error
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    # -- what the engine's connection reports

    def head(self, head: ResponseHead, framing: Framing) -> None:
        """The engine's head has come: decide how its body goes to the client (``answer_for``)."""
        self._status = head.status
        if self._recorded is not None:
            self._recorded.chunked = head.chunked
        streamed = head.streamed
        if self._permit is not None and self._permit.target is not None:
            if head.status in REPLICA_FAILURES:
                self._answer = Refusal(head.status, framing)
                return
            self._permit.answered(streamed)
        if head.has_location and self._permit is not None:
            head = relocated(head, self._permit.upstream, self._attempt.client_prefix)
        self._takes_comments = head.status == 200 and head.length is None and streamed
        exchange, heartbeat = self._exchange, self._heartbeat
        if self.hides_usage and head.status in usage.UNKNOWN_MEMBER:
            self._answer = OptionRefusal(exchange, heartbeat, head, framing)
            return
        self._answer = answer_for(exchange, self._attempt, heartbeat, head, framing, self.hides_usage)

    def data(self, data: bytes) -> None:
        """More of the body has come, framing included: pass it on, and keep its end, where the usage is."""
        size = len(data)
        self._size += size
        if self._attentive:
            self._attend(data)
        tail = self._tail
        if size >= TAIL_BYTES:
            tail[:] = data[-TAIL_BYTES:]
        else:
            tail += data
            if len(tail) > MAX_TAIL_BYTES:
                del tail[:-TAIL_BYTES]
        if self._answer is not None:
            self._answer.more(data)

    def _attend(self, data: bytes) -> None:
        """Do what follows from the body's first piece, and note its beginning, or all of it, where that is wanted."""
        if not data:  # the head came alone
            return
        self.account.answered = True
        if self._heartbeats is not None:
            self._stop_signs_of_life()
        if self._reads_opening:
            self._read_opening(data)
        if self._recorded is not None:
            self._recorded.more(data)
        self._attentive = self._reads_opening or self._recorded is not None

    def _read_opening(self, data: bytes) -> None:
        """Collect the opening: a response's id is in it, perhaps cut in two, or the usage of a message's prompt."""
        before = len(self._opening)
        self._opening += data[: OPENING_BYTES - before]
        self._reads_opening = len(self._opening) < OPENING_BYTES
        if self._exchange.request.path == RESPONSES:
            match = RESPONSE_ID.search(self._opening, max(0, before - RESPONSE_ID_BYTES))
            if match:
                self._reads_opening = False
                self._responses.note(match[1].decode(), self._attempt.target.model, self._attempt.parsed.model)

    def whole(self) -> None:
        """The answer is complete: the engine's connection is free again, and the client's request is over."""
        self._upstream = None
        self._exchange.on_pause = None
        answer = self._answer
        if isinstance(answer, Refusal):
            self._settle(answer.error())
            return
        if isinstance(answer, OptionRefusal) and answer.is_about_option:
            self._answer, self._resend, self.usage_refused = None, True, True
            self._tail, self._attentive, self.account.answered = bytearray(), True, False
            self._settle(None)
            return
        self._release()  # before the client has the last byte, see the invariants
        if answer is not None:
            answer.end()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def lost(self, reason: str, *, untouched: bool) -> None:
        """The engine's connection broke off."""
        self._resend = untouched and self._upstream is not None and self._upstream.reused
        self._upstream = None
        self._settle(None if self._resend else UpstreamFailed(f"the engine broke off: {reason}"))

    def _on_pause(self, paused: bool) -> None:
        if self._upstream is not None:
            (self._upstream.pause if paused else self._upstream.resume)()

    # -- signs of life while the engine reads the prompt

    def send_signs_of_life(self, heartbeats: Heartbeats) -> None:
        """Have ``heartbeats`` send the client comments until the answer's body begins."""
        self._heartbeats = heartbeats
        heartbeats.add(self._beat)

    def _beat(self) -> None:
        """A sign of life: behind a head of our own, or, if the engine has sent its head, as the body's first bytes."""
        if self._answer is None:
            self._heartbeat.reading_prompt()
        elif self._takes_comments:
            comment = b": reading the prompt\n\n"
            self._exchange.write(comment if self._exchange.ends_with_connection else chunk(comment))

    def _stop_signs_of_life(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.discard(self._beat)
            self._heartbeats = None


def request_head(
    request: Request, attempt: UpstreamRequest, address: Address, length: int, trace: Trace | None = None
) -> bytes:
    """The head that an engine gets before a body of ``length`` bytes: the client's fields less ``KEPT_BACK``.

    All but the last lines are the same for a client's requests to one model on one connection, so ``headers.sent``
    keeps them: the requests of one connection mostly share one ``Headers`` (``heads.HeadMemo``).
    """
    headers, target, path_and_traced = request.headers, attempt.target, (attempt.path, trace is not None)
    memo = headers.sent
    if memo is not None and memo[0] is address and memo[1] is target and memo[2] == path_and_traced:
        first_lines = memo[3]
    else:
        if headers.onward is None:
            headers.onward = write_fields(forwardable(headers.raw, but=KEPT_BACK))
        onward = headers.onward
        if trace is not None:  # two fields of that name would be read in two ways
            onward = write_fields(forwardable(headers.raw, but=KEPT_BACK_TRACED))
        line = f"{request.method} {address.prefix}{attempt.path} HTTP/1.1\r\nhost: {host_field(address)}\r\n"
        more = "".join([f"{name.lower()}: {value}\r\n" for name, value in target.headers])
        if address.key:
            more += f"authorization: Bearer {address.key}\r\n"
        first_lines = line.encode("ascii") + onward + more.encode("latin-1")
        headers.sent = address, target, path_and_traced, first_lines
    if trace is not None:
        first_lines += b"traceparent: %b\r\n" % trace.field.encode("ascii")
    return first_lines + f"x-request-id: {request.id}\r\ncontent-length: {length}\r\n\r\n".encode()
