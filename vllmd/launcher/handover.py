"""A standby becomes an engine: the pair of sockets to it, the message, and what it may say.

A standby is started as every engine is, in a scope of its own, and inherits one end of a pair of sockets that nobody
else has: no name, no path, so no other process of its user can speak in our place. It says ``ready`` when it has
imported what it was told to. An order that names it is then sent, together with the output, once its process is in the
new engine's scope, so that the limits of that hold from the first byte on; ``taken`` is the answer to the start::

    ready         ours to give away, once
    PLACING       a child makes the run directory; systemd moves the process into the engine's scope
    EXECUTING     the message is sent
    RUNNING       it said ``taken``, and is the program that was ordered

Whatever else happens on this way (it dies, says something else, says nothing for ``LIMIT``) ends the process, and the
order is carried out as if it had named no standby: nobody hears of it but the log. One that is named is used, or ends.
The standby's end of the pair is its life, too: it exits when ours is closed, which the kernel does should we die.

It runs as the engines' user, so nothing that it says is believed to have a shape: at most ``LONGEST_WORD`` bytes are
read, of which two words mean something.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllmd.launcher.protocol import StartOrder
from vllmd.text import printable

LIMIT = 5.0  # seconds from the order until it was taken; an ordinary start begins then
LONGEST_WORD = 1000  # bytes
LONGEST_ORDER = 192 << 10  # bytes; what fits a socket's buffer by the kernel's defaults
READY, TAKEN = "ready", "taken"


class Link:
    """The launcher's end of the socket pair to a standby."""

    def __init__(self) -> None:
        """Raises OSError. ``child_end`` is for the child, and closed here once it was forked."""
        self._socket, self.child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self.fd = self._socket.fileno()
        self.ready = False  # it has imported everything, and has not been given away

    def receive(self) -> str | None:
        """What the standby has said; "" if it has closed its end; None if it has said nothing."""
        try:
            return printable(self._socket.recv(LONGEST_WORD).decode(errors="replace"))
        except BlockingIOError:
            return None
        except OSError:
            return ""

    def send(self, order: StartOrder, env: Mapping[str, str], output: int) -> None:
        """Send it the order. Raises OSError, also where it would not fit."""
        place = {"cwd": order.cwd or order.run_dir, "cpus": order.cpus, "node": order.node}
        told = {"argv": order.argv, "env": dict(env), **place}
        message = json.dumps(told, separators=(",", ":")).encode()
        if len(message) > LONGEST_ORDER:
            raise OSError(f"an order of {len(message)} bytes; at most {LONGEST_ORDER} fit a message")
        socket.send_fds(self._socket, [message], [output])

    def close(self) -> None:
        """A standby that still waits exits now."""
        self._socket.close()
        self.child_end.close()


@dataclass(slots=True)
class HandOver:
    """An engine that is about to be made of a standby. ``order``: to be begun anew without it if that fails."""

    order: StartOrder
    standby: str  # the instance
    link: Link


def without_standby(order: StartOrder) -> StartOrder:
    """The order as if there were no standby."""
    return replace(order, standby="")


def refusal(said: str) -> str:
    """Why a hand-over came to nothing, by what the standby said."""
    return f"the standby said {said!r}" if said else "the standby has exited"
