"""Models on disk, of any size and no content: sparse files with true headers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GiB = 1 << 30

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
}


def safetensors(path: Path, sizes: Mapping[str, int], missing: int = 0) -> Path:
    """A file with one tensor per type of ``sizes`` bytes, ``missing`` bytes short."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for dtype, size in sizes.items():
        header[f"{dtype}.weight"] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end - missing)
    return path


def model(folder: Path, config: Mapping[str, Any] | None = None, **sizes: int) -> Path:
    """A folder with config.json and one safetensors file: ``model(tmp_path, LLAMA_8B, BF16=16 * GiB)``."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if sizes:
        safetensors(folder / "model.safetensors", sizes)
    return folder


def cached(hub: Path, name: str, commit: str = "abc123", ref: str = "main") -> Path:
    """An empty snapshot of a repository in the cache, with its ref."""
    folder = hub / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no room."""
    path.touch()
    os.truncate(path, size)
    return path


def gguf(path: Path, metadata: Mapping[str, str | int | list[str]], size: int) -> Path:
    """A GGUF file (version 3) with these figures, of ``size`` bytes in all."""
    body = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    for key, value in metadata.items():
        body += _text(key)
        if isinstance(value, int):
            body += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            body += struct.pack("<I", 8) + _text(value)
        else:
            body += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    path.write_bytes(body)
    os.truncate(path, size)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
