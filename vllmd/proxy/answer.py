"""How an engine's answer goes to the client: ``answer_for`` chooses one of the classes below by the engine's head.

Mostly the body passes as the bytes it came in, framing and all. It is taken apart and framed anew only where it
must be: the model's name or a usage is replaced in it, the client speaks HTTP/1.0, or the client has had its head
already because the model was loading (``loading_heartbeat``).
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
from vllmd.proxy.peek import ParsedBody
from vllmd.proxy.rewrite import Rewriter
from vllmd.proxy.upstream import host_field
from vllmd.proxy.usage import FilterChain, UsageFilter, WithoutUsage

# Fields of the engine's that no client gets: ``response_head`` writes them itself, or they are about the engine's
# origin.
OURS = frozenset(
    b"content-length x-request-id x-accel-buffering server set-cookie alt-svc strict-transport-security"
    b" access-control-allow-origin access-control-allow-credentials access-control-allow-methods"
    b" access-control-allow-headers access-control-expose-headers access-control-max-age"
    b" service-worker-allowed clear-site-data x-content-type-options".split()
)
LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "::1")  # hosts that an engine may put into its own URLs
ABSOLUTE = re.compile(r"(?:https?:)?//([^/?#]*)(.*)", re.IGNORECASE)
NO_ROUTE = b'{"detail":"Not Found"}'  # FastAPI's body where it has no such route
MAX_ERROR_BYTES = 1 << 20  # of an error answer that becomes an event
MAX_BUFFERED_BYTES = 1 << 20  # of an answer kept whole for the sake of its length; a longer one goes out in chunks


@frozen
class UpstreamRequest:
    """A request ready to be sent: the model that it is for, its body, and its path at the engine."""

    target: Target
    parsed: ParsedBody
    path: str  # at the engine, with the query
    public_path: str = ""  # the route as clients know it; "" below /upstream
    only_replica: str = ""  # the replica that alone can serve it; "" for any
    keep_alive: float | None = None  # seconds for which the client will want the model again, see ``proxy.keep_alive``
    path_for: Callable[[Target], str] | None = None  # makes ``path`` where the engine's name for the model is in it
    client_prefix: str = ""  # "/upstream/NAME", if the client reaches the engine's own paths below that

    @property
    def route(self) -> str:
        """The path at the engine, without the query."""
        return self.path.partition("?")[0]

    def for_replica(self, target: Target) -> UpstreamRequest:
        """The same request for the replica ``target``, whose served model name may be another."""
        return replace(self, target=target, path=self.path_for(target) if self.path_for else self.path)


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
    hides_usage: bool,
) -> Answer:
    """Choose how this answer goes to the client; ``hides_usage``: without the usage, which only the relay asked for."""
    streamed = head.streamed
    # 1. After a 200 that was sent while the model loaded, anything but a stream can only be told as an event.
    if loading.head_sent and (head.status != 200 or not streamed):
        return ErrorEvent(loading, framing)
    loading.answer_begun = True
    request = exchange.request
    if request.method == "HEAD":
        return PassThrough(exchange, head.status, response_head(exchange, head, None, head.chunked))
    # 2. The engine has no such route: say so in the words of the API. Below /upstream the client wants its own words.
    replaceable = not (upstream_request.client_prefix or loading.head_sent)
    if head.status == 404 and head.length == len(NO_ROUTE) and replaceable:
        return NoRoute(exchange, head, framing, upstream_request)
    # 3. What has to be replaced in the body: the engine's name for the model, a usage.
    asked, served = upstream_request.parsed.model, upstream_request.target.served_name
    has_names = asked and asked != served and (streamed or head.content_type.startswith(b"application/json"))
    names = Rewriter(served, asked) if has_names else None
    rewriter: Rewriter | FilterChain | None = names
    if hides_usage and streamed and head.status == 200:
        if names is None and isinstance(framing, Chunked) and exchange.takes_chunks:
            begun = b"" if loading.head_sent else response_head(exchange, head, None, chunked=True)
            return WithoutUsage(exchange, framing, begun)
        rewriter = FilterChain(UsageFilter(), names)
    # 4. A JSON answer keeps a length, if it is short enough to wait for: some clients want one.
    if names is not None and head.length is not None and head.length <= MAX_BUFFERED_BYTES and not loading.head_sent:
        return Buffered(exchange, head, framing, names)
    # 5. Else the bytes pass as they come, unless the client cannot take the framing or something is replaced.
    if loading.head_sent:
        if rewriter is None and head.chunked and exchange.takes_chunks:
            return PassThrough(exchange, 200, b"")
        return Reframed(exchange, framing, rewriter, 200, b"")
    if rewriter is None and (not head.chunked or exchange.takes_chunks):
        return PassThrough(exchange, head.status, response_head(exchange, head, head.length, head.chunked))
    return Reframed(exchange, framing, rewriter, head.status, response_head(exchange, head, None, chunked=True))


def response_head(exchange: Exchange, head: ResponseHead, length: int | None, chunked: bool) -> bytes:
    """The head for the client, with the framing that its body is going to have: ``length``, chunks, or the end."""
    request, framing = exchange.request, ""
    if request.method == "HEAD":
        if content_length := head.headers.get("content-length"):  # of the body that a GET would have
            framing = f"content-length: {content_length}\r\n"
    elif length is not None:
        if head.status not in BODYLESS:
            framing = f"content-length: {length}\r\n"
    elif chunked and exchange.takes_chunks:
        framing = "transfer-encoding: chunked\r\n"
    else:
        exchange.end_with_connection()
    more = ""  # no field: HTTP/1.1 keeps connections alive
    if not exchange.keep_alive:
        more = "connection: close\r\n"
    elif not exchange.takes_chunks:  # it speaks HTTP/1.0
        more = "connection: keep-alive\r\n"
    if not head.harmless and shares_the_page(request):
        more += "content-security-policy: sandbox\r\n"
    first_lines = head.headers.onward or _first_lines(head)
    if not head.dated:
        first_lines += date_line()
    return first_lines + f"x-request-id: {request.id}\r\n{framing}{more}\r\n".encode()


def relocated(head: ResponseHead, address: Address, client_prefix: str) -> ResponseHead:
    """``head`` with a Location that clients can follow: ``client_prefix`` takes the place of the engine's address."""
    own = {host_field(address), "localhost"}
    if address.host:
        own |= {f"{address.host}:{address.port}", address.host}
    if address.host in LOOPBACK:
        own |= {f"{name}:{address.port}" for name in LOOPBACK}
    fields = []
    for name, value in head.headers.raw:
        if name == b"location":
            absolute = ABSOLUTE.match(value.decode("latin-1"))
            if absolute is not None and absolute[1].lower() in own:
                value = (absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]).encode("latin-1")
            if value.startswith(b"/") and not value.startswith(b"//"):
                value = client_prefix.encode("latin-1") + value.removeprefix(address.prefix.encode())
        fields.append((name, value))
    return replace(head, headers=Headers(fields))


