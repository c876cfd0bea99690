"""llama.cpp: ``llama-server`` on a private Unix socket, one model each.

Where no llama-server is installed, PyPI's xllamacpp brings its server: ``xllamacpp_server.py``, our program, takes the
same flags and runs in the environment that has the package (``environments.py``). Of the two the rest of this file
needs not know which it is.

Facts that shape this file (tools/server/README.md, and builds that were run):

- A ``--host`` that ends in ``.sock`` is a Unix socket.
- ``/health`` is 503 while the model loads, and wakes nothing.
- ``--ctx-size`` is the room of all slots together. Without ``--parallel`` four slots share one.
- It has no call that means sleep; ``--sleep-idle-seconds`` unloads the model by
  itself and loads it at the next request. A stop is worth as much: the file
  stays in the page cache, and a start from there takes as long as such a wake.
- Prompts of slots that others took over are kept in host memory, 8 GiB by default. Versions from
  before that have no flag for it, so the amount is set by a variable.
- On a CPU its threads wait for each other many times per token. GNU's OpenMP lets them spin meanwhile, which on cores
  that others use as well made it twelve times slower (measured: 1.3 tokens/s against 15.6); so they are to sleep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines import adapters, environments
from vllmd.engines.base import Adapter, Failure, Launch, Listen, Place, Progress
from vllmd.engines.checkpoint import gguf_file, projector_file
from vllmd.engines.facts import argument
from vllmd.engines.llama_memory import prompt_cache
from vllmd.engines.options import switch, text, unknown, whole
from vllmd.engines.plain import SHARING, Plain, environment, has_flag
from vllmd.engines.vllm import check_path
from vllmd.foreign import Unreadable, within
from vllmd.hub import is_repository, locate
from vllmd.sizes import MiB

RANKING = frozenset({"/v1/rerank", "/rerank"})
ALL_LAYERS = 999  # older versions do not know the word all
LOOK = 2.0  # seconds for finding a model's files in the cache
OWN_SERVER = Path(__file__).with_name("xllamacpp_server.py")
_STAMP = re.compile(r"(?:\d+\.){3}\d+ (?P<level>[DIWE]) ")  # 0.00.032.878 E gguf_init_from_file: ...
_PYTHON = re.compile(r"python[\d.]*")
_PHASES = {
    "load_model: loading model": "weights",
    "load_tensors:": "weights",
    "threadpool init": "context",
    "warming up the model": "warm-up",
    "load_model: initializing": "context",
    "model loaded": "serving",
    "downloading": "download",
}


class LlamaCpp(Plain):
    """The contract of ``base.Engine`` for llama-server."""

    kind = "llama.cpp"
    PROGRAM = "llama-server"
    INSTALL = "vllmctl engine install llama.cpp, or name a llama-server that is installed in command"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "gpu_layers": "layers kept on the device (default: all); 0: it runs on the CPU and takes no device",
        "parallel": "requests that are worked on at a time",
        "embedding": "true: serve embeddings, too",
        "reranking": "true: serve reranking, and embeddings, too",
        "prompt_cache": "host memory for prompts that may come again, such as 2GiB (default: 512MiB); 0 keeps none",
        "lora": "LoRA adapters: a GGUF file or a list of them, each with :SCALE behind it if it is not 1",
        "mmproj": "file that lets it see and hear; without it mmproj*.gguf beside a model from the cache",
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

    # The engine's own page and its requests. Not /slots, which shows others' prompts, and nothing that changes the
    # engine.
    OWN_API: ClassVar[frozenset[str]] = frozenset(
        {
            *("GET /", "GET /{file:file}", "GET /_app/{rest:path}", "GET /props", "GET /models", "GET /v1/health"),
            *("POST /completion", "POST /completions", "POST /chat/completions", "POST /infill", "POST /embedding"),
            *("POST /embeddings", "POST /reranking", "POST /v1/reranking", "POST /apply-template"),
        }
    )

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """The kind's routes; embedding and ranking only with the options or flags for them."""
        if any(name.startswith("LLAMA_ARG_") for name in model.env):
            return self.ROUTES
        ranks = model.options.get("reranking") is True or bool(argument(model, "reranking", "rerank"))
        embeds = model.options.get("embedding") is True or bool(argument(model, "embedding", "embeddings"))
        served = self.ROUTES if ranks else self.ROUTES - RANKING
        return served if ranks or embeds else served - {"/v1/embeddings"}

    def device_count(self, model: ModelConfig) -> int:
        """None where all layers stay on the CPU."""
        return 0 if whole(model, "gpu_layers") == 0 else super().device_count(model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """argv and environment. Raises ConfigError for a path that is too long or an option that is wrong."""
        unknown(model, self.OPTIONS)
        socket = place.run_dir / "engine.sock"
        check_path(socket, model)
        argv = [*_program(model), *_files(model, place)]
        argv += ["--host", str(socket), "--alias", self.served_name(model), "--metrics"]
        # 1. Slots, and the context of all of them: as configured, else what fits, else its own choice.
        slots = whole(model, "parallel")
        tokens = model.max_model_len * (slots or 1) if model.max_model_len else place.context
        argv += ["--parallel", str(slots)] if slots else []
        argv += ["--ctx-size", str(tokens)] if tokens else []
        # 2. Layers on the devices.
        layers = whole(model, "gpu_layers")
        if layers is not None or place.device_ids:
            argv += ["--n-gpu-layers", str(ALL_LAYERS if layers is None else layers)]
            argv += ["--split-mode", "row"] if model.tensor_parallel_size > 1 else []
        # 3. Threads: llama.cpp counts the machine's cores, whatever a quota or an affinity leaves of them.
        if place.cpus and not (has_flag(model, "-t", "--threads") or "LLAMA_ARG_THREADS" in model.env):
            argv += ["--threads", str(place.cpus)]
        # 4. Options, adapters, and the model's own arguments.
        sleep_idle = whole(model, "sleep_idle")
        argv += [*_options(model), *(["--sleep-idle-seconds", str(sleep_idle)] if sleep_idle is not None else [])]
        argv += [*adapters.llama_flags(model), *model.extra_args]
        env = {"LLAMA_ARG_CACHE_RAM": str(prompt_cache(model) // MiB), **SHARING}  # layers may be left to the CPU
        env |= environment(model, place) | ({"CUDA_VISIBLE_DEVICES": ""} if layers == 0 else {})
        return Launch(tuple(argv), Listen(uds=str(socket)), env, self_managed=sleep_idle is not None)

    def adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The model's adapters, all loaded at the start; each request names its own by number."""
        return adapters.llama_adapters(model, self.served_name(model))

    def progress(self, line: str) -> Progress | None:
        """The phase of a start that a log line shows."""
        phase_name = next((phase for words, phase in _PHASES.items() if words in line), None)
        return Progress(phase_name, _STAMP.sub("", line).strip()) if phase_name else None

    def failure(self, lines: Sequence[str]) -> Failure:
        """What the errors in its log say; warnings and other lines are left out where there are errors."""
        stamps = [(_STAMP.match(line), line) for line in lines]
        failed = any(stamp and stamp["level"] == "E" for stamp, _ in stamps)
        kept = [line for stamp, line in stamps if not (failed and stamp and stamp["level"] in "DIW")]
        return super().failure([_STAMP.sub("", line) for line in kept])

    def _absent(self, lines: Sequence[str]) -> str:
        """The line that says that llama-server, or the package xllamacpp, is missing; "" if none does."""
        return next((line for line in lines if "No module named 'xllamacpp'" in line), "") or super()._absent(lines)


def _program(model: ModelConfig) -> tuple[str, ...]:
    """An installed llama-server, else the environment's own, else our program in that environment.

    A ``command`` that is only a Python is one that has xllamacpp.
    """
    if model.command:
        is_python = len(model.command) == 1 and _PYTHON.fullmatch(Path(model.command[0]).name)
        return (model.command[0], "-I", str(OWN_SERVER)) if is_python else model.command
    name = LlamaCpp.PROGRAM
    used = environments.chosen(model)
    if used is None:
        return (name,)
    own = used.program(name)
    return (str(own),) if own else (str(used.python), "-I", str(OWN_SERVER))


def _files(model: ModelConfig, place: Place) -> list[str]:
    """The model's files: a file, also of a repository in the cache; else a URL or a repository, for it to download.

    A repository may name a quantization: ``ggml-org/gemma-3-1b-it-GGUF:Q4_K_M``.
    """
    source, projector = model.source, text(model, "mmproj")
    seeing = ["--mmproj", projector] if projector else []
    if source.startswith(("http://", "https://")):
        return ["--model-url", source, *seeing]
    if source.startswith(("/", ".", "~")) or source.endswith(".gguf"):
        return ["--model", source, *seeing]
    file, beside = _cached(source, place.hub, argument(model, "revision"))
    if file is None:
        return ["--hf-repo", source, *seeing]
    return ["--model", str(file), *(seeing or (["--mmproj", str(beside)] if beside else []))]


def _cached(source: str, hub: Path | None, revision: str) -> tuple[Path | None, Path | None]:
    """The model's file in the cache, and the projector beside it; None where there is none, or it cannot be read."""
    if hub is None or not is_repository(source.partition(":")[0]):
        return None, None
    cache = hub

    def look() -> tuple[Path | None, Path | None]:
        located = locate(source, cache, revision)
        if located.path is None:
            return None, None
        file = gguf_file(located.path, located.tag, located.root)
        return file, projector_file(located.path, located.root) if file else None

    try:
        return within(LOOK, look)
    except (OSError, Unreadable):  # the engine tries itself, and its log says why if it fails
        return None, None


def _options(model: ModelConfig) -> list[str]:
    flags = [f"--{name}" for name in ("embedding", "reranking") if switch(model, name)]
    for adapter in adapters.option_words(model):
        flags += ["--lora-scaled" if adapters.SCALED.fullmatch(adapter) else "--lora", adapter]
    return flags
