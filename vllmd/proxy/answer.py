"""The engine's answer on its way to the client.

Mostly the body passes as the bytes it came in, framing and all. It is taken apart and framed anew only where it
must be: another name goes into it, the client speaks HTTP/1.0, or the client's head was sent early.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from vllmd.errors import NotFound, Unavailable, VllmdError
from vllmd.frozen import frozen
from vllmd.proxy.exchange import LAST_CHUNK, Exchange, chunk
from vllmd.proxy.framing import Chunked, Framing
from vllmd.proxy.gate import Address, Target
from vllmd.proxy.heads import BODYLESS, ResponseHead, forwardable, write_fields
from vllmd.proxy.hosts import shares_the_page
from vllmd.proxy.http import Headers, date_line, status_line
from vllmd.proxy.loading_heartbeat import LoadingHeartbeat
from vllmd.proxy.paths import INSTEAD
from vllmd.proxy.peek import Asked
from vllmd.proxy.rewrite import Rewriter
from vllmd.proxy.upstream import host_field
from vllmd.proxy.usage import Both, UsageFilter, WithoutUsage

# Of the engine's fields a client never sees these: we write them ourselves, or they speak for another origin than ours.
OURS = frozenset(
    b"content-length x-request-id x-accel-buffering server set-cookie alt-svc strict-transport-security"
    b" access-control-allow-origin access-control-allow-credentials access-control-allow-methods"
    b" access-control-allow-headers access-control-expose-headers access-control-max-age"
    b" service-worker-allowed clear-site-data x-content-type-options".split()
)
# What a browser never runs. Everything else of an engine's may hold a script, which would run as a page of ours.
HARMLESS = (b"application/json", b"text/event-stream")
PLAIN, FENCED = b"x-content-type-options: nosniff\r\n", b"content-security-policy: sandbox\r\n"
EVENT_STREAM = b"text/event-stream"
LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "::1")  # names of this machine that engines know theirs by
ABSOLUTE = re.compile(r"(?:https?:)?//([^/?#]*)(.*)", re.IGNORECASE)
NO_ROUTE = b'{"detail":"Not Found"}'
MAX_ERROR = 1 << 20  # bytes of an error answer that becomes an event
MAX_HELD = 1 << 20  # bytes of an answer kept whole for the sake of its length; a longer one goes out in chunks


@frozen
class UpstreamRequest:
    """A request ready to be sent: the model that it is for, its body, and its path at the engine."""

    target: Target
    asked: Asked
    path: str  # at the engine, with the query
    path_at: Callable[[Target], str] | None = None  # where the engine's name for the model is in it
    outside: str = ""  # what a client puts before a path of the engine's to reach it
    only: str = ""  # the replica that alone can serve it
    public: str = ""  # the public path that the client asked for, "" for none of them
    keep_alive: float | None = None  # seconds for which the client will want the model again, see ``proxy.keep_alive``

    @property
    def route(self) -> str:
        """The path at the engine, without the query."""
        return self.path.partition("?")[0]

    def at(self, target: Target | None) -> UpstreamRequest:
        """The same for another replica, if it is for a certain one."""
        if target is None:
            return self
        return replace(self, target=target, path=self.path_at(target) if self.path_at else self.path)


class Answer(Protocol):
    """Takes an answer's body as it comes off the engine's connection."""

    @property
    def more(self) -> Callable[[bytes], None]:
        """Takes more of the body, as framed by the engine."""

    @property
    def end(self) -> Callable[[], None]:
        """To be called when the body is whole."""


def answer_for(
    exchange: Exchange,
    upstream_request: UpstreamRequest,
    loading: LoadingHeartbeat,
    head: ResponseHead,
    framing: Framing,
    *,
    hides_usage: bool = False,
) -> Answer:
    """How this answer goes to the client; ``hides_usage``: less the usage, which the client did not ask for."""
    streamed = head.content_type.startswith(EVENT_STREAM)
    if loading.head_sent and (head.status != 200 or not streamed):
        return ErrorEvent(loading, framing)
    loading.answer_begun = True
    plain = not (upstream_request.outside or loading.head_sent) and exchange.request.method != "HEAD"
    if head.status == 404 and head.length == len(NO_ROUTE) and plain:
        return NoRoute(exchange, head, framing, upstream_request)
    names = _rewriter(upstream_request, head)
    rewriter: Rewriter | Both | None = names
    if exchange.request.method == "HEAD":
        return PassThrough(exchange, head.status, opening(exchange, head, None, chunked=head.chunked))
    if hides_usage and streamed and head.status == 200:
        if rewriter is None and isinstance(framing, Chunked) and exchange.takes_chunks:
            begun = b"" if loading.head_sent else opening(exchange, head, None, chunked=True)
            return WithoutUsage(exchange, framing, begun)
        rewriter = Both(UsageFilter(), names)
    if names is not None and head.length is not None and head.length <= MAX_HELD and not loading.head_sent:
        return Buffered(exchange, head, framing, names)
    if loading.head_sent:
        if rewriter is None and head.chunked and exchange.takes_chunks:
            return PassThrough(exchange, 200, b"")
        return Reframed(exchange, framing, rewriter, 200, b"")
    if rewriter is None and (not head.chunked or exchange.takes_chunks):
        return PassThrough(exchange, head.status, opening(exchange, head, head.length, chunked=head.chunked))
    return Reframed(exchange, framing, rewriter, head.status, opening(exchange, head, None, chunked=True))


def _rewriter(upstream_request: UpstreamRequest, head: ResponseHead) -> Rewriter | None:
    """What puts the client's name of the model into the answer, where the engine's is another."""
    asked, served = upstream_request.asked.model, upstream_request.target.served_name
    if asked and asked != served and head.content_type.startswith((EVENT_STREAM, b"application/json")):
        return Rewriter(served, asked)
    return None


def opening(exchange: Exchange, head: ResponseHead, length: int | None, *, chunked: bool) -> bytes:
    """The head for the client, with the framing that its body is going to have."""
    framing = b""
    if exchange.request.method == "HEAD":
        if told := head.headers.get("content-length"):  # what a GET's would be
            framing = b"content-length: %b\r\n" % told.encode()
    elif length is not None:
        if head.status not in BODYLESS:
            framing = b"content-length: %d\r\n" % length
    elif chunked and exchange.takes_chunks:
        framing = b"transfer-encoding: chunked\r\n"
    else:
        exchange.end_with_connection()
    connection = b""  # nothing is said of it where it is as HTTP/1.1 has it
    if not exchange.keep_alive:
        connection = b"connection: close\r\n"
    elif exchange.request.version == "1.0":
        connection = b"connection: keep-alive\r\n"
    if not head.content_type.startswith(HARMLESS):
        connection += PLAIN + FENCED if shares_the_page(exchange.request) else PLAIN
    return b"%b%b%bx-request-id: %b\r\n%b%b\r\n" % (
        status_line(head.status),
        b"" if head.dated else date_line(),
        head.headers.onward if head.headers.onward is not None else _onward(head),
        exchange.request.id.encode("ascii"),
        framing,
        connection,
    )


def relocated(head: ResponseHead, where: Address, outside: str) -> ResponseHead:
    """``head`` whose Location makes sense outside: a path of ours, where it was one at the engine's own address."""
    own = {host_field(where), "localhost"} | ({f"{where.host}:{where.port}", where.host} if where.host else set())
    if where.host in LOOPBACK:
        own |= {f"{name}:{where.port}" for name in LOOPBACK}
    fields = []
    for name, value in head.headers.raw:
        if name == b"location":
            absolute = ABSOLUTE.match(value.decode("latin-1"))
            if absolute is not None and absolute[1].lower() in own:
                value = (absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]).encode("latin-1")
            if value.startswith(b"/") and not value.startswith(b"//"):
                value = outside.encode("latin-1") + value.removeprefix(where.prefix.encode())
        fields.append((name, value))
    return replace(head, headers=Headers(fields))


