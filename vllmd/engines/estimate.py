"""What a model will take, before anybody has measured it: from its files, or from what is configured.

weights + KV cache + a margin, as the arithmetic goes for transformers. It is a
start: the first run's measured footprint replaces it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint, GiB, Source

_MARGIN = 3 * GiB  # activations, graphs, CUDA's context: 2-4 GiB are seen
_ASLEEP = GiB + GiB // 4  # what stays on the device asleep: 0.9 GiB and more are seen
_SEQUENCES = 4  # full-length contexts that the cache should hold
_LONGEST = 32768  # tokens per sequence to plan for where nothing is configured
_UNKNOWN_SHARE = 0.92  # of the device, where nothing is known: vLLM's own default
_BYTES = {
    "fp32": 4.0, "float32": 4.0, "float": 4.0,
    "fp16": 2.0, "float16": 2.0, "half": 2.0, "bf16": 2.0, "bfloat16": 2.0, "auto": 2.0,
    "fp8": 1.0, "int8": 1.0, "q8": 1.0, "w8a8": 1.0,
    "fp4": 0.56, "nvfp4": 0.56, "int4": 0.56, "awq": 0.56, "gptq": 0.56, "q4": 0.56, "w4a16": 0.56,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Estimate:
    """``weights``: bytes of all of them together, 0 if unknown; ``footprint``: per device."""

    weights: int
    footprint: Footprint


def estimate(model: ModelConfig, hf_home: Path, device_memory: int) -> Estimate:
    """The estimate for devices of ``device_memory`` bytes (0: there is none, so nothing is taken of it)."""
    directory = model_directory(model.source, hf_home)
    weights = weights_on_disk(directory) or weights_by_count(model)
    if not device_memory:
        return Estimate(weights, Footprint(0, 0, host=model.host_memory or 0))
    awake, source = _awake(model, directory, weights, device_memory)
    asleep = model.memory_asleep if model.memory_asleep is not None else min(_ASLEEP, awake // 4)
    host = model.host_memory if model.host_memory is not None else weights
    return Estimate(weights, Footprint(awake, awake, min(asleep, awake), host, source))


def _awake(model: ModelConfig, directory: Path | None, weights: int, device_memory: int) -> tuple[int, Source]:
    if isinstance(model.gpu_memory, float):
        return math.ceil(device_memory * model.gpu_memory), Source.CONFIGURED
    if model.gpu_memory is not None:
        return model.gpu_memory, Source.CONFIGURED
    if not weights:
        return int(device_memory * _UNKNOWN_SHARE), Source.ESTIMATED
    devices = model.tensor_parallel_size * model.pipeline_parallel_size
    return (weights + cache_bytes(model, directory)) // devices + _MARGIN, Source.ESTIMATED


def model_directory(source: str, hf_home: Path) -> Path | None:
    """Where the model's files lie: the path itself, or the newest snapshot in the Hugging Face cache."""
    path = Path(source)
    if path.exists():
        return path
    snapshots = hf_home / "hub" / f"models--{source.replace('/', '--')}" / "snapshots"
    try:
        return max(snapshots.iterdir(), key=lambda snapshot: snapshot.stat().st_mtime, default=None)
    except OSError:
        return None


def weights_on_disk(path: Path | None) -> int:
    """Bytes of the weights' files, of the best format that is there; 0 if none can be seen."""
    if path is None:
        return 0
    try:
        if path.is_file():
            return path.stat().st_size
        for pattern in ("*.safetensors", "*.bin", "*.gguf"):
            if files := [file for file in path.glob(pattern) if not file.name.startswith("consolidated")]:
                return sum(file.stat().st_size for file in files)
    except OSError:
        return 0
    return 0


def weights_by_count(model: ModelConfig) -> int:
    """Bytes by the number of parameters (in billions) and their precision; 0 if not configured."""
    if not model.param_count:
        return 0
    return round(model.param_count * 1e9 * _BYTES.get((model.precision or model.dtype or "auto").lower(), 2.0))


def cache_bytes(model: ModelConfig, directory: Path | None) -> int:
    """Bytes of a useful KV cache, all devices together; 0 where the model's shape is unknown."""
    config = _config(directory)
    tokens = (model.max_model_len or min(_number(config, "max_position_embeddings", 8192), _LONGEST)) * _SEQUENCES
    heads = _number(config, "num_attention_heads", 0)
    width = _number(config, "head_dim", _number(config, "hidden_size", 0) // max(heads, 1))
    per_token = 2 * 2 * _number(config, "num_hidden_layers", 0) * _number(config, "num_key_value_heads", heads) * width
    return tokens * per_token


def _config(directory: Path | None) -> dict[str, Any]:
    """The model's config.json, the text part of it where there are several; empty if it cannot be read."""
    if directory is None:
        return {}
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _number(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else default
