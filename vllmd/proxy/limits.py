"""The limits of the HTTP side. Sizes in bytes, times in seconds."""

from __future__ import annotations

import asyncio
import resource
import socket

from vllmd.config.types import ServerConfig

# What one recv() may bring. asyncio asks for 256 KiB, and memory of that size comes from mmap and goes back to it
# at every single read: 40 microseconds instead of 3.
RECEIVE = 64 << 10


# A peer whose machine or network vanished is silent: after half a minute the kernel sends probes, and closes the
# connection after three without an answer. Data that an engine's machine does not acknowledge has two minutes; data to
# a client, ``departures.VANISHED_SECONDS``.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # seconds, and a number
UNACKNOWLEDGED = 120.0  # seconds


def keep_alive(sock: socket.socket, unacknowledged: float = 0.0) -> None:
    """Have the kernel close a TCP connection whose peer is gone.

    With ``unacknowledged`` also one whose peer has acknowledged nothing for so many seconds. That time replaces the one
    of the probes, and also runs for a peer that is there and only takes nothing, so it is not set for clients.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if unacknowledged:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(unacknowledged * 1000)))


def read_small(transport: asyncio.BaseTransport) -> None:
    """Have ``transport`` read ``RECEIVE`` bytes at a time, if it is asyncio's own, which has such an attribute."""
    if hasattr(transport, "max_size"):
        transport.max_size = RECEIVE


def clients_files() -> int:
    """The file descriptor from which on clients' connections are refused: two fifths of the limit.

    Each request needs a second one, to its engine, and some must be left to start and probe engines and for operators.
    The kernel assigns the lowest free number, so a descriptor's number says how many are in use.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if soft == resource.RLIM_INFINITY else soft * 2 // 5


class Limits:
    """Holds the server's configuration ``now``. All share one object, so that a reload reaches them.

    A deadline that is running already is not changed by a reload.
    """

    __slots__ = ("now",)

    def __init__(self, now: ServerConfig) -> None:
        self.now = now
