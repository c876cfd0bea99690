"""A LoRA adapter of random weights for a llama, as a GGUF file; written here, since no wheel carries one."""

from __future__ import annotations

import random
import struct
from pathlib import Path

_FLOAT32, _STRING, _F32_TENSOR = 6, 8, 0
ALIGNMENT = 32


def write_adapter(path: Path, layer: int, width: int, rank: int = 2) -> Path:
    """Changes the output of one layer's attention, of ``width`` values, beyond recognition.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    seed = random.Random(layer)
    tensors = {"lora_a": (width, rank), "lora_b": (rank, width)}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 4)
    for key, value in (("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")):
        head += _text(key) + struct.pack("<I", _STRING) + _text(value)
    head += _text("adapter.lora.alpha") + struct.pack("<If", _FLOAT32, 8.0)
    data = b""
    for name, (rows, columns) in tensors.items():
        head += _text(f"blk.{layer}.attn_output.weight.{name}")
        head += struct.pack("<IQQIQ", 2, rows, columns, _F32_TENSOR, len(data))
        data += struct.pack(f"<{rows * columns}f", *(seed.gauss(0, 0.5) for _ in range(rows * columns)))
        data += bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
