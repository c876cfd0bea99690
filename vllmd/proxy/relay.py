"""The way of a model request: find the model, wait at the gate, send it on, hand the answer back as bytes.

What a client sees:
- its connection's end, at whatever time, closes the engine's connection at once, so the engine stops generating;
- an engine that dies before it answered is a 502, one that dies in the middle is a visible truncation;
- a request is sent a second time only if a kept connection turned out to be closed before a byte of the answer;
- one that failed before a byte of its answer, or found nobody listening, asks the gate whether it may go again:
  to another replica where there are several, or to an engine that has just died and will be started anew.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from vllmd.errors import BadRequest, EngineFailed, Forbidden, NotFound, UnknownModel, UpstreamFailed, VllmdError
from vllmd.proxy.answer import EVENT_STREAM, Answer, Refusal, UpstreamRequest, answer_for, relocated
from vllmd.proxy.decoding import charset_of, decoded, in_utf8
from vllmd.proxy.eager import Begun, Bell
from vllmd.proxy.engine_api import allows
from vllmd.proxy.exchange import Exchange, chunk
from vllmd.proxy.framing import Framing
from vllmd.proxy.gate import LONGEST_NAME, Gate, Permit, Rules, Target
from vllmd.proxy.heads import ResponseHead, forwardable, write_fields
from vllmd.proxy.http import Request, Response
from vllmd.proxy.keep_alive import WITHOUT, wish
from vllmd.proxy.large import LARGE, in_large, in_turns, ruled_large
from vllmd.proxy.limits import Limits
from vllmd.proxy.loading_heartbeat import Heartbeats, LoadingHeartbeat
from vllmd.proxy.peek import Asked, Parts, in_json, in_multipart, ruled
from vllmd.proxy.upstream import Pool, Upstream, host_field

# Of the client's fields an engine never sees these: its key, its cookies, and what we write ourselves.
KEPT_BACK = frozenset(
    b"host content-length expect authorization x-api-key api-key cookie accept-encoding x-request-id"
    b" forwarded x-vllmd-keep-alive x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip"
    b" origin access-control-request-method access-control-request-headers".split()
)
TOTAL_TOKENS = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')
IN_AND_OUT = [re.compile(rb'"%b_tokens"\s*:\s*(\d{1,12})' % which) for which in (b"input", b"output")]
RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')
RESPONSES_KEPT = 10_000
# What to ask a model that does not serve a route that other engines have.
INSTEAD = {
    "/completion": "POST /v1/completions",
    "/infill": "POST /v1/completions, with the model's own marks of prefix and suffix",
    "/apply-template": "POST /v1/chat/completions/render, or /tokenize with messages",
    "/v1/chat/completions/input_tokens": "POST /tokenize with messages counts them",
    "/v1/responses/input_tokens": "POST /tokenize with messages counts them",
    "/props": "GET /v1/models tells what there is to tell of a model",
    "/tokenizer_info": "GET /v1/models tells what there is to tell of a model",
}
REFUSALS = frozenset({502, 503, 504})  # of a replica: another one may serve
TAIL = 1024  # bytes at an answer's end in which its usage is looked for
MOST_TAIL = 16 * TAIL
OPENING = 8192  # bytes at an answer's beginning in which its id is looked for
LONGEST_ID = 256  # bytes of a response's id with its key

quoted = lru_cache(maxsize=256)(quote)


class Relay:
    """Serves the model routes."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self.pool = Pool(limits)
        self.gate = gate
        self.limits = limits
        self.heartbeats = Heartbeats(limits)
        self._responses: OrderedDict[str, tuple[str, str]] = OrderedDict()  # response id -> engine; model as asked for

    async def json(self, exchange: Exchange) -> None:
        """A route whose JSON body names the model."""
        request = exchange.request
        content_type = request.headers.get("content-type")
        kind = content_type.partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise BadRequest("the Content-Type must be application/json")
        if request.body[:1] != b"{" or "charset" in content_type.lower() or request.headers.get("content-encoding"):
            await self.make_plain(exchange, content_type)
        large = len(request.body) > LARGE
        await self.serve(exchange, await in_turns(in_large(request.body)) if large else in_json(request.body))

    async def form(self, exchange: Exchange) -> None:
        """A route whose multipart form names the model."""
        request = exchange.request
        content_type = request.headers.get("content-type")
        if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
            raise BadRequest("the Content-Type must be multipart/form-data")
        await self.make_plain(exchange, "")
        await self.serve(exchange, await in_turns(in_multipart(request.body, content_type)))

    async def make_plain(self, exchange: Exchange, content_type: str) -> None:
        """Take the body out of its Content-Encoding, and JSON (of this type, "" for a form) out of another charset.

        The engine gets the plain body, and fields that say no more of what it was.
        """
        request, most = exchange.request, self.limits.max_body
        coding = request.headers.get("content-encoding")
        if coding and coding.lower() != "identity":
            coded = len(request.body)
            work = decoded(request.body, coding, most, lambda size: exchange.body_grew(coded + size))
            request.body = await in_turns(work)
            exchange.body_grew(len(request.body))
            request.headers = request.headers.but("content-encoding")
        if content_type and (charset := charset_of(request.body, content_type)):
            wide = len(request.body)
            work = in_utf8(request.body, charset, most, lambda size: exchange.body_grew(wide + size))
            request.body = await in_turns(work)
            exchange.body_grew(len(request.body))
            request.headers = request.headers.but("content-type", ("content-type", "application/json"))

    async def query(self, exchange: Exchange) -> None:
        """A GET that asks about an engine; the query names the model, and does not go on with it."""
        request = exchange.request
        asked = Asked(request.query.get("model", ""), False, b"")
        target = self.target(request, asked.model, request.path)
        await self.send(exchange, UpstreamRequest(target, asked, request.path))

    async def response(self, exchange: Exchange) -> None:
        """``/v1/responses/{id}`` and below: the engine that made the response is the one that has it."""
        request = exchange.request
        if request.params["id"] not in self._responses:
            raise NotFound(f"no response {request.params['id']!r} is known; it is kept only while its model runs")
        engine, asked = self._responses[request.params["id"]]
        await self.serve(exchange, Asked(asked, False, request.body), "/v1/responses", only=engine)

    async def kserve(self, exchange: Exchange) -> None:
        """``/v2/models/{model}/...``: KServe's protocol, which Triton speaks, names the model in the path."""
        request = exchange.request
        route = request.route.replace(":path}", "}")
        target = self.target(request, request.params["model"], route)

        def path_at(at: Target) -> str:
            names = {**request.params, "model": at.served_name}
            return _with_query(request, re.sub(r"\{(\w+)\}", lambda name: quote(names[name[1]], safe=""), route))

        await self.send(exchange, UpstreamRequest(target, Asked("", False, request.body), path_at(target), path_at))

    async def upstream(self, exchange: Exchange) -> None:
        """``/upstream/{model}/...``: what the engine's kind lists of its own API, under the path as it came."""
        request = exchange.request
        path = request.target[request.target.index("/upstream/") :].partition("?")[0]
        segments = path.split("/")[2:]
        if await self._wants_slash(exchange, path, unquote("/".join(segments))):
            return
        for cut in range(len(segments) - 1, 0, -1):
            if sum(map(len, segments[:cut])) > 3 * LONGEST_NAME:  # percent-encoded
                continue
            try:
                target = self.target(request, unquote("/".join(segments[:cut])), "")
            except (UnknownModel, BadRequest):
                continue
            rest = segments[cut:]
            if not allows(target.own_api, request.method, rest):
                what = f"{request.method} /{unquote('/'.join(rest))} is not among what is passed on"
                raise Forbidden(f"{what} to the engine of {target.model!r}: what changes it, vllmd does alone")
            onward = _with_query(request, "/" + "/".join(rest))
            outside = "/upstream/" + "/".join(segments[:cut])
            await self.send(exchange, UpstreamRequest(target, Asked("", False, request.body), onward, outside=outside))
            return
        raise UnknownModel(f"no model's name begins {request.params['rest']!r}")

    async def _wants_slash(self, exchange: Exchange, path: str, name: str) -> bool:
        """Whether ``path`` is a model and nothing more; then its page is one slash further, and the client is told so.

        Links in a page are relative to the last slash: without one they would leave the engine's own paths.
        """
        try:
            self.target(exchange.request, name, "")
        except (UnknownModel, BadRequest):
            return False
        location = _with_query(exchange.request, path + "/")
        await exchange.respond(Response(308, headers=(("location", location), ("cache-control", "no-store"))))
        return True

    async def serve(self, exchange: Exchange, asked: Asked, route: str = "", only: str = "") -> None:
        """Relay the exchange to the model that was ``asked`` for, which must serve ``route`` (default: the path).

        ``only``: the replica that alone can answer.
        """
        target = self.target(exchange.request, asked.model, route or exchange.request.path)
        keep_alive = wish(exchange.request, asked)
        for rules in (target.rules if asked.quoted else None, WITHOUT if asked.keep_alive else None):
            if rules is not None:
                asked = await _ruled(asked.body, rules)
                exchange.request.body = asked.body  # the one that came is held no longer
        path = _with_query(exchange.request, quoted(exchange.request.path))
        try:
            await self.send(exchange, UpstreamRequest(target, asked, path), only)
        finally:
            if keep_alive is not None:
                self.gate.keep_alive(target.model, exchange.request.key, keep_alive)

    async def send(self, exchange: Exchange, upstream_request: UpstreamRequest, only: str = "") -> None:
        """Send it to an engine, and the engine's answer to the client, who is told of whatever goes wrong."""
        target, asked = upstream_request.target, upstream_request.asked
        exchange.outlives_eof = False
        exchange.model = target.model
        if self.limits.request_timeout is not None:
            exchange.expire(self.limits.request_timeout)
        loading = LoadingHeartbeat(
            exchange, target.model, asked.model, stream=asked.stream, limits=self.limits, gate=self.gate
        )
        try:
            await self._deliver(exchange, upstream_request, loading, only)
        except VllmdError as error:
            # Whoever raised it may hold it, and by its traceback everybody's variables: the request's body would stay
            # in that circle, uncounted, until the cycle collector comes by.
            loading.fail(error.with_traceback(None))

    def target(self, request: Request, name: str, route: str) -> Target:
        """What ``name`` means to this client, who asks for ``route`` ("" for none of the public ones).

        Raises UnknownModel, BadRequest, Forbidden, NotFound.
        """
        target = self.gate.resolve(name, request.caller)
        request.caller.check(target.model, name)
        if route and target.routes is not None and route not in target.routes:
            where = INSTEAD.get(route, "")
            raise NotFound(f"the model {target.model!r} does not serve {route}{where and '; ' + where}")
        if target.names and name not in target.names:  # found by habit (``daemon.names``): say what was found
            request.answer_fields = (*request.answer_fields, ("x-vllmd-model", quoted(target.model)))
        return target

    async def _deliver(
        self, exchange: Exchange, upstream_request: UpstreamRequest, loading: LoadingHeartbeat, only: str
    ) -> None:
        """Through the gate and on, until an engine has answered. Raises VllmdError."""
        acquiring = self.gate.acquire(
            upstream_request.target.model, exchange.request.key, exchange.ticket, only, upstream_request.asked.body
        )
        while True:
            permit = await self._admitted(acquiring, loading)
            try:
                await self._pass(
                    exchange, permit, upstream_request.at(permit.target) if permit.target else upstream_request, loading
                )
                return
            except VllmdError as error:
                if loading.relaying or exchange.over:
                    raise
                acquiring = permit.retry(error)

    async def _admitted(self, coming: Coroutine[Any, Any, Permit], loading: LoadingHeartbeat) -> Permit:
        acquiring = Begun(coming)
        if not acquiring.over:
            loading.begin()
        try:
            return await acquiring
        finally:
            loading.end()

    async def _pass(
        self, exchange: Exchange, permit: Permit, upstream_request: UpstreamRequest, loading: LoadingHeartbeat
    ) -> None:
        trip = Forward(exchange, upstream_request, loading, permit)
        try:
            permit.on_cut(trip.cut)
            if loading.wanted:
                self.heartbeats.add(trip)
                trip.heartbeats = self.heartbeats
            await trip.run(self.pool)
        finally:
            trip.quiet()
            trip.close()
            self._remember(trip.response_id, upstream_request)

    def _remember(self, response_id: str, upstream_request: UpstreamRequest) -> None:
        if response_id:
            self._responses[response_id] = upstream_request.target.model, upstream_request.asked.model
            if len(self._responses) > RESPONSES_KEPT:
                self._responses.popitem(last=False)

    def forget(self, model: str) -> None:
        """Its engine has ended, and the responses that it kept with it: nobody shall start it to be told so."""
        for response_id in [kept for kept, (of, _) in self._responses.items() if of == model]:
            del self._responses[response_id]


