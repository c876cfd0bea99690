"""Where engines keep what they compile: a folder for each version of an engine, in the home of the engine's user.

::

    HOME/.cache/vllmd/KIND/VERSION/{vllm,triton,inductor,flashinfer,deep_gemm}/

vLLM, Triton, TorchInductor, FlashInfer and DeepGEMM each find what they have compiled before by a hash of all that it
depends on, so sharing a folder is never wrong. But each has a place of its own, one of them in /tmp, and none ever
removes anything: a version that is gone leaves gigabytes behind. In a folder of its own it goes with its version
(``vllmctl engine remove``), outlives upgrades of vllmd, reboots and cleaners of /tmp, and is shared by all models, by
replicas and by standbys.

Engines that are not ours (``command``, PATH) keep theirs where they always did, but for TorchInductor's, which would be
in /tmp. So does whoever sets one of the variables.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vllmd.engines.environments import SYSTEM, Environment

FOLDER = ".cache/vllmd"
SYSTEM_HOME = Path("/var/lib/vllmd-engine")  # of the engines' shared user
SYSTEM_HOMES = Path("/var/lib/vllmd-engines")  # of models with users of their own
LIMIT = 120.0  # seconds for removing one

_TORCH = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
_KERNELS = {"FLASHINFER_WORKSPACE_BASE": "flashinfer"}  # which makes a .cache/flashinfer in it
VARIABLES = {
    "vllm": {"VLLM_CACHE_ROOT": "vllm", **_TORCH, **_KERNELS},  # DeepGEMM's is in vLLM's
    "sglang": {"DG_JIT_CACHE_DIR": "deep_gemm", **_TORCH, **_KERNELS},
    "transformers": _TORCH,
}


def place(home: Path, kind: str, version: str) -> Path:
    """The folder of one version."""
    return home / FOLDER / kind / version


def variables(environment: Environment | None, home: Path | None, kind: str = "") -> dict[str, str]:
    """The variables for an engine in this environment, or for one of that kind without any; none without a home."""
    if home is None:
        return {}
    if environment is None:
        return {"TORCHINDUCTOR_CACHE_DIR": str(home / FOLDER / "inductor")} if kind in VARIABLES else {}
    folder = place(home, environment.kind, environment.version)
    return {name: str(folder / part) for name, part in VARIABLES.get(environment.kind, {}).items()}


def homes(root: Path) -> list[Path]:
    """The homes of the users who may have compiled for an environment in ``root``."""
    if root != SYSTEM:
        return [Path.home()]
    try:
        own = sorted(SYSTEM_HOMES.iterdir())
    except OSError:
        own = []
    return [SYSTEM_HOME, *own]


def remove(home: Path, kind: str, version: str) -> str:
    """Remove what a version has compiled; returns why it is still there, "" if it is gone.

    Done as the user who owns the home: a link in it must not lead root where that user may not go.
    """
    folder = place(home, kind, version)
    try:
        if not os.path.lexists(folder):
            return ""
        owner = os.lstat(home)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    as_owner = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        done = subprocess.run(["/bin/rm", "-rf", "--", str(folder)], capture_output=True, text=True, timeout=LIMIT,
                              check=False, **as_owner)  # type: ignore[call-overload] # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{folder}: {error}"
    return str(done.stderr).strip().partition("\n")[0] if done.returncode else ""
