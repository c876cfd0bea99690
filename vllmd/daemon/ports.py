"""TCP ports of engines that have no Unix sockets."""

from __future__ import annotations

import socket
from collections import deque

from vllmd.errors import Unavailable
from vllmd.place import PortLimits, port_limits


class PortPool:
    """TCP ports for engines that have no Unix sockets: each is reserved by one engine at a time.

    Those come last that the kernel may give to an outgoing connection at any moment, be it between our look and the
    engine's; those that only root may listen on do not come at all.
    """

    def __init__(self, start: int, end: int, limits: PortLimits | None = None) -> None:
        self._limits = port_limits() if limits is None else limits
        self.range = range(start, end + 1)
        self._free = self._ordered(frozenset())

    def take(self, start: int, end: int) -> None:
        """Use this range from now on; a port of it that is in use is reserved until it is released."""
        used = frozenset(self.range) - frozenset(self._free)
        self.range = range(start, end + 1)
        self._free = self._ordered(used)

    def _ordered(self, used: frozenset[int]) -> deque[int]:
        usable = (port for port in self.range if port >= self._limits.least and port not in used)
        return deque(sorted(usable, key=lambda port: (self._limits.taken(port), port)))

    def reserve(self) -> int:
        """Reserve a port at which nobody listens. Raises Unavailable when there is none."""
        for _ in range(len(self._free)):
            port = self._free[0]
            if _is_free(port):
                return self._free.popleft()
            self._free.rotate(-1)
        raise Unavailable(f"all engine ports {self.range.start}-{self.range.stop - 1} are in use")

    def release(self, port: int) -> None:
        """Free a port, to be reserved last again."""
        if port in self.range and port not in self._free:
            self._free.append(port)


def _is_free(port: int) -> bool:
    """Whether no process listens on the loopback port. Raises Unavailable without a file descriptor to find out."""
    try:
        probe = socket.socket()
    except OSError as error:
        raise Unavailable(f"vllmd cannot look for a free port: {error.strerror}", retry_after=5) from None
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
