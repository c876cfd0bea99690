"""Which process is at the other end of a Unix socket, as the kernel tells (``SO_PEERCRED``, unix(7))."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("iII")  # user and group ids have no sign


class Credentials(NamedTuple):
    """The process that connected, or that listens, with its user and group at that time."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Credentials:
    """The credentials of the peer of a connected Unix socket. Raises OSError for another kind of socket."""
    return Credentials(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
