"""Whether a silent client is still there.

**A client has shut its sending side.** It waits for its answer (``printf ... | nc``), or it has exited: on the network
both look alike.

- For a client on this machine the kernel knows whether a process still holds its end; a Unix socket reports it.
- On another machine, a byte has to be sent: the kernel of a client that has exited answers with a reset. Mostly these
  bytes are the answer's, or a stream's signs of life. Before the answer, HTTP/1.1 has ``100 Continue``, which every
  client ignores (RFC 9110, 15.2): it is sent from time to time.
- Where nothing may be sent (HTTP/1.0 before its answer, an engine that pauses in the middle of one), it takes until the
  client's kernel forgets the connection, a minute mostly, and answers TCP's keepalive with a reset.

**A client has vanished**, with its machine or its network, while an answer was on its way: nothing is acknowledged. A
client that is there and reads nothing does acknowledge, that it has no room; ``send_timeout`` is for that case.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct

from vllmd.proxy.exchange import Exchange
from vllmd.proxy.peers import is_held

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.02, 15.0  # between two checks; each wait is twice as long as the last one
VANISHED_SECONDS = 90.0  # without an acknowledgement of sent data
SWEEP_SECONDS = 30.0  # between two checks for such clients
_CLOSED = 7  # TCP_CLOSE
_TCP_INFO = struct.Struct("=BxxB20xI28xI")  # state, probes, unacknowledged packets, milliseconds since the last packet


class HalfClosed:
    """Checks a client that has shut its sending side, until its answer is over; closes the connection if it is gone."""

    def __init__(self, transport: asyncio.Transport, exchange: Exchange) -> None:
        self._transport = transport
        self._exchange = exchange
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._wait = FIRST_WAIT_SECONDS
        asyncio.get_running_loop().call_later(self._wait, self._check)

    def _check(self) -> None:
        transport, exchange = self._transport, self._exchange
        if exchange.over or transport.is_closing():
            return
        there = self._is_there()
        if there is False:
            transport.abort()
            return
        if there is None and not exchange.status and exchange.takes_chunks:
            transport.write(CONTINUE)
        asyncio.get_running_loop().call_later(self._wait, self._check)
        self._wait = min(2 * self._wait, MAX_WAIT_SECONDS)

    def _is_there(self) -> bool | None:
        """Whether a process holds the client's end; None if only a byte that is sent could tell."""
        sock = self._socket
        if sock.family == socket.AF_UNIX:
            poll = select.poll()
            poll.register(sock.fileno(), 0)
            return not any(event & select.POLLHUP for _, event in poll.poll(0))
        if tcp_info(sock)[0] == _CLOSED:
            return False
        return is_held(sock.getpeername()[:2], sock.getsockname()[:2])


def tcp_info(sock: socket.socket) -> tuple[int, int, int, int]:
    """State, unanswered probes, unacknowledged packets, and milliseconds since the peer's last packet."""
    state, probes, unacknowledged, silent = _TCP_INFO.unpack(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    )
    return state, probes, unacknowledged, silent


def has_vanished(sock: socket.socket) -> bool:
    """Whether the peer of a TCP connection has acknowledged nothing for too long, though it was sent something."""
    if sock.family == socket.AF_UNIX:
        return False
    _, probes, unacknowledged, silent = tcp_info(sock)
    return bool(probes or unacknowledged) and silent > VANISHED_SECONDS * 1000