def _first_lines(head: ResponseHead) -> bytes:
    """The lines that a client gets of the engine's head; noted in ``head.headers``, which the next answer may share."""
    fields = forwardable(head.headers.raw, but=OURS)
    if head.streamed:
        fields.append((b"x-accel-buffering", b"no"))
    if not head.harmless:
        fields.append((b"x-content-type-options", b"nosniff"))
    head.headers.onward = first_lines = status_line(head.status) + write_fields(fields)
    return first_lines


class PassThrough:
    """Passes the body on as it comes. After the head ``more`` is the exchange's own ``write``, to save a call."""

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
    """Passes the payload on in chunks of our own (unframed, for HTTP/1.0), with what ``rewriter`` replaces in it."""

    def __init__(
        self, exchange: Exchange, framing: Framing, rewriter: Rewriter | FilterChain | None, status: int, head: bytes
    ) -> None:
        self._exchange = exchange
        self._framing = framing
        self._rewriter = rewriter
        self._status = status
        self._head = head
        self._unframed = rewriter is None and not exchange.takes_chunks  # the payload passes as it is
        framing.keep = True

    def more(self, data: bytes) -> None:
        """Pass on the payload that the framing has found in ``data``."""
        if self._unframed:
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
        """Pass on what the rewriter held back, and the last chunk."""
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


