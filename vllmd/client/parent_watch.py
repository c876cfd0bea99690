"""A program that ends with the one that started it, however that ends. Run as a script; imports nothing of ours.

``parent_watch.py PARENT FOLDER FDS MODULE ARGUMENTS...``: FDS are listening sockets, handed on as systemd does it;
FOLDER is removed at the end if the parent is no more there to do it.
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

FIRST = 3  # where the first listening socket is expected
LAST_WORDS = 20.0  # seconds to end in good order once the parent is gone


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
    """As ``kill`` would, and by force after a while."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS)
    os.kill(os.getpid(), signal.SIGKILL)


def hand_on(sockets: list[int]) -> None:
    """Put the sockets where systemd's protocol has them, and say that they are for this process."""
    spare = [os.dup(fd) for fd in sockets]  # in ascending order, so that none is overwritten before its turn
    for place, fd in enumerate(spare, FIRST):
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
