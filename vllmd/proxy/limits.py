"""The limits of the HTTP side. Sizes in bytes, times in seconds."""

from __future__ import annotations

import asyncio
import resource
import socket

from vllmd.config.types import ServerConfig

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


def clients_files() -> int:
    """The number of a file descriptor up to which clients' connections may take them.

    A request takes another one, to its engine; and engines are started and looked at, and operators connect, however
    many clients there are. The kernel gives the lowest number that is free, so the number tells how many are taken.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if soft == resource.RLIM_INFINITY else soft * 2 // 5


class Limits:
    """What the configuration says of the HTTP side ``now``: beyond that a client gets 4xx or 503, or is cut off.

    All share one object, so that a reload reaches them; a deadline that is running already stays.
    """

    __slots__ = ("now",)

    def __init__(self, now: ServerConfig) -> None:
        self.now = now
