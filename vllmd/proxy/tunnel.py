"""WebSockets (``/v1/realtime?model=NAME``): after the handshake, bytes both ways and nothing else.

The query names the model, as OpenAI has it; messages inside the socket are not read.

An engine's own page has one, too (``/upstream/NAME/ws`` of ComfyUI), for the progress of its jobs, and stays open for
days. So once it is open, it is no request any more: it does not keep the model loaded, does not load it when the page
reconnects, and ends with its engine, or when its key may not open it any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import cast
from urllib.parse import parse_qsl, urlencode

from vllmd.errors import BadRequest, EngineFailed, NotFound, Unavailable, UpstreamFailed, VllmdError
from vllmd.proxy.answer import OURS
from vllmd.proxy.exchange import Exchange, with_fields
from vllmd.proxy.forward import KEPT_BACK, Relay
from vllmd.proxy.framing import BadFraming
from vllmd.proxy.gate import Address, Permit, Target, silent
from vllmd.proxy.heads import forwardable, parse_response_head, parse_upgrade_head, write_fields, write_request_head
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.limits import read_small
from vllmd.proxy.model_requests import KEY_IN_QUERY
from vllmd.proxy.response_heads import HeadCollector
from vllmd.proxy.routing import RECHECK_SECONDS
from vllmd.proxy.upstream import OutOfFiles, connect, host_field

log = logging.getLogger(__name__)

SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\n"
UPGRADE_FIELDS = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
KEY_PROTOCOL = "openai-insecure-api-key."  # a sub-protocol with a key: a browser's script can set no other field
MAX_REFUSAL_BYTES = 1000  # of an engine's refusal, passed on in the error
HANDSHAKE_SECONDS = 30.0  # for the engine to answer the handshake


class FarEnd(asyncio.Protocol):
    """The engine's side of a tunnel."""

    def __init__(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[bytes] = loop.create_future()  # the bytes of the head
        self.closed: asyncio.Future[None] = loop.create_future()
        self._exchange = exchange
        self.transport: asyncio.Transport
        self._collector = HeadCollector()
        self.early = b""  # bytes that came along with the head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The engine has accepted the tunnel's connection."""
        self.transport = cast(asyncio.Transport, transport)
        read_small(transport)

    def data_received(self, data: bytes) -> None:
        """The handshake's answer, then bytes for the client."""
        if self.answered.done():
            self._exchange.write(data)
            return
        try:
            found = self._collector.feed(data)
        except BadFraming:
            self.transport.abort()
            return
        if found is not None:
            whole, end = found
            self.early = whole[end:]
            self.answered.set_result(whole[:end])
            self.transport.pause_reading()  # until the client has the head

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine's side is closed: close the client's."""
        for future in (self.answered, self.closed):
            if not future.done():
                future.cancel()

    def pause_writing(self) -> None:
        """The engine does not take the client's bytes fast enough."""
        self._exchange.pause_client(True)

    def resume_writing(self) -> None:
        """The engine takes bytes again: read from the client again."""
        self._exchange.pause_client(False)

    def send(self, data: bytes) -> None:
        """Pass on bytes from the client to the engine."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def receive(self, data: bytes) -> None:
        """Count bytes of the client's after the handshake, and pass them on."""
        self._exchange.received += len(data)
        self.send(data)

    def open(self) -> None:
        """The client has the head: pass on the bytes that came along with it, and all further ones."""
        early, self.early = self.early, b""
        if early:
            self._exchange.write(early)
        self._exchange.follow_pauses(self._on_pause)
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def close(self) -> None:
        """Close both sides at once."""
        self._exchange.on_pause = None
        self.transport.abort()

    def _on_pause(self, paused: bool) -> None:
        if not self.transport.is_closing():
            (self.transport.pause_reading if paused else self.transport.resume_reading)()


class Tunnels:
    """The handlers of the routes that are relayed to engines as WebSockets."""

    def __init__(self, relay: Relay, still: Callable[[Request], None] = lambda request: None) -> None:
        """``still`` raises if the sender of a request for an engine's own socket may not have it any more."""
        self._relay = relay
        self._still = still

    async def realtime(self, exchange: Exchange) -> None:
        """``GET /v1/realtime``: a WebSocket to the engine of ``?model=``. Raises VllmdError if it is refused."""
        request = exchange.request
        _check(request)
        target = self._relay.requests.target(request, request.query.get("model", ""), request.path)
        exchange.model, exchange.offer = target.model, target.offer
        permit = await self._relay.gate.acquire(target.model, request.key, offer=target.offer)
        try:
            at = permit.target or target
            await self._through(exchange, permit, at, realtime_path(request, at))
        finally:
            permit.release(size=exchange.sent + exchange.received)

    async def own(self, exchange: Exchange) -> None:
        """A WebSocket of an engine's own API, below ``/upstream``. Raises VllmdError if it is refused."""
        upstream_request = await self._relay.requests.upstream(exchange)
        if upstream_request is None:
            return
        _check(exchange.request)
        exchange.model = model = upstream_request.target.model
        if not self._relay.gate.serves(model):
            raise Unavailable(f"{model!r} is not loaded, and a WebSocket of its page does not load it", retry_after=5)
        permit = await self._relay.gate.acquire(model, exchange.request.key)
        released = False

        def opened() -> None:
            """From now on it is no request: neither the model's idle rule nor a shutdown waits for its end."""
            nonlocal released
            released, exchange.model = True, ""
            permit.release()

        try:
            target = permit.target or upstream_request.target
            await self._through(exchange, permit, target, upstream_request.path, opened, self._still)
        finally:
            if not released:
                permit.release()

    async def _through(
        self,
        exchange: Exchange,
        permit: Permit,
        target: Target,
        path: str,
        opened: Callable[[], None] = silent,
        still: Callable[[Request], None] | None = None,
    ) -> None:
        """Connect to the engine's ``path``, call ``opened``, and pass bytes on in both directions until either closes.

        ``still``, called every ``RECHECK_SECONDS``, ends it by raising.
        """
        try:
            far = await connect(permit.upstream, self._relay.limits.now.connect_timeout, FarEnd(exchange))
        except OutOfFiles:
            raise
        except UpstreamFailed as error:  # its message has the engine's address, which is for the log only
            log.warning("%s: WebSocket: %s", target.model, error.message)
            raise UpstreamFailed(f"the engine of {target.model!r} cannot be reached") from None
        cut: list[VllmdError] = []

        def on_cut(reason: str) -> None:
            cut.append(EngineFailed(f"the connection was broken off: {reason}"))
            far.close()

        try:
            permit.on_cut(on_cut)
            far.send(handshake(exchange.request, target, permit.upstream, path))
            exchange.keep_alive = False
            agreed = await self._agreed(far, target.model)
            if isinstance(agreed, Response):
                await exchange.respond(agreed)
                return
            exchange.start(101, with_fields(agreed, [("x-request-id", exchange.request.id)]))
            exchange.upgrade(far.receive)
            far.open()
            opened()
            while not far.closed.done():
                await asyncio.wait([far.closed], timeout=RECHECK_SECONDS if still else None)
                if still and not far.closed.done():
                    still(exchange.request)
            exchange.finish()
        except UpstreamFailed as error:
            raise cut[0] if cut else error from None
        finally:
            far.close()

    async def _agreed(self, far: FarEnd, model: str) -> bytes | Response:
        """The head of the 101 for the client, or the engine's refusal with its own status.

        Raises UpstreamFailed if the engine did neither.
        """
        done, _ = await asyncio.wait([far.answered], timeout=HANDSHAKE_SECONDS)
        if not done or far.answered.cancelled():
            raise UpstreamFailed(f"the engine of {model!r} did not answer the WebSocket handshake")
        try:
            fields = parse_upgrade_head(far.answered.result())
        except BadFraming as error:
            return _refusal(far, model, error)
        return SWITCHING + write_fields([*UPGRADE_FIELDS, *forwardable(fields, but=OURS)]) + b"\r\n"


def _refusal(far: FarEnd, model: str, why: BadFraming) -> Response:
    """The engine's answer instead of 101, as an error of the same status, with the first bytes of its body."""
    try:
        head = parse_response_head(far.answered.result(), "GET")
    except BadFraming:
        head = None
    if head is None or not 400 <= head.status < 600:
        raise UpstreamFailed(f"the engine of {model!r} refused the WebSocket: {why}")
    text = far.early[:MAX_REFUSAL_BYTES].decode("utf-8", "replace").strip()
    if head.status in (403, 404) and not text:  # the engine has no such route, or none for this model
        unserved = NotFound(f"the model {model!r} does not serve this WebSocket: its engine refused it ({head.status})")
        return json_response(unserved.to_openai(), unserved.status)
    error_class: type[VllmdError] = UpstreamFailed if head.status >= 500 else BadRequest
    error = error_class(f"the engine of {model!r} refused the WebSocket with {head.status}{text and ': ' + text}")
    return json_response(error.to_openai(), head.status)


def _check(request: Request) -> None:
    """Raise BadRequest for a request that is no WebSocket handshake."""
    if request.method != "GET" or request.upgrade != "websocket" or not request.headers.get("sec-websocket-key"):
        raise BadRequest("this is a WebSocket: 'Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Key: ...'")


def realtime_path(request: Request, target: Target) -> str:
    """The path and query for the engine, with its own name for the model and without keys."""
    params = parse_qsl(request.query_string)
    query = [(key, value) for key, value in params if key != "model" and not KEY_IN_QUERY.match(f"{key}=")]
    query.append(("model", target.served_name))
    return f"{request.path}?{urlencode(query)}"


def handshake(request: Request, target: Target, address: Address, path: str) -> bytes:
    """The request for the engine at ``path``."""
    fields = [
        (b"host", host_field(address).encode()),
        *UPGRADE_FIELDS,
        *_without_keys(forwardable(request.headers.raw, but=KEPT_BACK)),
        (b"x-request-id", request.id.encode()),
    ]
    fields.extend((name.lower().encode(), value.encode("latin-1")) for name, value in target.headers)
    if address.key:
        fields.append((b"authorization", b"Bearer " + address.key.encode()))
    return write_request_head("GET", address.prefix + path, fields)


def _without_keys(fields: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The fields without the sub-protocols that are keys."""
    for name, value in fields:
        if name == b"sec-websocket-protocol":
            kept = [each.strip() for each in value.split(b",") if not each.strip().startswith(KEY_PROTOCOL.encode())]
            if kept:
                yield name, b", ".join(kept)
        else:
            yield name, value
