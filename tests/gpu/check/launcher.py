"""A launcher that outlives the daemon, on a machine without systemd: ``python -m tests.gpu.check.launcher SOCKET``.

The launcher that vllmd brings along where there is no systemd ends with its daemon, by design. To see a daemon killed
and its engines adopted, the same launcher is put behind a socket that any daemon may connect to.
"""

from __future__ import annotations

import signal
import socket
import sys

from vllmd.launcher.__main__ import _finisher
from vllmd.launcher.loop import Loop
from vllmd.launcher.service import Service, allowed_uids
from vllmd.launcher.sessions import Sessions
from vllmd.systemd.journal import setup_logging


def main() -> None:
    """Serve until SIGTERM, then kill every engine and end."""
    setup_logging("info", identifier="vllmd-launcher")
    loop = Loop()
    backend = Sessions(loop, token=f"gpu-check-{sys.argv[1].replace('/', '-')}")
    service = Service(loop, backend, allowed_uids(""), idle_exit=3600.0)
    finish = _finisher(loop, service.supervisor)
    loop.on_signals({signal.SIGTERM: finish, signal.SIGINT: finish, signal.SIGCHLD: backend.reap_orphans})
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(16)
    service.listen(listener)
    loop.run()
    backend.kill_unmanaged()


if __name__ == "__main__":
    main()
