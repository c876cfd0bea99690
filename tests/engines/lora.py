"""A small LoRA adapter of random weights, written without any library: answers with it differ from those without."""

from __future__ import annotations

import array
import json
import random
import struct
from pathlib import Path

TINY = {"hidden": 256, "layers": 4, "q_proj": 256, "v_proj": 128}  # the tiny Qwen3 of packaging/dev/setup


def write(folder: Path, *, rank: int = 8, seed: int = 1, strength: float = 1.0) -> Path:
    """Make ``folder`` an adapter of the tiny model, as PEFT lays one out."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    tensors: dict[str, tuple[list[int], bytes]] = {}
    for layer in range(TINY["layers"]):
        for module in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for name, shape in (("lora_A", [rank, TINY["hidden"]]), ("lora_B", [TINY[module], rank])):
                values = array.array("f", (chance.gauss(0, strength) for _ in range(shape[0] * shape[1])))
                tensors[f"{stem}.{name}.weight"] = shape, values.tobytes()
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    about |= {"target_modules": ["q_proj", "v_proj"], "bias": "none", "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def safetensors(tensors: dict[str, tuple[list[int], bytes]]) -> bytes:
    """Tensors of 32-bit floats in the format of that name: the header's length, the header, the data."""
    header: dict[str, object] = {}
    at = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(data for _, data in tensors.values())
