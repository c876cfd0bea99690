"""``transformers serve`` (5.x) on a loopback port, pinned to one model.

Facts that shape this file (transformers 5.19, which was run): the positional
argument pins it, is loaded before it listens, and is the only name that it then
answers to; ``/reset`` drops the model and empties PyTorch's cache;
``/load_model`` loads it again and answers, as a stream of events, when that is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines import environments
from vllmd.engines.base import Call, Engine, Launch, Listen, Place
from vllmd.engines.options import choice, switch, text, unknown
from vllmd.engines.plain import Plain, environment
from vllmd.engines.standby import Standby
from vllmd.engines.vllm_cpu import has_accelerator, has_nvidia


class Transformers:
    """The kind; the name that its calls carry is the model's, see ``bind``."""

    kind = "transformers"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "continuous_batching": "true: requests are batched as they come",
        "attention": "attention implementation, such as flash_attention_2 or sdpa",
        "quantization": "bnb-4bit or bnb-8bit",
        "cpu": "true: it runs on the CPU and takes no device",
    }

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for an option that is wrong."""
        unknown(model, self.OPTIONS)
        return TransformersOf(model)


class TransformersOf(Plain):
    """The contract of ``base.Engine`` for one model."""

    kind = "transformers"
    INSTALL = "vllmctl engine install transformers, or name a transformers that is installed in command"
    # Log lines that show that a phase has begun; the server loads before it listens.
    PHASES = (
        ("download", r"Fetching \d+ files|\.(?:safetensors|bin)[^|]{0,80}:\s{1,9}\d+%\|"),
        ("serving", r"Started server process|Application startup complete|Uvicorn running on"),
        ("weights", r"\bLoading (?:weights|checkpoint shards|\S+$)"),
    )
    ROUTES: ClassVar[frozenset[str]] = frozenset(
        {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/audio/transcriptions"}
    )

    def __init__(self, model: ModelConfig) -> None:
        self._source = model.source
        self._cpu = switch(model, "cpu")
        self._options = _options(model)

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Level 2: the weights go, the imported libraries stay."""
        return frozenset() if model.sleep_mode is False else frozenset({2})

    def device_count(self, model: ModelConfig) -> int:
        """The number of devices that the engine takes; 0 where it runs on the CPU."""
        return 0 if self._cpu else super().device_count(model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The command line and environment of ``transformers serve``."""
        command = model.command or (environments.program(model, "transformers"),)
        program = command if "serve" in command else (*command, "serve")
        where = ("--host", "127.0.0.1", "--port", str(place.port), "--log-level", "info")
        argv = (*program, model.source, *where, *_of_model(model), *self._options, *model.extra_args)
        env = environment(model, place) | ({"CUDA_VISIBLE_DEVICES": ""} if self._cpu else {})
        return Launch(argv, Listen(port=place.port), {"HF_HUB_DISABLE_UPDATE_CHECK": "1", **env})

    def served_name(self, model: ModelConfig) -> str:
        """The name that the server is pinned to; it refuses any other."""
        return model.source

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """The only sleep there is: ``/reset`` unloads the model, whatever the level."""
        return (Call("POST", "/reset", timeout=120.0),)

    def standby(self, model: ModelConfig, launch: Launch) -> Standby | None:
        """See ``transformers_standby``; none on a GPU that is not of NVIDIA's."""
        from vllmd.engines import transformers_standby  # not before the first start

        foreign = has_accelerator() and not has_nvidia()
        return transformers_standby.standby(model, launch, foreign_gpu=foreign)

    def wake(self, level: int) -> Sequence[Call]:
        """One call, whose stream of events ends when the model is loaded."""
        return (Call("POST", "/load_model", json={"model": self._source}, timeout=600.0),)


def _of_model(model: ModelConfig) -> list[str]:
    flags = ["--dtype", model.dtype] if model.dtype else []
    return [*flags, "--trust-remote-code"] if model.trust_remote_code else flags


def _options(model: ModelConfig) -> list[str]:
    flags = ["--continuous-batching"] if switch(model, "continuous_batching") else []
    if attention := text(model, "attention"):
        flags += ["--attn-implementation", attention]
    quantization = choice(model, "quantization", ("", "bnb-4bit", "bnb-8bit"))
    return [*flags, "--quantization", quantization] if quantization else flags
