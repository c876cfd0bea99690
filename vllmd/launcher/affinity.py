"""CPU affinity and the preferred NUMA node of a process: set before the exec, inherited by all of its children.

Both are preferences. The engine may widen its CPUs again (as vLLM's --numa-bind does), and memory comes from other
nodes once its own is full: a slow engine is better than a killed one. So they are not a scope's AllowedCPUs= and
AllowedMemoryNodes=, which are hard limits, and which only the system's manager can set.
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


def set_affinity(cpus: Sequence[int], node: int) -> None:
    """Run on these CPUs (empty: all), and prefer the memory of ``node`` (-1: any).

    Where the kernel refuses (a CPU is offline), nothing changes.
    """
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
    # One bit more than there are: the kernel uses one bit less than it is given.
    ctypes.CDLL(None).syscall(number, _PREFERRED, words, len(words) * _WORD + 1)
