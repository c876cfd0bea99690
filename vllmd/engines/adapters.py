"""LoRA adapters: what their files say, their memory, and the flags for them.

Facts about vLLM 0.32 that shape this file (run on a CPU, and read):

- ``POST /v1/load_lora_adapter`` is there with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and one API server only. It answers
  400 with "has already been loaded" for a name that it knows, and 404 for a path without an adapter.
- The API server keeps name and path, and the engine loads an adapter again when it needs it: after a sleep at level 2,
  whose ``reload_weights`` drops the weights of all adapters, and when others took its place. So an adapter that was
  loaded once is there until the process ends.
- The memory for ``--max-loras`` adapters of ``--max-lora-rank`` is taken at the start, for every linear layer, whatever
  the adapters change. ``--max-lora-rank`` is one of a few numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.config.engine_kinds import one_name
from vllmd.config.offers import adapters_of
from vllmd.config.types import ModelConfig
from vllmd.engines.base import Adapter, Call
from vllmd.engines.facts import argument, whole
from vllmd.engines.options import words, wrong_setting
from vllmd.engines.plain import has_flag
from vllmd.foreign import Folder, Unreadable, about, shown, within
from vllmd.frozen import frozen
from vllmd.hub import locate, read_json

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has
UNKNOWN_RANK = 64  # assumed where an adapter's files are not at hand
MOST_AT_A_TIME = 4  # adapters in one batch, where the configuration does not say
LOAD_LIMIT = 300.0  # seconds: it may be downloaded first
LOOK = 3.0  # seconds for the files of a model's adapters
RUNTIME = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
SCALED = re.compile(r".+:-?\d+(\.\d+)?")  # FILE:SCALE, as llama-server takes it
LOADED_ALREADY = "already been loaded"  # in vLLM's refusal


@frozen
class Files:
    """What an adapter's files say. ``rank`` 0: unknown; ``size``: bytes of its weights. ``wrong``: why unreadable."""

    rank: int = 0
    size: int = 0
    wrong: str = ""


def files_of(path: str, hub: Path | None) -> Files:
    """Read an adapter's files: a folder as PEFT writes it, a GGUF file, or a repository of the cache. Never raises."""
    try:
        return within(LOOK, lambda: _read(path, hub or Path("/nonexistent")))
    except (OSError, Unreadable) as error:
        return Files(wrong=about(shown(path), error))


def _read(path: str, hub: Path) -> Files:
    located = locate(path, hub)
    if located.path is None:
        return Files(wrong=located.why)
    if located.path.suffix == ".gguf":
        size = Folder(located.path.parent, located.root).size(located.path.name)
        return Files(size=size or 0, wrong="" if size else f"{shown(path)} is no regular file")
    folder = Folder(located.path, located.root)
    config = read_json(located.path / "adapter_config.json", located.root)
    sizes = [folder.size(name) or 0 for name in folder.names() if name.startswith("adapter_model.")]
    rank = _rank(config)
    if not rank or not any(sizes):
        return Files(rank, sum(sizes), f"{shown(path)} has no {'rank' if not rank else 'weights'}")
    return Files(rank, max(sizes))


def _rank(config: Mapping[str, Any]) -> int:
    """The highest rank that adapter_config.json tells."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int) and 0 < rank <= 1 << 16), default=0)


def vllm_adapters(model: ModelConfig) -> dict[str, Adapter]:
    """The adapters of a model that vLLM serves, by name."""
    adapters = {}
    late = loads_late(model)
    for name, path in adapters_of(model).items():
        call = load_call(name, str(Path(path).expanduser()) if path.startswith("~") else path)
        adapters[name] = Adapter(name, path, name, load=call if late and name in model.adapters else None)
    return adapters


def load_call(name: str, path: str, *, inplace: bool = False) -> Call:
    """The call by which vLLM loads an adapter; ``inplace``: in place of another one of that name."""
    body = {"lora_name": name, "lora_path": path, **({"load_inplace": True} if inplace else {})}
    return Call("POST", "/v1/load_lora_adapter", body, timeout=LOAD_LIMIT)


def takes_adapters(model: ModelConfig) -> bool:
    """Whether the engine is started so that it takes adapters: of the configuration, or loaded while it runs."""
    return bool(model.adapters) or model.runtime_adapters


def loads_late(model: ModelConfig) -> bool:
    """Whether vLLM can load adapters while it runs: unless its settings forbid it, or it has several API servers."""
    allowed = model.env.get(RUNTIME, "1").strip().lower() in ("1", "true")
    servers = whole(argument(model, "api-server-count", "asc"))
    spread = argument(model, "data-parallel-size", "dp") not in ("", "1")
    return allowed and servers < 2 and (servers == 1 or not spread)


def vllm_flags(model: ModelConfig, hub: Path | None) -> list[str]:
    """The flags of vLLM for the model's adapters, but those that its own arguments have."""
    if not takes_adapters(model):
        return []
    flags = [] if argument(model, "enable-lora") else ["--enable-lora"]
    at_a_time, rank = slots(model), max_rank(model, hub)
    for flag, value in (("--max-loras", at_a_time), ("--max-lora-rank", rank), ("--max-cpu-loras", _kept(model))):
        if not argument(model, flag.lstrip("-")):
            flags += [flag, str(value)]
    if model.adapters and not loads_late(model):
        # Of a flag given twice the last one counts, so the modules of the model's own arguments are repeated here.
        modules = adapters_of(model).items()
        flags += ["--lora-modules", *(json.dumps({"name": name, "path": path}) for name, path in modules)]
    return flags


