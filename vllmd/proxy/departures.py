"""Whether a client that says nothing more is still there.

**It has said that it says no more.** A client may shut its sending side and wait for its answer (``printf ... | nc``),
or be gone: on the network both look alike.

- Of a client on this machine the kernel knows whether a process still holds its end; a Unix socket tells by itself.
- One elsewhere is told from it by a byte that is sent there, since a client that is gone has its kernel answer with a
  reset. Mostly those are the answer's, or a stream's signs of life. Before the answer, HTTP/1.1 has ``100 Continue``,
  which every client reads over (RFC 9110, 15.2): it is sent from time to time.
- Where nothing may be sent (HTTP/1.0 before its answer, an engine that falls silent in the middle of one), it takes
  until the client's kernel forgets the connection, a minute mostly, and answers TCP's keepalive with a reset.

**It vanished**, with its machine or its network, while an answer was on its way: nothing of it is acknowledged. A
client that is there and takes nothing does acknowledge, that it has no room; ``send_timeout`` is for that one.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct

from vllmd.proxy.exchange import Exchange
from vllmd.proxy.peers import is_held

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FIRST_LOOK, MOST_BETWEEN = 0.02, 15.0  # seconds; each wait is twice as long as the one before
VANISHED = 90.0  # seconds without an acknowledgement of what was sent
SWEEP = 30.0  # seconds between two looks for such clients
_CLOSED = 7  # TCP_CLOSE
_TCP_INFO = struct.Struct("=BxxB20xI28xI")  # state, probes, packets not acknowledged, milliseconds since the last word


class HalfClosed:
    """Looks from time to time whether a client is still there that has said that it says no more, until the answer is
    over; closes the connection of one that is not."""

    def __init__(self, transport: asyncio.Transport, exchange: Exchange) -> None:
        self._transport = transport
        self._exchange = exchange
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._wait = FIRST_LOOK
        asyncio.get_running_loop().call_later(self._wait, self._look)

    def _look(self) -> None:
        transport, exchange = self._transport, self._exchange
        if exchange.over or transport.is_closing():
            return
        there = self._is_there()
        if there is False:
            transport.abort()
            return
        if there is None and not exchange.status and exchange.takes_chunks:
            transport.write(CONTINUE)
        asyncio.get_running_loop().call_later(self._wait, self._look)
        self._wait = min(2 * self._wait, MOST_BETWEEN)

    def _is_there(self) -> bool | None:
        """None if it cannot be known but by sending it something."""
        sock = self._socket
        if sock.family == socket.AF_UNIX:
            poll = select.poll()
            poll.register(sock.fileno(), 0)
            return not any(event & select.POLLHUP for _, event in poll.poll(0))
        if tcp_info(sock)[0] == _CLOSED:
            return False
        return is_held(sock.getpeername()[:2], sock.getsockname()[:2])


def tcp_info(sock: socket.socket) -> tuple[int, int, int, int]:
    """State, probes without an answer, packets not acknowledged, milliseconds since the peer said anything."""
    state, probes, unacknowledged, silent = _TCP_INFO.unpack(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    )
    return state, probes, unacknowledged, silent


def has_vanished(sock: socket.socket) -> bool:
    """Whether the peer of a TCP connection has acknowledged nothing for too long, though it was sent something."""
    if sock.family == socket.AF_UNIX:
        return False
    _, probes, unacknowledged, silent = tcp_info(sock)
    return bool(probes or unacknowledged) and silent > VANISHED * 1000
