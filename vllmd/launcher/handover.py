"""How a standby becomes an engine: the pair of sockets to it, the message, and its answers.

A standby is started as every engine is, in a scope of its own, and inherits one end of a pair of sockets. The pair has
no name or path, so no other process of the engines' user can send on it. The standby sends ``ready`` when its imports
are done. The launcher sends it an order, together with the descriptor for its output, once its process is in the new
engine's scope, so that the limits of that scope hold from the first allocation on; ``taken`` is the answer::

    ready         the daemon may name the standby in one order
    PLACING       a child makes the run directory; systemd moves the process into the engine's scope
    EXECUTING     the order is sent
    RUNNING       the standby sent ``taken``, and is the program that was ordered

Anything else on this way (the standby dies, sends another word, sends nothing for ``HANDOVER_SECONDS``) ends the
process, and the order is carried out as if it had named no standby: only the log tells of it. A standby that an order
names is used or ended, never offered again. It exits when the launcher's end of the pair is closed, also by the kernel
when the launcher dies.

A standby runs as the engines' user, so its words are not trusted: at most ``MAX_WORD_BYTES`` are read, and only two
words mean something.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from vllmd.launcher.protocol import StartOrder
from vllmd.text import printable

HANDOVER_SECONDS = 5.0  # from the order until it was taken; after that the engine is started without the standby
MAX_WORD_BYTES = 1000
MAX_ORDER_BYTES = 192 << 10  # fits a socket's buffer by the kernel's defaults
READY, TAKEN = "ready", "taken"


class Link:
    """The launcher's end of the socket pair to a standby."""

    def __init__(self) -> None:
        """Raises OSError. ``child_end`` is for the child; the launcher closes it after the fork."""
        self._socket, self.child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self.fd = self._socket.fileno()
        self.ready = False  # its imports are done, and no order has named it yet

    def receive(self) -> str | None:
        """The standby's next word; "" if it has closed its end; None if there is none now."""
        try:
            return printable(self._socket.recv(MAX_WORD_BYTES).decode(errors="replace"))
        except BlockingIOError:
            return None
        except OSError:
            return ""

    def send(self, order: StartOrder, env: Mapping[str, str], output: int) -> None:
        """Send the order, with the descriptor ``output`` for its output. Raises OSError, also if it is too large."""
        place = {"cwd": order.cwd or order.run_dir, "cpus": order.cpus, "node": order.node}
        message = json.dumps({"argv": order.argv, "env": dict(env), **place}, separators=(",", ":")).encode()
        if len(message) > MAX_ORDER_BYTES:
            raise OSError(f"the order has {len(message)} bytes; at most {MAX_ORDER_BYTES} fit a message")
        socket.send_fds(self._socket, [message], [output])

    def close(self) -> None:
        """Close both ends; a standby that still waits exits."""
        self._socket.close()
        self.child_end.close()


@dataclass(slots=True)
class HandOver:
    """An engine's start from a standby. ``order``: carried out without the standby if the hand-over fails."""

    order: StartOrder
    standby: str  # the instance
    link: Link


def refusal(word: str) -> str:
    """Why a hand-over failed, by the standby's last word; "": it closed its end."""
    return f"the standby said {word!r}" if word else "the standby has exited"
