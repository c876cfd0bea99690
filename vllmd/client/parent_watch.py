"""Runs a module that ends when the parent process does, however that ends. Run as a script; imports nothing of ours.

``parent_watch.py PARENT FOLDER FDS MODULE ARGUMENTS...``: FDS are listening sockets, handed on as systemd does it;
FOLDER is removed at the end if the parent cannot do it any more.
"""

from __future__ import annotations

import os
import runpy
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable

FIRST_FD = 3  # of systemd's protocol: the first listening socket
END_SECONDS = 20.0  # to end in order once the parent has ended


def watch(parent: int, end: Callable[[], None]) -> None:
    """Have ``end`` called, in a thread, once the process ``parent`` is gone."""
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        pidfd = -1
    if pidfd < 0 or os.getppid() != parent:  # it went before we could look
        end()
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        end()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def send_sigterm() -> None:
    """End this process in order, or after ``END_SECONDS`` by force."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def hand_on(sockets: list[int]) -> None:
    """Put the sockets where systemd's protocol has them, and say that they are for this process."""
    spare = [os.dup(fd) for fd in sockets]  # in ascending order, so that none is overwritten before its turn
    for place, fd in enumerate(spare, FIRST_FD):
        os.dup2(fd, place)
    os.environ["LISTEN_PID"] = str(os.getpid())


def main() -> None:
    """Become the module that argv names, and end when the parent does."""
    parent, folder, sockets, module, *arguments = sys.argv[1:]
    hand_on([int(fd) for fd in sockets.split(",")])
    watch(int(parent), send_sigterm)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if os.getppid() != int(parent):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