class Collected:
    """A body that is collected until it is whole; what exceeds ``max_bytes`` is dropped.

    In one buffer: a list of pieces of two bytes would take twenty times their size.
    """

    def __init__(self, framing: Framing, max_bytes: int) -> None:
        self._framing = framing
        self._max_bytes = max_bytes
        self._body = bytearray()
        framing.keep = True

    def more(self, data: bytes) -> None:
        """Collect the payload that the framing has found in ``data``."""
        for piece in self._framing.pieces:
            self._body += piece
        self._framing.pieces.clear()
        if len(self._body) > self._max_bytes:
            self._framing.keep = False


class Buffered(Collected):
    """A JSON answer of known length, collected because its length changes with the model's name."""

    def __init__(self, exchange: Exchange, head: ResponseHead, framing: Framing, rewriter: Rewriter) -> None:
        super().__init__(framing, MAX_BUFFERED_BYTES)
        self._exchange = exchange
        self._head = head
        self._rewriter = rewriter

    def end(self) -> None:
        """Replace the name, and send head and body."""
        body = self._rewriter.renamed(bytes(self._body))
        head = response_head(self._exchange, self._head, len(body), chunked=False)
        self._exchange.start(self._head.status, head + body)
        self._exchange.finish()


class NoRoute(Collected):
    """FastAPI's 404 for a path that it has no route for. vLLM has routes only for what the kind of model can do."""

    def __init__(
        self, exchange: Exchange, head: ResponseHead, framing: Framing, upstream_request: UpstreamRequest
    ) -> None:
        super().__init__(framing, MAX_BUFFERED_BYTES)
        self._exchange, self._head, self._model = exchange, head, upstream_request.target.model

    def end(self) -> None:
        """Name the model and what it serves instead; another body of the same length is passed on."""
        if self._body == NO_ROUTE:
            path = self._exchange.request.path
            message = f"the model {self._model!r} does not serve {path}"
            self._exchange.fail(NotFound(f"{message}; {INSTEAD[path]}" if path in INSTEAD else message))
            return
        head = response_head(self._exchange, self._head, len(self._body), chunked=False)
        self._exchange.start(404, head + bytes(self._body))
        self._exchange.finish()


class Refusal(Collected):
    """A replica's answer that it cannot serve just now; another replica may."""

    def __init__(self, status: int, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR_BYTES)
        self.status = status

    def end(self) -> None:
        """Send nothing: ``Relay.forward`` decides whether another replica is tried."""

    def error(self) -> VllmdError:
        """The error for the client, if no other replica serves the request."""
        try:
            message = str(json.loads(self._body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = "it said no more"
        return Unavailable(f"the engine answered {self.status}: {message}", retry_after=1)


class OptionRefusal(Collected):
    """A 400 or 422 that may be about ``stream_options``, which the client did not send; else it is the client's."""

    def __init__(self, exchange: Exchange, loading: LoadingHeartbeat, head: ResponseHead, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR_BYTES)
        self._exchange, self._loading, self._head = exchange, loading, head

    @property
    def is_about_option(self) -> bool:
        """Whether the error names the option that was added to the request."""
        return b"stream_options" in self._body or b"include_usage" in self._body

    def end(self) -> None:
        """Pass the error on to the client: it is not about the option."""
        if self._loading.head_sent:
            self._loading.send_error_event(bytes(self._body))
            return
        self._loading.answer_begun = True
        head = response_head(self._exchange, self._head, len(self._body), chunked=False)
        self._exchange.start(self._head.status, head + bytes(self._body))
        self._exchange.finish()


class ErrorEvent(Collected):
    """An error after the client's 200, which was sent while the model loaded: it becomes the stream's last event."""

    def __init__(self, loading: LoadingHeartbeat, framing: Framing) -> None:
        super().__init__(framing, MAX_ERROR_BYTES)
        self._loading = loading

    def end(self) -> None:
        """Send the error as the stream's last event."""
        self._loading.send_error_event(bytes(self._body))
