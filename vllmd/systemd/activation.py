"""Socket activation: the listeners that systemd (or systemd-socket-activate) hands over.

They arrive as descriptors 3, 4, ..., blocking and inheritable; several may share
a name, because one .socket unit with two ``ListenStream=`` lines has one
``FileDescriptorName=``. Every one of them is made close-on-exec here, or each
child would keep the port open.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

FIRST_FD = 3
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def take_listeners(
    default_name: str = "http", environ: MutableMapping[str, str] | None = None, first_fd: int = FIRST_FD
) -> dict[str, list[socket.socket]]:
    """The passed sockets by name, non-blocking and close-on-exec; empty where none were passed.

    ``default_name`` is for a passer that names nothing (``systemd-socket-activate``
    without ``--fdname``). The variables are removed, so that no child believes the
    sockets to be its own; calling twice therefore gives nothing the second time.
    """
    env = os.environ if environ is None else environ
    values = {key: env.pop(key, "") for key in VARIABLES}
    if values["LISTEN_PID"] != str(os.getpid()) or not values["LISTEN_FDS"].isdecimal():
        return {}
    names = values["LISTEN_FDNAMES"].split(":")
    listeners: dict[str, list[socket.socket]] = {}
    for offset in range(int(values["LISTEN_FDS"])):
        name = names[offset] if offset < len(names) else ""
        if name in ("", "unknown"):  # systemd's own word for a descriptor without a name
            name = default_name
        os.set_inheritable(first_fd + offset, False)
        listener = socket.socket(fileno=first_fd + offset)
        listener.setblocking(False)
        listeners.setdefault(name, []).append(listener)
    return listeners
