"""Executed in a standby of vLLM when its imports are done, on a machine without a GPU: workers are its forks.

vLLM's configuration for the CPU overwrites what VLLM_WORKER_MULTIPROC_METHOD says with spawn, and gives no reason. A
standby is forked before anything has computed in it, so that no thread of OpenMP is there yet that a fork would lack.
Where vLLM looks different from what is known here nothing is done, and spawn it is: slower, and right.
"""

from __future__ import annotations

import os
import sys

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
utils = sys.modules.get("vllm.utils.system_utils")


def keep_to_fork() -> None:
    """Replaces vLLM's look for reasons against a fork, of which none is a CPU's."""
    os.environ[METHOD] = "fork"


if callable(getattr(utils, "_maybe_force_spawn", None)):
    utils._maybe_force_spawn = keep_to_fork  # type: ignore[union-attr]
