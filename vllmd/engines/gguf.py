"""The head of a GGUF file, as the same figures that config.json would tell.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the
first mebibyte is read, up to the tokenizer's tables, which come last.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.foreign import Folder, Unreadable, shown

HEAD = 1 << 20  # bytes
NESTED = 4  # arrays in arrays: the format allows any number, no model has one
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEYS = {  # of config.json -> after the architecture's name and a dot
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "sliding_window": "attention.sliding_window",
    "max_position_embeddings": "context_length",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
}


def config_of(path: Path, root: Path | None = None) -> dict[str, Any]:
    """What ``architecture()`` wants to know. ``root``: out of which no link may lead. Raises Unreadable."""
    try:
        with Folder(path.parent, root).open(path.name) as file:
            metadata = _metadata(file.read(HEAD))
    except OSError as error:
        raise Unreadable(f"{shown(path.name)}: {error.strerror}") from error
    except (struct.error, KeyError, IndexError) as error:
        raise Unreadable(f"{shown(path.name)}: its head is cut off or corrupt") from error
    name = str(metadata.get("general.architecture", ""))
    config = {key: metadata.get(f"{name}.{suffix}") for key, suffix in _KEYS.items()}
    if config["kv_lora_rank"] is None:
        del config["qk_rope_head_dim"]
    return {"model_type": name, "quantization_config": {"quant_method": "gguf"}} | config


def _metadata(head: bytes) -> Mapping[str, Any]:
    if head[:4] != b"GGUF":
        raise Unreadable("it is no GGUF file")
    _, _, count = struct.unpack_from("<IQQ", head, 4)
    values: dict[str, Any] = {}
    at = 24
    for _ in range(min(count, 10_000)):
        key, at = _string(head, at)
        if key.startswith("tokenizer."):
            break
        kind = struct.unpack_from("<I", head, at)[0]
        values[key], at = _value(head, at + 4, kind)
    return values


def _value(head: bytes, at: int, kind: int, nested: int = 0) -> tuple[Any, int]:
    """The value at this place, and the place after it. Arrays are stepped over: none of them is needed."""
    if nested > NESTED:
        raise IndexError
    if kind == _STRING:
        return _string(head, at)
    if kind != _ARRAY:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, head, at)[0], at + struct.calcsize(form)
    inner, count = struct.unpack_from("<IQ", head, at)
    at += 12
    if inner in _SCALARS:
        return None, _within(head, at + count * struct.calcsize("<" + _SCALARS[inner]))
    for _ in range(count):
        _, at = _value(head, at, inner, nested + 1)
    return None, at


def _string(head: bytes, at: int) -> tuple[str, int]:
    size = struct.unpack_from("<Q", head, at)[0]
    end = _within(head, at + 8 + size)
    return head[at + 8 : end].decode(errors="replace"), end


def _within(head: bytes, at: int) -> int:
    if at > len(head):
        raise IndexError
    return at
