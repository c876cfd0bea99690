"""Where a process computes and has its memory: set before it becomes the engine, and inherited by all that it starts.

Nothing is forbidden to the engine by it. It may widen its CPUs again (vLLM's --numa-bind does as it likes), and memory
comes from other nodes once its own is full: an engine that is slow is better than one that is killed. So neither is a
scope's AllowedCPUs= nor AllowedMemoryNodes=, which are walls, and which only the system's manager can put up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Sequence

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "ppc64le": 261, "s390x": 270}
_PREFERRED = 1  # MPOL_PREFERRED
_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)


def settle(cpus: Sequence[int], node: int) -> None:
    """Be on these CPUs, and prefer that node's memory; what the kernel refuses (a CPU is offline) stays as it was."""
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)
    if node >= 0:
        _prefer(node)


def _prefer(node: int) -> None:
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return
    words = (ctypes.c_ulong * (node // _WORD + 1))()
    words[node // _WORD] = 1 << node % _WORD
    # One bit more than there are: the kernel takes its count for exclusive.
    ctypes.CDLL(None).syscall(number, _PREFERRED, words, len(words) * _WORD + 1)