def slots(model: ModelConfig) -> int:
    """Adapters that vLLM has room for on the device."""
    if given := whole(argument(model, "max-loras")):
        return given
    most = whole(argument(model, "max-cpu-loras")) or MOST_AT_A_TIME  # vLLM refuses to have room for more than it keeps
    if not model.runtime_adapters:
        most = min(most, len(adapters_of(model)))
    return max(1, min(MOST_AT_A_TIME, most))


def _kept(model: ModelConfig) -> int:
    return max(slots(model), len(adapters_of(model)))


def max_rank(model: ModelConfig, hub: Path | None) -> int:
    """The rank that vLLM is to have room for."""
    given = whole(argument(model, "max-lora-rank"))
    if given:
        return given
    ranks = [files_of(path, hub).rank or UNKNOWN_RANK for path in adapters_of(model).values()]
    if model.runtime_adapters:
        ranks.append(UNKNOWN_RANK)
    wanted = max(ranks, default=16)
    return next((rank for rank in RANKS if rank >= wanted), RANKS[-1])


def vllm_memory(model: ModelConfig, hub: Path | None, weights: int) -> int:
    """Bytes per device for vLLM's adapters, of a model of ``weights`` bytes: two thin matrices a linear layer."""
    if not adapters_of(model) and not model.runtime_adapters:
        return 0
    rank = max_rank(model, hub)
    sides = _sides(model, hub)
    one = 2 * rank * sides if sides else weights * rank // 800  # 2 % of the weights at rank 16, where nothing is known
    return slots(model) * one // model.all_devices


def _sides(model: ModelConfig, hub: Path | None) -> int:
    """Inputs and outputs of all linear layers of the usual decoder; 0 where the model's files do not tell."""
    try:
        return within(LOOK, lambda: _read_sides(model, hub or Path("/nonexistent")))
    except (OSError, Unreadable):
        return 0


def _read_sides(model: ModelConfig, hub: Path) -> int:
    located = locate(model.source, hub, argument(model, "revision"))
    if located.path is None or not located.path.is_dir():
        return 0
    config = read_json(located.path / "config.json", located.root)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes = [config.get(name) for name in names]
    if not all(isinstance(value, int) and 0 < value < 10**7 for value in sizes):
        return 0
    layers, hidden, inner, heads = (int(value) for value in sizes if value is not None)
    head = config.get("head_dim") if isinstance(config.get("head_dim"), int) else hidden // heads
    keys = config.get("num_key_value_heads") if isinstance(config.get("num_key_value_heads"), int) else heads
    queries, values = heads * int(head or 0), int(keys or 0) * int(head or 0)
    return layers * (2 * (hidden + queries) + 2 * (hidden + values) + 3 * (hidden + inner))


def notes_of(model: ModelConfig, hub: Path | None) -> tuple[str, ...]:
    """What is wrong with the files of a model's adapters; a repository that is not here yet is not wrong."""
    notes = []
    for name, adapter in model.adapters.items():
        wrong = files_of(adapter.path, hub).wrong
        if wrong and "is not in the cache" not in wrong and not wrong.endswith("No such file or directory"):
            notes.append(f"its adapter {name}: {wrong}")
    return tuple(notes)


def llama_adapters(model: ModelConfig, served_name: str) -> dict[str, Adapter]:
    """The adapters of a model that llama-server serves: numbered as they come, after those of its options.

    Each is loaded with the scale 0, and every request says the scale of each. A request that says nothing is answered
    without any of them, but from what a slot remembers of the same prompt with one: llama.cpp forgets that only where
    the list of scales changes (b0 of xllamacpp, run: the second of two answers was another one).
    """
    if not model.adapters:
        return {}
    scales = [_scale(word) for word in option_words(model)]

    def members(chosen: int) -> dict[str, object]:
        own = [float(number == chosen) for number in range(len(model.adapters))]
        return {"lora": [{"id": number, "scale": scale} for number, scale in enumerate((*scales, *own))]}

    adapters = {"": Adapter("", "", served_name, members(-1))}
    for number, (name, adapter) in enumerate(model.adapters.items()):
        adapters[name] = Adapter(name, adapter.path, served_name, members(number))
    return adapters


def llama_flags(model: ModelConfig) -> list[str]:
    """What llama-server is started with for the sake of the model's adapters. Raises ConfigError."""
    if model.adapters and has_flag(model, "--lora", "--lora-scaled"):
        raise wrong_setting(model, "extra_args", "with adapters, name every --lora there or in options.lora: they have "
                            "numbers")  # fmt: skip
    for name, adapter in model.adapters.items():
        if set(",:") & set(adapter.path):
            raise wrong_setting(model, f"adapters.{name}", "llama-server takes no path with a comma or a colon in it")
    return [word for adapter in model.adapters.values() for word in ("--lora-scaled", f"{adapter.path}:0")]


def option_words(model: ModelConfig) -> list[str]:
    """The adapters of llama.cpp's option ``lora``, in the order of their numbers: those without a scale come first."""
    return sorted(words(model, "lora"), key=lambda word: SCALED.fullmatch(word) is not None)


def _scale(word: str) -> float:
    return float(word.rpartition(":")[2]) if SCALED.fullmatch(word) else 1.0


def memory(model: ModelConfig, hub: Path, weights: int) -> int:
    """Bytes per device that the model's adapters take, of a model of ``weights`` bytes."""
    if one_name(model.engine) == "llama.cpp":
        size = sum(files_of(adapter.path, hub).size for adapter in model.adapters.values())
        return size // model.all_devices
    return vllm_memory(model, hub, weights) if one_name(model.engine) == "vllm" else 0