def _onward(head: ResponseHead) -> bytes:
    """The engine's fields that a client gets, as lines."""
    fields = forwardable(head.headers.raw, but=OURS)
    if head.content_type.startswith(EVENT_STREAM):
        fields.append((b"x-accel-buffering", b"no"))
    head.headers.onward = onward = write_fields(fields)
    return onward


class PassThrough:
    """The body's bytes as they come: once the head is out, the exchange itself takes them."""

    __slots__ = ("_exchange", "_head", "_status", "end", "more")

    def __init__(self, exchange: Exchange, status: int, head: bytes) -> None:
        self._exchange = exchange
        self._status = status
        self._head = head
        self.more: Callable[[bytes], None] = self._first if head else exchange.write
        self.end: Callable[[], None] = exchange.finish

    def _first(self, data: bytes) -> None:
        """Send the first piece along with the head."""
        self.more = self._exchange.write
        self._exchange.start(self._status, self._head + data)


class Reframed:
    """The payload in chunks of our own (or plain, for HTTP/1.0), with names put right."""

    def __init__(
        self, exchange: Exchange, framing: Framing, rewriter: Rewriter | Both | None, status: int, head: bytes
    ) -> None:
        self._exchange = exchange
        self._framing = framing
        self._rewriter = rewriter
        self._status = status
        self._head = head
        self._plainly = rewriter is None and not exchange.takes_chunks  # the payload goes on as it is
        framing.keep = True

    def more(self, data: bytes) -> None:
        """Take the payload out of ``data`` and pass it on."""
        if self._plainly:
            pieces, self._framing.pieces = self._framing.pieces, []
            if self._head:
                head, self._head = self._head, b""
                self._exchange.start(self._status, head, pieces)
            elif pieces:
                self._exchange.write_pieces(pieces)
            return
        payload = b"".join(self._framing.pieces)
        self._framing.pieces.clear()
        self._send(self._rewriter.feed(payload) if self._rewriter is not None else payload)

    def end(self) -> None:
        """Pass on what was held, and the end."""
        if self._rewriter is not None:
            self._send(self._rewriter.rest())
        if self._exchange.takes_chunks:
            self._exchange.write(LAST_CHUNK)
        self._exchange.finish()

    def _send(self, payload: bytes) -> None:
        framed = chunk(payload) if payload and self._exchange.takes_chunks else payload
        if self._head:
            head, self._head = self._head, b""
            self._exchange.start(self._status, head + framed)
        elif framed:
            self._exchange.write(framed)


