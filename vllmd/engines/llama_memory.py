"""What llama.cpp takes, which is far less than the sums of ``estimate`` say: it compiles and captures nothing.

Per device, or of the host where it runs on the CPU:

1. Weights: the file as it is, mapped. All of it is read.
2. Cache: exactly ``--ctx-size`` tokens, of all slots together, filled at the start.
3. On a CPU: 52 MiB for the program with its libraries and its tokenizer, and what a batch of 512 tokens passes through
   the layers. That grows with the width of the model, thus as the root of its size: 1.4 MiB * sqrt(MiB of weights).
   Measured with xllamacpp and SmolLM2-135M (94 MiB): 175, 209 and 344 MiB with 512, 2048 and 8192 tokens of context;
   this says 172, 205 and 340.
4. On a GPU, not measured here: CUDA's context, 0.5 GiB; the same batch, of which there all is allocated that may be
   needed, the words of its vocabulary included, 0.3 GiB; and 2 % of the weights.
"""

from __future__ import annotations

import math
import os

from vllmd.config.types import ModelConfig
from vllmd.engines import options
from vllmd.engines.facts import argument
from vllmd.sizes import GiB, MiB

KINDS = frozenset({"llama.cpp", "llama-server"})
SHORTEST = 512  # tokens of context: with less, a model is of no use
PROGRAM = 52 * MiB
PROMPT_CACHE = 512 * MiB  # llama-server's own default is 8 GiB
BATCH = 1.4  # MiB for a model of 1 MiB
ON_GPU = GiB // 2 + 300 * MiB
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri")


def runs_on_cpu(model: ModelConfig) -> bool:
    """Whether all layers stay on the CPU: by the model's options, or because there is no device."""
    return model.options.get("gpu_layers") in (0, "0") or not any(map(os.path.exists, _ACCELERATORS))


def overhead(weights: int, *, on_cpu: bool) -> int:
    """Bytes beside ``weights`` and cache (rules 3 and 4)."""
    if on_cpu:
        return PROGRAM + int(BATCH * math.sqrt(weights / MiB) * MiB)
    return ON_GPU + weights // 50


def prompt_cache(model: ModelConfig) -> int:
    """Bytes of host memory for prompts that are kept. Raises ConfigError."""
    if (flag := argument(model, "cache-ram", "cram")) and flag.isdecimal():
        return int(flag) * MiB
    given = options.size(model, "prompt_cache")
    return PROMPT_CACHE if given is None else given


def slots(model: ModelConfig) -> int:
    """The number of requests that have a context of ``max_model_len`` each; 1 where they share one."""
    given = model.options.get("parallel")
    return int(str(given)) if str(given).isdecimal() and int(str(given)) > 0 else 1
