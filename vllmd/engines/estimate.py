"""How much memory a model will take, before it has ever run: arithmetic on its own files.

Measured beats configured beats estimated; this module has the last two, the core
learns the first. The rules, per device:

1. Weights: bytes in the model's files, 32-bit floats halved (vLLM loads them as
   16-bit unless told otherwise), divided by tensor and pipeline parallelism.
   Without files: ``param_count`` · ``precision``, else a size in the name (``7B``).
2. Cache: room for one request of the longest length, or for 16 (``max_num_seqs``
   if fewer) of 2,048 tokens, whichever is more; only the former where both do
   not fit into 0.9 of the device. What the user set for it is taken as set.
3. Overhead: CUDA's context 0.5 GiB, activations and CUDA graphs 1 GiB + 6 % of
   the weights (0.5 GiB less with ``--enforce-eager``), NCCL 0.5 GiB where
   several devices work together; at most 4 GiB. LoRA adapters beside it: of vLLM
   two thin matrices for each linear layer, of the highest rank, for as many adapters
   as it has room for at a time; of llama.cpp their files.
4. Asleep: 0.9 GiB + 4 % of the weights (0.9 to 1.2 GiB were seen at up to 8 GB
   of weights, 7 GB at about 125). Host at level 1: all weights.
5. ``gpu_memory``: a fraction of the device (vLLM's own meaning), or bytes, is
   taken at its word instead of 1-3's sum; the largest of ``when_free.shares`` too.
6. Nothing known at all: 0.9 of the device, and as much of the host at level 1.

llama.cpp has rules of its own in place of 2 and 3, see ``llama_memory``; and so has
vLLM where there is no GPU, see ``vllm_cpu``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.core.lack import lack
from vllmd.core.types import Device, Footprint, Source
from vllmd.engines import adapters, llama_memory, options, vllm_cpu
from vllmd.engines.architecture import Architecture
from vllmd.engines.facts import Facts, argument, facts_of, is_wide, whole
from vllmd.errors import ConfigError
from vllmd.frozen import frozen
from vllmd.sizes import GiB
from vllmd.sizes import in_words as size

USABLE = 0.9  # of a device: what a model of which nothing is known is given, and what a guess may take
REQUESTS, REQUEST_TOKENS = 16, 2048  # rule 2
HOST_SHARE = 4  # without a device a cache may take a quarter of the host's memory, unless a length is asked for
DEFAULT_LENGTH = 8192  # tokens, where neither the configuration nor the model tells
CONTEXT = GiB // 2
WORKING = GiB
EAGER_SAVES = GiB // 2
NCCL = GiB // 2
MAX_OVERHEAD = 4 * GiB
RESIDUAL = int(0.9 * GiB)
# Kinds whose models have the names of repositories, unless ``model`` says another.
BY_NAME = frozenset({"vllm", "sglang", "llama.cpp", "llama-server", "transformers", "tei"})


@frozen
class Estimate:
    """What a model will take. Bytes.

    ``weights``: of the whole model, as loaded. ``kv_per_token``: of the whole model, 0 if unknown or none.
    ``kv_cache``: per device, to be passed to the engine (``Place.kv_cache``); 0 leaves it to the engine.
    ``why``: the arithmetic. ``notes``: what was odd or had to be guessed.
    ``host_running``: of the host as long as it runs, awake or asleep. ``context``: tokens, to be passed to an engine
    whose own longest context does not fit (``Place.context``); 0: its own choice.
    """

    footprint: Footprint
    weights: int
    kv_per_token: int
    kv_cache: int
    why: str
    notes: tuple[str, ...] = ()
    host_running: int = 0
    context: int = 0

    def in_numbers(self) -> Estimate:
        """The estimate without its words."""
        return replace(self, why="", notes=()) if self.why or self.notes else self


ELSEWHERE = Estimate(Footprint(0, 0), 0, 0, 0, "a remote engine takes nothing here")


def estimate(model: ModelConfig, hub: Path, device_memory: int, host_memory: int = 0) -> Estimate:
    """What ``model`` will take on devices of ``device_memory`` bytes (0: there is none). Never raises.

    ``host_memory``: bytes that engines may use where there is no device; 0: not known.
    Reads the files of the model from a path or the cache under ``hub``; downloads nothing.
    """
    if model.engine == "remote":
        return ELSEWHERE
    if model.engine == "sim":
        return _stand_in(model, device_memory)
    if not device_memory and model.engine == "vllm":
        model = vllm_cpu.as_run(model)
    facts = facts_of(model, hub)
    if not model.model and model.engine not in BY_NAME:  # nor need its name be that of any files
        facts = replace(facts, notes=())
    lora = adapters.memory(model, hub, facts.weights)
    facts = replace(facts, adapters=lora, notes=(*facts.notes, *adapters.notes_of(model, hub)))
    expected = (
        _known(model, facts, device_memory, host_memory) if facts.weights else _unknown(model, facts, device_memory)
    )
    return replace(expected, host_running=_host_running(model, expected.footprint.awake, device_memory))


def _host_running(model: ModelConfig, awake: int, device_memory: int) -> int:
    """The host memory of an engine that runs: llama.cpp's kept prompts, and everything where it is on the CPU."""
    if model.engine not in llama_memory.KINDS:
        return 0 if device_memory else awake
    on_host = not device_memory or model.options.get("gpu_layers") in (0, "0")
    try:
        return llama_memory.prompt_cache(model) + (awake if on_host else 0)
    except ConfigError:  # refused where it is used, not here
        return 0


