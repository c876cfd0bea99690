"""What a standby of ``transformers serve`` imports, and what its imports read.

Facts about 5.19 that shape this file (run on a CPU):

- It is one process, and nine tenths of its start with a small model are imports: 6.1 s of 6.8 s of CPU time.
- Its own imports ask whether there is a GPU. With PYTORCH_NVML_BASED_CUDA_CHECK torch asks NVML, and opens no device;
  a standby that has opened one all the same is not used (``standby_main``).
- The model's own classes are imported when it is known which it is; that is little.
"""

from __future__ import annotations

from vllmd.config.types import ModelConfig
from vllmd.engines import environments
from vllmd.engines.base import Launch
from vllmd.engines.standby import Standby, is_script_of

MAIN = "from transformers.cli.transformers import main"
CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
LATE = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HF_TOKEN", "VLLMD_INSTANCE"})
IMPORTS = (
    "transformers.cli.transformers",
    "transformers.cli.serve",
    "transformers.cli.serving.server",
    "transformers.cli.serving.model_manager",
    "transformers.cli.serving.chat_completion",
    "transformers.cli.serving.completion",
    "transformers.cli.serving.response",
    "transformers.cli.serving.transcription",
    "torch",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.generation.utils",
    "transformers.generation.continuous_batching",
    "transformers.integrations.accelerate",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.tokenization_utils_tokenizers",
    "openai",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.loops.auto",
    "uvicorn.lifespan.on",
)


def standby(model: ModelConfig, launch: Launch, *, foreign_gpu: bool) -> Standby | None:
    """What a standby has to be for that engine; None where none can be: another program, a GPU not of NVIDIA's."""
    program = environments.in_path(model, launch.argv[0])
    python = environments.interpreter_of(program)
    if foreign_gpu or not program or not python or not is_script_of(program, MAIN):
        return None
    ours = {} if CHECK in {**launch.env, **model.env} else {CHECK: "1"}
    return Standby(python, program, IMPORTS, LATE, ours=tuple(ours.items()))
