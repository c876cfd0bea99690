"""SGLang: ``sglang.launch_server`` on a loopback port, with the memory saver so that it can sleep.

Facts that shape this file (SGLang's "SGLang for RL Systems" and "Server Arguments"):

- ``/health`` generates a token unless SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION is
  false; a sleeper could not. It is 503 while starting.
- Without ``--served-model-name`` the model's name is its path.
- ``/release_memory_occupation`` and ``/resume_memory_occupation`` need
  ``--enable-memory-saver``, a JSON body, and that nothing runs.
- Weights come back from the host with ``--enable-weights-cpu-backup``; without
  it they come back as garbage and must be read from disk, between weights and cache.
- ``--mem-fraction-static`` is for weights and cache only: activations and CUDA
  graphs come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines import environments
from vllmd.engines.base import Call, Engine, Launch, Listen, Place
from vllmd.engines.options import switch, unknown
from vllmd.engines.plain import PROBE, Plain, environment, has_flag, own_key
from vllmd.engines.vllm_cpu import has_accelerator

STATIC = 0.88  # of what was promised: the rest is for activations and CUDA graphs
_RELEASE = Call("POST", "/release_memory_occupation", json={}, timeout=300.0)
_RESUME = "/resume_memory_occupation"

KEY, KEY_FILE = "VLLMD_ENGINE_KEY", "vllmd-key.yaml"
# It takes its key from the command line, which everybody can read, or from a file, which only the engine itself may
# write where it will read it.
_WITH_KEY = 'umask 077; printf "api-key: %s\\n" "$VLLMD_ENGINE_KEY" >"$1" || exit; shift; exec "$@"'


class Sglang:
    """The kind; what sleep means depends on the model's options, see ``bind``."""

    kind = "sglang"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "weights_backup": "true (the default): asleep, the weights stay in host memory (level 1); "
        "false: they are read from disk again at each wake (level 2)",
        "key": "true (the default): it asks for a key that vllmd alone knows, which it reads with --config; "
        "false: for versions that have no --config",
    }

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for an option that is wrong."""
        unknown(model, self.OPTIONS)
        return SglangOf(model)


class SglangOf(Plain):
    """The contract of ``base.Engine`` for one model."""

    kind = "sglang"
    INSTALL = "vllmctl engine install sglang, or name a Python that has it in command, such as /opt/sglang/bin/python"
    # Log lines of 0.5.23 that show that a phase has begun.
    PHASES = (
        ("configuring", r"server_args="),
        ("download", r"\.(?:safetensors|bin)[^|]{0,80}:\s{1,9}\d+%\|"),
        ("weights", r"Load weight begin|Loading safetensors"),
        ("profiling", r"Load weight end|Cache is allocated|Capture .*graph end|Capture .* end\. "),
        ("compile", r"DeepGEMM JIT Compiling|Compiling a graph|Dynamo bytecode transform"),
        ("graphs", r"Capture .*graph begin|Capture .* begin\. "),
        ("warm-up", r"max_total_num_tokens=|Application startup complete"),
        ("serving", r"The server is fired up"),
    )
    ROUTES: ClassVar[frozenset[str]] = frozenset(
        f"/v1/{name}"
        for name in ("chat/completions", "completions", "embeddings", "responses", "messages", "rerank", "score")
    ) | {"/classify", "/tokenize", "/detokenize", "/v1/audio/transcriptions"}

    # Not /server_info and /get_server_info, which show its keys.
    OWN_API: ClassVar[frozenset[str]] = frozenset(
        {
            *("GET /model_info", "GET /get_model_info", "GET /get_load", "GET /health_generate"),
            *("POST /generate", "POST /encode", "POST /v1/tokenize", "POST /v1/detokenize"),
        }
    )

    def __init__(self, model: ModelConfig) -> None:
        self._keyed = switch(model, "key", default=True)
        self._backup = switch(model, "weights_backup", default=True)
        self._source = model.source

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """The one that its start was prepared for; none without a GPU, or where ``sleep_mode`` is false."""
        wanted = has_accelerator() if model.sleep_mode is None else model.sleep_mode
        return frozenset({1 if self._backup else 2}) if wanted else frozenset()

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The command line and environment of ``python3 -m sglang.launch_server``."""
        command = model.command or (environments.program(model, "python3"),)
        argv = [*(command if "-m" in command or "serve" in command else (*command, "-m", "sglang.launch_server"))]
        argv += ["--model-path", model.source, "--served-model-name", self.served_name(model)]
        argv += ["--host", "127.0.0.1", "--port", str(place.port)]
        argv += ["--dtype", model.dtype] if model.dtype else []
        argv += ["--context-length", str(model.max_model_len)] if model.max_model_len else []
        for kind, ranks in (("tp", model.tensor_parallel_size), ("pp", model.pipeline_parallel_size)):
            argv += [f"--{kind}-size", str(ranks)] if ranks > 1 else []
        argv += ["--trust-remote-code"] if model.trust_remote_code else []
        argv += _memory(model, place)
        if self.sleep_levels(model):  # how weights come back is decided at the start, so it has one level only
            argv += ["--enable-memory-saver", *(["--enable-weights-cpu-backup"] if self._backup else [])]
        argv += model.extra_args
        env = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false", **environment(model, place)}
        key = own_key(model, place, KEY, "--api-key", "--admin-api-key", "--config") if self._keyed else ""
        if key:
            file = str(place.run_dir / KEY_FILE)
            argv, env = ["/bin/sh", "-c", _WITH_KEY, "sh", file, *argv, "--config", file], {**env, KEY: key}
        return Launch(tuple(argv), Listen(port=place.port, key=key), env)

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """One call, which fails while requests run, frozen or not."""
        return (_RELEASE,)

    def wake(self, level: int) -> Sequence[Call]:
        """One call from level 1; from level 2 weights, their contents from disk, then the cache."""
        if level != 2:
            return (Call("POST", _RESUME, json={}, timeout=300.0),)
        return (
            Call("POST", _RESUME, json={"tags": ["weights"]}, timeout=300.0),
            Call("POST", "/update_weights_from_disk", json={"model_path": self._source}, timeout=600.0),
            Call("POST", _RESUME, json={"tags": ["kv_cache"]}, timeout=300.0),
        )

    def alive(self, model: ModelConfig) -> Call:
        """``/health`` as well, which by a variable of the engine's generates nothing."""
        return Call("GET", "/health", timeout=PROBE)


def _memory(model: ModelConfig, place: Place) -> list[str]:
    """A configured share is passed on as it is; a promise leaves room for what is not static."""
    if not place.device_ids or has_flag(model, "--mem-fraction-static"):
        return []
    if isinstance(model.gpu_memory, float):
        return ["--mem-fraction-static", f"{model.gpu_memory:g}"]
    if not place.memory or not place.device_memory:
        return []
    share = place.memory / place.device_memory * STATIC
    return ["--mem-fraction-static", f"{max(0.01, math.floor(share * 1000) / 1000):g}"]