class Kept:
    """A body that is kept until it is whole, in one buffer however small its pieces; beyond ``most`` bytes it ends."""

    def __init__(self, framing: Framing, most: int) -> None:
        self._framing = framing
        self._most = most
        self._body = bytearray()
        framing.keep = True

    def more(self, data: bytes) -> None:
        """Take what the framing has kept of ``data``."""
        for piece in self._framing.pieces:
            self._body += piece
        self._framing.pieces.clear()
        if len(self._body) > self._most:
            self._framing.keep = False

    @property
    def body(self) -> bytes:
        """The payload so far, in bytes."""
        return bytes(self._body)


class Buffered(Kept):
    """A JSON answer of known length, kept until it is whole because its length changes with the name."""

    def __init__(self, exchange: Exchange, head: ResponseHead, framing: Framing, rewriter: Rewriter) -> None:
        super().__init__(framing, MAX_HELD)
        self._exchange = exchange
        self._head = head
        self._rewriter = rewriter

    def end(self) -> None:
        """Rename, and send all of it."""
        body = self._rewriter.renamed(self.body)
        head = opening(self._exchange, self._head, len(body), chunked=False)
        self._exchange.start(self._head.status, head + body)
        self._exchange.finish()


class NoRoute(Kept):
    """What FastAPI says where an engine has no such route, as vLLM's are made for the kind of model: it says nothing of
    the model, nor what would be right."""

    def __init__(self, exchange: Exchange, head: ResponseHead, framing: Framing, asked: UpstreamRequest) -> None:
        super().__init__(framing, MAX_HELD)
        self._exchange, self._head, self._asked = exchange, head, asked

    def end(self) -> None:
        """Say so in the words of the API; anything else of that length is passed on."""
        if self.body == NO_ROUTE:
            path = self._exchange.request.path
            told = f"the model {self._asked.target.model!r} does not serve {path}"
            self._exchange.fail(NotFound(f"{told}; {INSTEAD[path]}" if path in INSTEAD else told))
            return
        self._exchange.start(404, opening(self._exchange, self._head, len(self.body), chunked=False) + self.body)
        self._exchange.finish()


class Refusal(Kept):
    """A replica's word that it cannot serve just now; the request may yet be served elsewhere."""

    def __init__(self, status: int, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR)
        self.status = status

    def end(self) -> None:
        """Nothing is sent to the client: ``Relay.forward`` decides whether another replica is tried."""

    def error(self) -> VllmdError:
        """The error for the client, if no other replica serves the request."""
        try:
            told = str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            told = "it said no more"
        return Unavailable(f"the engine answered {self.status}: {told}", retry_after=1)


class OptionRefusal(Kept):
    """An error that is perhaps about the ``stream_options`` that the client did not send; else it is the client's."""

    def __init__(self, exchange: Exchange, loading: LoadingHeartbeat, head: ResponseHead, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR)
        self._exchange, self._loading, self._head = exchange, loading, head

    @property
    def ours(self) -> bool:
        """Whether it is about what we have added."""
        return b"stream_options" in self._body or b"include_usage" in self._body

    def end(self) -> None:
        """Hand the refusal on to the client: it was not about an option of ours."""
        if self._loading.head_sent:
            self._loading.fail_with(self.body)
            return
        self._loading.answer_begun = True
        head = opening(self._exchange, self._head, len(self._body), chunked=False)
        self._exchange.start(self._head.status, head + self.body)
        self._exchange.finish()


class ErrorEvent(Kept):
    """An error that comes after the client's 200: it becomes the stream's last event."""

    def __init__(self, loading: LoadingHeartbeat, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR)
        self._loading = loading

    def end(self) -> None:
        """Send the error as the stream's last event."""
        self._loading.fail_with(self.body)
