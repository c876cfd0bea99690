"""Which event loop the daemon runs on: uvloop where it is installed, else asyncio's own.

The problem. At 64 connections a fifth of the daemon's CPU time is the loop's: its turns, its transports, its timers.
uvloop has them in C, over libuv, and is a package of each distribution; figures are in ``tests/bench/proxy.md``.

The invariant: nothing else knows which one it is. What is used of the loop and of its transports is what asyncio
documents, and of a transport's socket only what both have (options, names, ``fileno``); the proxy is tested on either.
Where they differ, all the same:

- asyncio's transports can be told how much to read at once (``proxy.limits.read_small``); libuv reads up to 256 KiB,
  into a buffer of its own, and hands on a copy that has the size of what came.
- uvloop writes at the end of a turn, what was written in it in one call; asyncio in the call itself.
- uvloop's clock is that of the turn, in milliseconds; so the core's, which tells what came after what, is another one.

It is chosen once, in ``main``; a loop is not replaced while it runs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from typing import cast

log = logging.getLogger("vllmd")

LEAST = (0, 17)  # Debian 12's; what is older knows nothing of Python 3.11


def new_loop(wanted: str) -> asyncio.AbstractEventLoop:
    """A loop of the kind that ``server.event_loop`` wants: ``auto``, ``uvloop`` or ``asyncio``.

    uvloop that is wanted by name and cannot be had is a warning, not an error: everything works without it.
    """
    if wanted != "asyncio":
        try:
            return _uvloop()
        except ImportError as why:
            if wanted == "uvloop":
                log.warning("server.event_loop is uvloop, but it %s; going on with asyncio's own", why)
    return asyncio.SelectorEventLoop()


def _uvloop() -> asyncio.AbstractEventLoop:
    """Raises ImportError, which says why not."""
    try:
        import uvloop
    except ImportError as error:
        raise ImportError(f"cannot be imported: {error}") from error
    version = _version("uvloop")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST:
        raise ImportError(f"is of version {version}, older than {'.'.join(map(str, LEAST))}")
    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", ""))


def name_of(loop: asyncio.AbstractEventLoop) -> str:
    """The loop's name and version: ``uvloop 0.17.0``, ``asyncio``."""
    package = type(loop).__module__.partition(".")[0]
    return f"{package} {_version(package)}".strip()
