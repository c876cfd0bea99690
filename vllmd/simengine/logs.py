"""Log lines shaped like vLLM 0.32's, on standard output."""

from __future__ import annotations

import os
import sys
import time

GiB = 1 << 30


def log(message: str, *, level: str = "INFO", process: str = "APIServer", source: str = "simengine.py:1") -> None:
    """One record; a message of several lines gets the prefix on each, as vLLM's formatter does."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({process} pid={os.getpid()}) {level} {stamp} [{source}] "
    _print("".join(f"{prefix}{line}\n" for line in message.splitlines() or [""]))


def plain(message: str) -> None:
    """Lines that do not come from vLLM's logger (uvicorn's, a traceback's): without its prefix."""
    _print(f"{message}\n")


def gib(size: float) -> str:
    """Bytes as vLLM prints them, in GiB with two digits."""
    return f"{size / GiB:.2f}"


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  whoever read the log is gone; serving goes on