def _with_query(request: Request, path: str) -> str:
    return f"{path}?{request.query_string}" if request.query_string else path


async def _ruled(body: bytes, rules: Rules) -> Asked:
    """What a sound body asks for after ``rules``."""
    if len(body) > LARGE:
        return await in_turns(in_large(await in_turns(ruled_large(body, rules))))
    return in_json(ruled(body, rules))


class Forward:
    """One request's way to the engine and back; the engine's connection reports to it (``upstream.Sink``)."""

    def __init__(
        self, exchange: Exchange, upstream_request: UpstreamRequest, loading: LoadingHeartbeat, permit: Permit
    ) -> None:
        self._exchange = exchange
        self._errand = upstream_request
        self._loading = loading
        self._permit: Permit | None = permit
        self._where = permit.upstream
        self._over: Bell | None = None
        self._error: VllmdError | None = None
        self._again = False
        self._upstream: Upstream | None = None
        self._answer: Answer | None = None
        self.heartbeats: Heartbeats | None = None  # while it has no byte of the answer, and the client wants to know
        self._plain_events = False  # events that end with their last chunk or the connection: comments may precede them
        self._tail = bytearray()  # the last bytes of the answer, TAIL of them or more
        self._opening = bytearray()  # of the answer, as long as a response's id is looked for in it
        self._names_response = exchange.request.path == "/v1/responses"
        self.response_id = ""  # of a POST /v1/responses, once the answer has told it

    async def run(self, pool: Pool) -> None:
        """Send the request and see the answer through. Raises VllmdError, or is cancelled."""
        body = self._errand.asked.renamed(self._errand.target.served_name)
        head = self._head(sum(map(len, body)))
        upstream = pool.take(self._where) or await self._connect(pool)
        await self._attempt(upstream, head, body)
        if self._again:
            self._again = False
            await self._attempt(await self._connect(pool), head, body)
        if self._error is not None:
            raise self._error

    async def _connect(self, pool: Pool) -> Upstream:
        try:
            return await pool.connect(self._where)
        except UpstreamFailed as error:
            self._error = error  # the permit ends by it
            raise

    async def _attempt(self, upstream: Upstream, head: bytes, body: Parts) -> None:
        self._upstream = upstream
        if self._error is not None:  # cut off while it connected
            return
        self._over = over = Bell(loop=asyncio.get_running_loop())
        upstream.send(self._exchange.request.method, head, body, self)
        self._exchange.follow_pauses(self._on_pause)
        await over

    def close(self) -> None:
        """Whatever is still open is closed; nothing more reaches the client."""
        self._exchange.on_pause = None
        if self._upstream is not None:
            self._upstream.abort()
        self._leave()

    def cut(self, reason: str) -> None:
        """The daemon breaks the request off, and goes on with what it is at before anything follows from that."""
        self._error = self._error or EngineFailed(f"the request was broken off: {reason}")
        asyncio.get_running_loop().call_soon(self._settle, None)

    def _leave(self) -> None:
        """Tell the gate that the request is over, and what the answer's usage says it took in all, if it does."""
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.done(total_tokens(bytes(self._tail[-TAIL:])), self._error.message if self._error is not None else "")

    # -- what the engine's connection says

    def head(self, head: ResponseHead, framing: Framing) -> None:
        """The answer begins."""
        if self._permit is not None and self._permit.target is not None:
            if head.status in REFUSALS:
                self._answer = Refusal(head.status, framing)
                return
            self._permit.answered(head.content_type.startswith(EVENT_STREAM))
        if head.has_location:
            head = relocated(head, self._where, self._errand.outside)
        self._plain_events = head.status == 200 and head.length is None and head.content_type.startswith(EVENT_STREAM)
        self._answer = answer_for(self._exchange, self._errand, self._loading, head, framing)

    def beat(self) -> None:
        """A sign of life: behind a head of our own, or, if the engine has sent its head, as the body's first bytes."""
        if self._answer is None:
            self._loading.reading()
        elif self._plain_events:
            comment = b": reading the prompt\n\n"
            self._exchange.write(comment if self._exchange.ends_with_connection else chunk(comment))

    def quiet(self) -> None:
        """No more signs of life."""
        if self.heartbeats is not None:
            self.heartbeats.discard(self)
            self.heartbeats = None

    def data(self, data: bytes) -> None:
        """More of the body."""
        if data and self.heartbeats is not None:
            self.quiet()
        if len(data) < TAIL:
            tail = self._tail
            tail += data
            if len(tail) > MOST_TAIL:  # what is too old goes when there is much of it, not at each piece
                del tail[:-TAIL]
        else:
            self._tail = bytearray(data[-TAIL:])
        if self._names_response:
            self._look_for_id(data)
        if self._answer is not None:
            self._answer.more(data)

    def _look_for_id(self, data: bytes) -> None:
        """The id is at the answer's beginning, perhaps cut in two."""
        seen = len(self._opening)
        self._opening += data[: OPENING - seen]
        named = RESPONSE_ID.search(self._opening, max(0, seen - LONGEST_ID))
        if named:
            self._names_response, self.response_id = False, named[1].decode()
        elif len(self._opening) >= OPENING:
            self._names_response = False

    def whole(self) -> None:
        """The answer is complete: the engine's connection is free again, and the client's request is over."""
        self._upstream = None
        self._exchange.on_pause = None
        if isinstance(self._answer, Refusal):
            self._settle(self._answer.error())
            return
        self._leave()
        if self._answer is not None:
            self._answer.end()
        self._settle(None)

    def lost(self, reason: str, *, untouched: bool) -> None:
        """The engine's connection broke off."""
        self._again = untouched and self._upstream is not None and self._upstream.reused
        self._upstream = None
        self._settle(None if self._again else UpstreamFailed(f"the engine broke off: {reason}"))

    # -- the rest

    def _settle(self, error: VllmdError | None) -> None:
        self._error = self._error or error
        if self._over is not None:
            self._over.ring()

    def _on_pause(self, paused: bool) -> None:
        if self._upstream is not None:
            (self._upstream.pause if paused else self._upstream.resume)()

    def _head(self, length: int) -> bytes:
        """What the engine is sent before the body: the client's fields less what is not its business."""
        request, target = self._exchange.request, self._errand.target
        onward = request.headers.onward
        if onward is None:
            onward = write_fields(forwardable(request.headers.raw, but=KEPT_BACK))
            request.headers.onward = onward
        more = "".join([f"{name.lower()}: {value}\r\n" for name, value in target.headers])
        if self._where.key:
            more += f"authorization: Bearer {self._where.key}\r\n"
        path = self._where.prefix + self._errand.path
        line = f"{request.method} {path} HTTP/1.1\r\nhost: {host_field(self._where)}\r\n"
        own = f"{more}x-request-id: {request.id}\r\ncontent-length: {length}\r\n\r\n"
        return line.encode("ascii") + onward + own.encode("latin-1")


def total_tokens(tail: bytes) -> int | None:
    """What the usage in the last bytes of an answer says it took in all, if it does."""
    start = max(0, len(tail) - TAIL)
    at = tail.rfind(b'"total_tokens"', start)  # inside a string, the quotes would be escaped
    if at < 0:
        return _in_and_out(tail, start) if tail.find(b'"output_tokens"', start) >= 0 else None
    told = TOTAL_TOKENS.match(tail, at)
    return int(told[1]) if told else None


def _in_and_out(tail: bytes, start: int) -> int | None:
    """Anthropic's usage, which has no total; the last one is that of the whole answer, if it has both."""
    told = [which.findall(tail, start) for which in IN_AND_OUT]
    return sum(int(numbers[-1]) for numbers in told) if all(told) else None