def too_large(model: ModelConfig, expected: Estimate, devices: Sequence[Device]) -> str:
    """Why the model can never run on these devices, with the arithmetic; "" if it can."""
    allowed = [device for device in devices if not model.devices or device.index in model.devices]
    needed = model.devices_here
    if not devices or expected.footprint.awake <= 0:
        return ""
    want = max(expected.footprint.awake, expected.footprint.starting)
    lacks = lack(allowed, needed, lambda device: want)
    return lacks.of(model.name, expected.why) if lacks else ""


def overfull_pins(pinned: Iterable[tuple[ModelConfig, Estimate]], devices: Sequence[Device]) -> str:
    """Why the pinned models cannot all be loaded, or leave nothing for others; "" if they can.

    By sums, not by device.
    """
    held = [(each.name, expected.footprint.awake * each.devices_here) for each, expected in pinned]
    total = sum(amount for _, amount in held)
    room = sum(device.memory - device.reserve for device in devices)
    if not held or not devices or total < 0.95 * room:
        return ""
    sums = " + ".join(f"{name} {size(amount)}" for name, amount in held)
    return f"the pinned models fill the devices: {sums} = {size(total)} of {size(room)}; no other model can be loaded"


# ---- the sums ---------------------------------------------------------------------------------


def _unknown(model: ModelConfig, facts: Facts, device_memory: int) -> Estimate:
    budget, how = _budget(model, device_memory)
    if budget is None:
        budget = int(USABLE * device_memory)
        how = f"nothing is known of its size: {USABLE:g} of the device; set gpu_memory or param_count"
    host = budget * model.devices_here  # at level 1 it may put all of it there
    footprint = _footprint(model, budget, budget, host)
    return Estimate(footprint, 0, 0, 0, f"{size(budget)} ({how})", facts.notes)


