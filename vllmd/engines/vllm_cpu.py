"""vLLM where there is no GPU: what it would do by itself there, and the settings that it gets instead.

Facts about 0.32 that shape this file:

- It takes 0.92 of the host's memory, less what its worker holds, for its cache, and does not start if that much is not
  free. With ``--kv-cache-memory-bytes`` it takes just that. (VLLM_CPU_KVCACHE_SPACE, whole GiB, overrules the flag.)
- A longest context that does not fit into the cache ends the start, unless ``--max-model-len`` is ``auto``.
- It computes in the type that the model is stored in, nearly always bfloat16. A processor without instructions for
  that emulates it: with AVX2 alone one row times 2048 x 2048 took 11.6 ms, and 3.0 ms in float32 (measured).
- It compiles C++ as it starts, which takes a compiler and Python's headers; with ``--enforce-eager`` it does not.
- What it compiles ahead of time it cannot load: there the whole model is one graph of TorchInductor's, a plain
  function, and ``_try_load_aot_compiled_fn`` (compilation/decorators.py) asks it for ``finalize_loading``, which only
  vLLM's own back end has. So each start says "Compiling model again due to a load failure ... 'function' object has no
  attribute 'finalize_loading'" and compiles again. With VLLM_USE_AOT_COMPILE=0 TorchInductor's own cache is asked
  instead: 7.6 s of CPU time instead of 25, of a start's 45 instead of 65 (tiny Qwen3, measured).
- Its worker loads libnuma.so.1.
- It has a thread for each CPU that it may be on, whatever a quota leaves of them, unless VLLM_CPU_OMP_THREADS_BIND is
  ``nobind``; then OMP_NUM_THREADS counts. A forked worker (of a standby) has one for each CPU, too, and they are bound
  to none: its OpenMP was set up before. (A spawned worker leaves one CPU to the engine core.)
- While its threads wait for each other they spin. With two threads on two busy cores 32 tokens of a tiny model took 7
  to 14 s and 6 s of CPU time; with OMP_WAIT_POLICY=passive, which every engine on a CPU gets (``plain.SHARING``), 0.4
  to 0.8 s and 0.7 s.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines.looks import looked_at_once
from vllmd.sizes import GiB

COMPILING = {"VLLM_USE_AOT_COMPILE": "0"}
NVIDIA = "/dev/nvidiactl"
ACCELERATORS = (NVIDIA, "/dev/kfd")  # CUDA, ROCm
# Beside weights and cache: API server, engine core and worker, which each have imported all of PyTorch.
OVERHEAD = GiB * 3 // 2
BIND = "VLLM_CPU_OMP_THREADS_BIND"
COMPILERS = ("g++", "c++", "clang++")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "avx512f", "bf16"})  # of /proc/cpuinfo, x86 and ARM
_LIBRARIES = ("/lib", "/usr/lib", "/usr/local/lib", "/lib64", "/usr/lib64", "/lib/*-linux-gnu", "/usr/lib/*-linux-gnu")


@looked_at_once
def has_accelerator() -> bool:
    """Whether this machine has a GPU that vLLM's sleep mode knows."""
    return any(os.path.exists(path) for path in ACCELERATORS)


def has_nvidia() -> bool:
    """Whether this machine has a GPU of NVIDIA's, with its driver."""
    return os.path.exists(NVIDIA)


@cache
def wide_by_default(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is known to have no instructions for bfloat16, so that float32 is faster."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return False
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return bool(words) and _BFLOAT16.isdisjoint(words)


def as_run(model: ModelConfig) -> ModelConfig:
    """The model with the type in which it computes here, where nothing sets another."""
    unsaid = not model.dtype and not any(word.startswith("--dtype") for word in model.extra_args)
    return replace(model, dtype="float32") if unsaid and not has_accelerator() and wide_by_default() else model


def flags(model: ModelConfig, kv_cache: int) -> list[str]:
    """The flags on a CPU; ``kv_cache``: bytes for its cache, 0: unknown. Flags of the model's own come first."""
    flags = []
    if isinstance(model.gpu_memory, float):
        flags += ["--gpu-memory-utilization", f"{model.gpu_memory:g}"]
    elif kv_cache and "kv_cache_memory" not in model.options and "VLLM_CPU_KVCACHE_SPACE" not in model.env:
        flags += ["--kv-cache-memory-bytes", str(kv_cache)]
    if not model.max_model_len:
        flags += ["--max-model-len", "auto"]
    if not model.dtype and wide_by_default():
        flags += ["--dtype", "float32"]
    if lacks_for_compiling():
        flags.append("--enforce-eager")
    # Flags that the model has itself are left out, with their values.
    own, kept, skip = {word.partition("=")[0] for word in model.extra_args}, list[str](), False
    for word in flags:
        skip = word in own if word.startswith("--") else skip
        kept += [] if skip else [word]
    return kept


def lacks_for_compiling() -> str:
    """The missing package without which it cannot compile; "" if all is there."""
    import shutil

    if not any(shutil.which(name) for name in COMPILERS):
        return "g++"
    return "" if glob.glob("/usr/include/python3*/Python.h") else "python3-dev"


def lacks() -> Iterator[tuple[str, str]]:
    """The missing Debian packages that it needs on a CPU, each with what happens without."""
    if not any(glob.glob(f"{folder}/libnuma.so.1") for folder in _LIBRARIES):
        yield "libnuma1", "its worker does not start without libnuma.so.1"
    if missing := lacks_for_compiling():
        yield missing, "it runs without compiling (--enforce-eager), which is slower"
