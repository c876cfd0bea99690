"""The limits of the HTTP side. Sizes in bytes, times in seconds."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, fields

# What one recv() may bring. asyncio asks for 256 KiB, and memory of that size comes from mmap and goes back to it
# at every single read: 40 microseconds instead of 3.
RECEIVE = 64 << 10


# A peer whose machine or network vanished says nothing: after half a minute of silence the kernel asks it, and gives
# it up after three more questions. What was sent to an engine's machine and not acknowledged has two minutes; what was
# sent to a client, ``departures.VANISHED``.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # seconds, and a number
UNACKNOWLEDGED = 120.0  # seconds


def keep_alive(sock: socket.socket, unacknowledged: float = 0.0) -> None:
    """Have the kernel notice that the peer of a TCP connection is gone.

    What it has not acknowledged for ``unacknowledged`` seconds says so, too. That time would replace the one by
    questions, and runs for a peer that is there and only takes nothing, so clients have none.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if unacknowledged:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(unacknowledged * 1000)))


def read_small(transport: asyncio.BaseTransport) -> None:
    """Have ``transport`` ask for ``RECEIVE`` bytes at a time, if it is one that can be told."""
    if hasattr(transport, "max_size"):
        transport.max_size = RECEIVE


@dataclass(slots=True)
class Limits:
    """Beyond these a client gets 4xx or 503, or is cut off. All share one object, so that a reload reaches them.

    Over each ``body_timeout`` an upload must keep up ``min_body_rate`` bytes per second.
    ``send_timeout``: a client that takes nothing for so long is cut off.
    ``max_buffered``: bytes of request bodies held in all. ``pipeline``: bytes read ahead of a running request.
    ``upstream_idle``: a pooled connection is dropped after it; engines drop theirs at 5 s.
    ``request_timeout``: from a model request's last byte to its answer's; None for no limit.
    ``loading_comment_interval``: between SSE comments while a model loads; 0 sends none. With
    ``loading_as_reasoning`` chat clients get it as reasoning text instead.
    """

    max_head: int = 64 << 10
    max_body: int = 64 << 20
    max_buffered: int = 1 << 30
    head_timeout: float = 30.0
    body_timeout: float = 30.0
    min_body_rate: int = 1024
    send_timeout: float = 300.0
    keepalive_timeout: float = 75.0
    max_connections: int = 10_000
    max_connections_per_address: int | None = None
    pipeline: int = 64 << 10
    upstream_idle: float = 4.0
    connect_timeout: float = 5.0
    request_timeout: float | None = None
    loading_comment_interval: float = 10.0
    loading_as_reasoning: bool = False

    @classmethod
    def of(cls, config: object) -> Limits:
        """The fields that ``config`` (``config.types.ServerConfig``) has under the same names, else the defaults."""
        limits = cls()
        limits.take(config)
        return limits

    def take(self, config: object) -> None:
        """Have the values of ``config`` from now on; a deadline that is running already stays."""
        for field in fields(self):
            if hasattr(config, field.name):
                setattr(self, field.name, getattr(config, field.name))
