"""llama.cpp: ``llama-server`` on a private Unix socket, one model each.

Facts that shape this file (tools/server/README.md, and a build that was run):

- A ``--host`` that ends in ``.sock`` is a Unix socket.
- ``/health`` is 503 while the model loads, and wakes nothing.
- ``--ctx-size`` is the room of all slots together.
- It has no call that means sleep; ``--sleep-idle-seconds`` unloads the model by
  itself and loads it at the next request. A stop is worth as much: the file
  stays in the page cache, and a start from there takes as long as such a wake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Launch, Listen, Place, Progress
from vllmd.engines.options import switch, unknown, whole
from vllmd.engines.plain import Plain, environment
from vllmd.engines.vllm import check_path

ALL_LAYERS = 999  # older versions do not know the word all
_PHASES = {
    "load_model: loading model": "weights",
    "load_tensors:": "weights",
    "load_model: initializing": "context",
    "model loaded": "serving",
    "downloading": "download",
}


class LlamaCpp(Plain):
    """The contract of ``base.Engine`` for llama-server."""

    kind = "llama.cpp"
    PROGRAM = "llama-server"
    INSTALL = "install llama.cpp (https://github.com/ggml-org/llama.cpp), or name its llama-server in command"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "gpu_layers": "layers kept on the device (default: all); 0: it runs on the CPU and takes no device",
        "parallel": "requests that are worked on at a time",
        "embedding": "true: serve embeddings only",
        "reranking": "true: serve reranking",
        "sleep_idle": "seconds after which it unloads its model by itself, to load it at the next request",
    }
    ROUTES: ClassVar[frozenset[str]] = frozenset(
        f"/v1/{name}"
        for name in ("chat/completions", "completions", "responses", "messages", "messages/count_tokens", "embeddings")
    ) | {
        *("/v1/audio/transcriptions", "/v1/rerank", "/rerank", "/tokenize", "/detokenize"),
        *("/completion", "/infill", "/apply-template", "/props"),
        *("/v1/chat/completions/input_tokens", "/v1/responses/input_tokens"),
    }

    # Its page and what that asks. Not /slots, which shows others' prompts, and nothing that changes it.
    OWN_API: ClassVar[frozenset[str]] = frozenset(
        {
            *("GET /", "GET /{file:file}", "GET /_app/{rest:path}", "GET /props", "GET /models", "GET /v1/health"),
            *("POST /completion", "POST /completions", "POST /chat/completions", "POST /infill", "POST /embedding"),
            *("POST /embeddings", "POST /reranking", "POST /v1/reranking", "POST /apply-template"),
        }
    )

    def device_count(self, model: ModelConfig) -> int:
        """None where all layers stay on the CPU."""
        return 0 if whole(model, "gpu_layers") == 0 else super().device_count(model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv and environment. Raises ConfigError for a path that is too long or an option that is wrong."""
        unknown(model, self.OPTIONS)
        socket = place.run_dir / "engine.sock"
        check_path(socket, model)
        argv = (
            *(model.command or ("llama-server",)),
            *_model(model.source),
            *("--host", str(socket), "--alias", self.served_name(model)),
            *_context(model),
            *_layers(model, place),
            *_options(model),
            *model.extra_args,
        )
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if whole(model, "gpu_layers") == 0 else {}
        manages = whole(model, "sleep_idle") is not None
        return Launch(argv, Listen(uds=str(socket)), environment(model, place) | hidden, self_managed=manages)

    def progress(self, line: str) -> Progress | None:
        """The phases of its start."""
        found = next((phase for words, phase in _PHASES.items() if words in line), None)
        return Progress(found, line.strip()) if found else None


def _model(source: str) -> tuple[str, str]:
    """A file, a URL, or a repository with an optional quantization: ``ggml-org/gemma-3-1b-it-GGUF:Q4_K_M``."""
    if source.startswith(("http://", "https://")):
        return "--model-url", source
    is_file = source.startswith(("/", ".", "~")) or source.endswith(".gguf")
    return ("--model", source) if is_file else ("--hf-repo", source)


def _context(model: ModelConfig) -> list[str]:
    slots = whole(model, "parallel")
    flags = ["--parallel", str(slots)] if slots else []
    return [*flags, "--ctx-size", str(model.max_model_len * (slots or 1))] if model.max_model_len else flags


def _layers(model: ModelConfig, place: Place) -> list[str]:
    layers = whole(model, "gpu_layers")
    if layers is None and not place.device_ids:
        return []
    split = ["--split-mode", "row"] if model.tensor_parallel_size > 1 else []
    return ["--n-gpu-layers", str(ALL_LAYERS if layers is None else layers), *split]


def _options(model: ModelConfig) -> list[str]:
    flags = [f"--{name}" for name in ("embedding", "reranking") if switch(model, name)]
    after = whole(model, "sleep_idle")
    return flags if after is None else [*flags, "--sleep-idle-seconds", str(after)]