def _stand_in(model: ModelConfig, device_memory: int) -> Estimate:
    """The footprint of a stand-in, which is what its options say."""
    awake = _budget(model, device_memory)[0] or _option(model, "memory") or int(USABLE * device_memory)
    starting = max(awake, _option(model, "memory_starting"))
    asleep = _option(model, "memory_asleep") if model.memory_asleep is None else model.memory_asleep
    weights = (_option(model, "weights") or awake // 2) * model.all_devices
    host = weights if model.host_memory is None else model.host_memory
    footprint = Footprint(starting, awake, min(asleep, awake), host, Source.CONFIGURED)
    return Estimate(footprint, weights, 0, 0, f"{size(awake)}: as a stand-in is configured")


def _option(model: ModelConfig, name: str) -> int:
    """The bytes of an option, 0 if there is none. A wrong one is refused where it is used, not here."""
    try:
        return options.size(model, name) or 0
    except ConfigError:
        return 0


def _known(model: ModelConfig, facts: Facts, device_memory: int, host_memory: int) -> Estimate:
    # 1. Weights and overhead, on each device.
    ranks = model.all_devices
    weights = -(-facts.weights // ranks)
    overhead = _overhead(model, weights, on_cpu=not device_memory) + facts.adapters
    fixed = weights + overhead
    # 2. The cache: what the user's budget leaves, or what is wanted, as far as there is room.
    budget, budget_how = _budget(model, device_memory)
    if budget is not None:
        kv = _kv_left(model, facts, budget, fixed)
    elif device_memory:
        kv = _kv(model, facts, int(USABLE * device_memory) - fixed, f"what {USABLE:g} of the device leaves")
    else:
        kv = _kv(model, facts, host_memory // HOST_SHARE, f"1/{HOST_SHARE} of the host's memory")
    awake = fixed + kv.size if budget is None else budget
    # 3. The arithmetic, for people.
    divided = f" / {ranks} devices" if ranks > 1 else ""
    why = (
        f"weights {size(facts.weights)}{divided} ({facts.how}) + cache {size(kv.size)} ({kv.why}) "
        f"+ overhead {size(overhead)}"
    )
    why = f"{size(awake)} {budget_how}: {why}" if budget else f"{why} = {size(fixed + kv.size)}"
    why += f" ({size(facts.adapters)} of the overhead are for adapters)" if facts.adapters else ""
    footprint = _footprint(model, awake, weights, facts.weights * model.devices_here // ranks)
    notes = (*facts.notes, *kv.notes)
    return Estimate(footprint, facts.weights, kv.per_token, kv.passed, why, notes, context=kv.context)


def _footprint(model: ModelConfig, awake: int, weights: int, host: int) -> Footprint:
    """``weights`` per device; ``host`` is what level 1 puts into host memory."""
    asleep = model.memory_asleep if model.memory_asleep is not None else RESIDUAL + weights // 25
    source = Source.ESTIMATED if _configured_memory(model) is None else Source.CONFIGURED
    kept = model.host_memory if model.host_memory is not None else host
    return Footprint(awake, awake, min(asleep, awake), kept, source)


def _configured_memory(model: ModelConfig) -> float | int | None:
    """The device memory that the user set: a fraction (float), bytes (int) or None."""
    if model.gpu_memory is not None:
        return model.gpu_memory
    if model.when_free and model.when_free.shares:
        return max(model.when_free.shares.values())  # of a device that is all free; the core has the last word
    try:
        share = float(argument(model, "gpu-memory-utilization"))
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def _budget(model: ModelConfig, device_memory: int) -> tuple[int | None, str]:
    """Bytes per device that the user set, and how; None where vllmd is to choose, or for a fraction of no device."""
    given = _configured_memory(model)
    if given is None or (isinstance(given, float) and not device_memory):
        return None, ""
    if isinstance(given, float):
        return int(given * device_memory), f"{given:g} of {size(device_memory)} as configured"
    return given, "as configured"


def _overhead(model: ModelConfig, weights: int, *, on_cpu: bool) -> int:
    """Bytes per device beside weights and cache (rule 3)."""
    if model.engine in llama_memory.KINDS:
        return llama_memory.overhead(weights, on_cpu=llama_memory.runs_on_cpu(model))
    if on_cpu and model.engine == "vllm" and not vllm_cpu.has_accelerator():
        return vllm_cpu.OVERHEAD
    total = CONTEXT + WORKING + weights * 6 // 100
    if argument(model, "enforce-eager") == "true":
        total -= EAGER_SAVES
    if model.tensor_parallel_size > 1:
        total += NCCL
    return min(total, MAX_OVERHEAD)


@frozen
class _Kv:
    """The cache: bytes per device, why, bytes per token of the whole model, bytes passed to the engine (0: none)."""

    size: int
    why: str
    per_token: int
    passed: int
    notes: tuple[str, ...] = ()
    context: int = 0


def _kv(model: ModelConfig, facts: Facts, room: int, what: str) -> _Kv:
    """By rule 2; ``room``: bytes per device that are left for it (0 or less: unknown, or too little in any case).

    An engine that can use a shorter context gets one where the longest does not fit and the user did not ask for it:
    llama.cpp is given the length, vLLM on a CPU finds it out. ``what`` describes ``room``.
    """
    per_token = _per_token(model, facts)
    given, why = _configured_cache(model)
    if given is not None:
        return _Kv(given, why, per_token, given)
    length = _length(model, facts.cache)
    requests = min(REQUESTS, whole(argument(model, "max-num-seqs")) or REQUESTS)
    tokens = max(length, requests * min(length, REQUEST_TOKENS))
    if model.engine in llama_memory.KINDS:
        requests = llama_memory.slots(model)
        tokens = length * requests
    wanted, least = _kv_size(model, facts, tokens, requests), _kv_size(model, facts, length, 1)
    if not wanted:
        return _Kv(0, "it keeps none", 0, 0)
    if wanted > room > 0 and (room >= least or _may_be_shorter(model)):
        context = 0
        if model.engine in llama_memory.KINDS:
            context = max(llama_memory.SHORTEST, tokens * room // wanted // 256 * 256)
            room = _kv_size(model, facts, context, requests)
        return _Kv(room, f"{what}; {size(wanted)} wanted", per_token, room, context=context)
    about = "" if facts.cache else "about "
    return _Kv(wanted, f"{tokens} tokens of {about}{size(per_token)}", per_token, wanted)


def _may_be_shorter(model: ModelConfig) -> bool:
    """Whether its context may be shorter than the model's own longest one."""
    if _configured_length(model):
        return False
    return model.engine in llama_memory.KINDS or (model.engine == "vllm" and not vllm_cpu.has_accelerator())


def _kv_left(model: ModelConfig, facts: Facts, budget: int, fixed: int) -> _Kv:
    """What a configured budget leaves. Of a fraction the engine works that out itself, so nothing is passed to it."""
    per_token = _per_token(model, facts)
    given, why = _configured_cache(model)
    if given is not None:
        return _Kv(given, why, per_token, given)
    left = budget - fixed
    least = _kv_size(model, facts, _length(model, facts.cache), 1)
    notes: tuple[str, ...] = ()
    if left < least:
        need = f"{size(fixed)} for weights and overhead and {size(least)} for one request of the longest length"
        says = "when_free.shares" if model.gpu_memory is None and model.when_free else "gpu_memory"
        notes = (f"{says} gives {size(budget)}, but it needs about {need}",)
    passed = max(0, left) if isinstance(_configured_memory(model), int) and least else 0
    return _Kv(max(0, left), "what is left", per_token, passed, notes)


def _configured_cache(model: ModelConfig) -> tuple[int | None, str]:
    """Bytes that the user set for the cache, if so."""
    given = _option(model, "kv_cache_memory") or whole(argument(model, "kv-cache-memory-bytes", "kv-cache-memory"))
    return given or None, "as configured"


def _kv_size(model: ModelConfig, facts: Facts, tokens: int, requests: int) -> int:
    """Bytes per device for so many tokens of so many requests."""
    cache = facts.cache
    if cache is None:
        return -(-tokens * _per_token(model, facts) // model.all_devices)
    length = _length(model, cache)
    windowed = cache.windowed * min(tokens, requests * min(cache.window, length))
    layer = cache.layer_token(_kv_width(model), model.tensor_parallel_size)
    return -(-layer * (cache.growing * tokens + windowed) // model.pipeline_parallel_size)


def _per_token(model: ModelConfig, facts: Facts) -> int:
    """Bytes of one more token in the whole model: in its growing layers, or in all if each has a window."""
    if facts.cache is None:
        return _guessed_per_token(facts.weights) * _kv_width(model) // 2
    return facts.cache.layer_token(_kv_width(model)) * (facts.cache.growing or facts.cache.windowed)


def _guessed_per_token(weights: int) -> int:
    """Bytes per token of a 16-bit cache, by the model's size: 96 KiB + 3 KiB per GB, as Qwen3 and Llama 3 have it."""
    return (96 << 10) + (3 << 10) * (weights // 2_000_000_000)


def _length(model: ModelConfig, cache: Architecture | None) -> int:
    return _configured_length(model) or (cache.length if cache else 0) or DEFAULT_LENGTH


def _configured_length(model: ModelConfig) -> int:
    """Tokens that the user asked for, 0 if none."""
    return model.max_model_len or whole(argument(model, "max-model-len", "ctx-size", "c", "context-length"))


def _kv_width(model: ModelConfig) -> int:
    """Bytes of a value in the cache."""
    dtype = argument(model, "kv-cache-dtype", "cache-type-k", "ctk")
    if "8" in dtype:
        return 1
    return 4 if dtype in ("", "auto") and is_wide(model) else 2
