"""WebSockets (``/v1/realtime?model=NAME``): after the handshake, bytes both ways and nothing else.

The model is the query's, as OpenAI has it; what the client says inside the socket is not looked at.

An engine's own page has one, too (``/upstream/NAME/ws`` of ComfyUI): it hears there what becomes of its jobs, and is
left open for days. So such a one is no request: it keeps no model from its rest, loads none when the page connects
anew, and ends with its engine, or when its key opens it no more.
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
from vllmd.proxy.routing import RECHECK
from vllmd.proxy.upstream import OutOfFiles, connect, host_field

log = logging.getLogger(__name__)

SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\n"
UPGRADE_FIELDS = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
KEY_PROTOCOL = "openai-insecure-api-key."  # a sub-protocol that is a key: browsers can send no other
REFUSAL_TOLD = 1000  # bytes of what an engine says when it refuses
HANDSHAKE_LIMIT = 30.0  # seconds for the engine to answer the handshake


class FarEnd(asyncio.Protocol):
    """The engine's side of a tunnel."""

    def __init__(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[bytes] = loop.create_future()  # the head's bytes
        self.closed: asyncio.Future[None] = loop.create_future()
        self._exchange = exchange
        self.transport: asyncio.Transport
        self._collector = HeadCollector()
        self.early = b""  # what came along with the head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The engine has accepted the tunnel's connection."""
        self.transport = cast(asyncio.Transport, transport)
        read_small(transport)

    def data_received(self, data: bytes) -> None:
        """The handshake's answer, then the client's bytes."""
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
            self.transport.pause_reading()  # until the client has been told

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine's side is closed: close the client's."""
        for future in (self.answered, self.closed):
            if not future.done():
                future.cancel()

    def pause_writing(self) -> None:
        """The engine does not take the client's bytes fast enough."""
        self._exchange.pause_client(True)

    def resume_writing(self) -> None:
        """The engine takes bytes again: so may the client send."""
        self._exchange.pause_client(False)

    def send(self, data: bytes) -> None:
        """Pass on bytes from the client to the engine."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def take(self, data: bytes) -> None:
        """The client's bytes once it may speak."""
        self._exchange.received += len(data)
        self.send(data)

    def open(self) -> None:
        """The client knows: pass on what came along with the head, and whatever comes."""
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
        """``still`` raises where who asked for an engine's own socket may not have it any more."""
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
        wanted = await self._relay.requests.upstream(exchange)
        if wanted is None:
            return
        _check(exchange.request)
        exchange.model = model = wanted.target.model
        if not self._relay.gate.serves(model):
            raise Unavailable(f"{model!r} is not loaded, and a WebSocket of its page does not load it", retry_after=5)
        permit = await self._relay.gate.acquire(model, exchange.request.key)
        held = True

        def opened() -> None:
            """From now on it is no request: nothing waits for its end, nor does a shutdown."""
            nonlocal held
            held, exchange.model = False, ""
            permit.release()

        try:
            await self._through(exchange, permit, permit.target or wanted.target, wanted.path, opened, self._still)
        finally:
            if held:
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
        """Connect to the engine's ``path``, and pass on what either side says. ``opened`` is called in between.

        It ends when ``still`` raises, which is asked every ``RECHECK`` seconds.
        """
        try:
            far = await connect(permit.upstream, self._relay.limits.now.connect_timeout, lambda: FarEnd(exchange))
        except OutOfFiles:
            raise
        except UpstreamFailed as error:  # which names an address of ours
            log.warning("%s: %s", target.model, error.message)
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
            exchange.upgrade(far.take)
            far.open()
            opened()
            while not far.closed.done():
                await asyncio.wait([far.closed], timeout=RECHECK if still else None)
                if still and not far.closed.done():
                    still(exchange.request)
            exchange.finish()
        except UpstreamFailed as error:
            raise cut[0] if cut else error from None
        finally:
            far.close()

    async def _agreed(self, far: FarEnd, model: str) -> bytes | Response:
        """The head that tells the client of the engine's consent, or the engine's refusal with its own status.

        Raises UpstreamFailed if there is neither.
        """
        done, _ = await asyncio.wait([far.answered], timeout=HANDSHAKE_LIMIT)
        if not done or far.answered.cancelled():
            raise UpstreamFailed(f"the engine of {model!r} did not answer the WebSocket handshake")
        try:
            fields = parse_upgrade_head(far.answered.result())
        except BadFraming as error:
            return _refusal(far, model, error)
        return SWITCHING + write_fields([*UPGRADE_FIELDS, *forwardable(fields, but=OURS)]) + b"\r\n"


def _refusal(far: FarEnd, model: str, why: BadFraming) -> Response:
    """What the engine answered instead of 101, as an error of its status; of its body what came along."""
    try:
        head = parse_response_head(far.answered.result(), "GET")
    except BadFraming:
        head = None
    if head is None or not 400 <= head.status < 600:
        raise UpstreamFailed(f"the engine of {model!r} refused the WebSocket: {why}")
    said = far.early[:REFUSAL_TOLD].decode("utf-8", "replace").strip()
    if head.status in (403, 404) and not said:  # what is said where there is no such route, or not for such a model
        unserved = NotFound(f"the model {model!r} does not serve this WebSocket: its engine refused it ({head.status})")
        return json_response(unserved.to_openai(), unserved.status)
    kind: type[VllmdError] = UpstreamFailed if head.status >= 500 else BadRequest
    error = kind(f"the engine of {model!r} refused the WebSocket with {head.status}{said and ': ' + said}")
    return json_response(error.to_openai(), head.status)


def _check(request: Request) -> None:
    """Raise BadRequest for what cannot become a WebSocket."""
    if request.method != "GET" or request.upgrade != "websocket" or not request.headers.get("sec-websocket-key"):
        raise BadRequest("this is a WebSocket: 'Connection: Upgrade', 'Upgrade: websocket', 'Sec-WebSocket-Key: ...'")


def realtime_path(request: Request, target: Target) -> str:
    """The path and query for the engine, with its own name for the model and without keys."""
    told = parse_qsl(request.query_string)
    query = [(key, value) for key, value in told if key != "model" and not KEY_IN_QUERY.match(f"{key}=")]
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
