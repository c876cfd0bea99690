"""The estimate: exact where the files tell, said where it is guessed, and never an exception.

P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.estimate.files import LLAMA_8B, GiB, cached, gguf, model, safetensors, sparse
from vllmd.config.types import AdapterConfig, ModelConfig
from vllmd.core.types import Device, Footprint, Source, WhenFree
from vllmd.engines.adapters import vllm_flags
from vllmd.engines.estimate import Estimate, estimate, overfull_pins, too_large
from vllmd.engines.facts import argument, whole

MiB = 1 << 20
DEVICE = 80 * GiB
NOWHERE = Path("/no/such/cache")
KV_8B = 131072  # bytes a token: 2 * 32 layers * 8 heads * 128 * 2


def told(path: Path | str, device: int = DEVICE, **settings: Any) -> Estimate:
    return estimate(ModelConfig("m", model=str(path), **settings), NOWHERE, device)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Llama 3 8B in 16 bits: 15 GiB of weights, 128 KiB of cache a token, 8,192 tokens."""
    return model(tmp_path / "llama", LLAMA_8B, BF16=15 * GiB)


# ---- adapters -----------------------------------------------------------------------------------


def peft(folder: Path, rank: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "rank_pattern": {"q_proj": 2 * rank}}))
    safetensors(folder / "adapter_model.safetensors", {"F32": 3 * MiB})
    return folder


def test_vllm_s_adapters_are_thin_matrices_for_every_linear_layer(tmp_path: Path, llama: Path) -> None:
    """Of the highest rank, in vLLM's steps, for as many as it has room for; each device has its part."""
    (llama / "config.json").write_text(json.dumps(LLAMA_8B | {"intermediate_size": 14336}))
    adapters = {"a": AdapterConfig(str(peft(tmp_path / "a", 10))), "b": AdapterConfig(str(peft(tmp_path / "b", 4)))}
    sides = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # inputs and outputs of all layers
    more = 2 * (2 * 32 * sides)  # two slots of rank 32, two bytes a value
    plain, with_them = told(llama), told(llama, adapters=adapters)
    assert with_them.footprint.awake - plain.footprint.awake == more
    assert "of the overhead are for adapters" in with_them.why
    halved = told(llama, adapters=adapters, tensor_parallel_size=2).footprint.awake
    assert halved - told(llama, tensor_parallel_size=2).footprint.awake == more // 2
    flags = vllm_flags(ModelConfig("m", model=str(llama), adapters=adapters), None)
    assert flags == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "32", "--max-cpu-loras", "2"]
    late = ModelConfig("m", model=str(llama), runtime_adapters=True)
    assert vllm_flags(late, None) == [
        "--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--max-cpu-loras", "4"
    ]  # fmt: skip
    few = replace(late, extra_args=("--max-cpu-loras", "2"))  # vLLM refuses to have room for more than it keeps
    assert vllm_flags(few, None) == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"]


def test_llama_cpp_s_adapters_are_their_files(tmp_path: Path) -> None:
    """Loaded at the start, all of them."""
    file = gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, 100 * MiB)
    one = sparse(tmp_path / "lora.gguf", 7 * MiB)
    plain = told(file, engine="llama.cpp")
    assert told(file, engine="llama.cpp", adapters={"a": AdapterConfig(str(one))}).weights == plain.weights
    more = told(file, engine="llama.cpp", adapters={"a": AdapterConfig(str(one))}).footprint.awake
    assert more - plain.footprint.awake == 7 * MiB


def test_an_adapter_s_files_are_data(tmp_path: Path, llama: Path) -> None:
    """A pipe, a missing folder or nonsense is a note, and costs no time."""
    odd = tmp_path / "odd"
    odd.mkdir()
    os.mkfifo(odd / "adapter_config.json")
    adapters = {
        "odd": AdapterConfig(str(odd)),
        "gone": AdapterConfig("/no/such/folder"),
        "later": AdapterConfig("org/x"),
    }
    found = told(llama, adapters=adapters)
    assert [note.partition(": ")[0] for note in found.notes] == ["its adapter odd", "its adapter gone"]
    assert "no regular file" in found.notes[0]


# ---- the rules --------------------------------------------------------------------------------


def test_auto_is_weights_cache_and_overhead(llama: Path) -> None:
    """Weights 15 GiB, 16 requests of 2,048 tokens, 1.5 GiB + 6 % of the weights."""
    found = told(llama)
    overhead = 3 * GiB // 2 + 15 * GiB * 6 // 100
    assert found.weights == 15 * GiB
    assert found.kv_per_token == KV_8B
    assert found.kv_cache == 32768 * KV_8B == 4 * GiB
    assert found.footprint.awake == found.footprint.starting == 19 * GiB + overhead
    assert found.footprint.source is Source.ESTIMATED
    assert found.notes == ()


def test_a_name_that_is_no_models_is_not_looked_for() -> None:
    """A container's model is in its command: that the cache lacks its name is nothing odd. Of vLLM's it is."""
    notes = {kind: estimate(ModelConfig("boxed", engine=kind), NOWHERE, DEVICE).notes for kind in ("command", "vllm")}
    assert notes == {"command": (), "vllm": ("boxed is not in the cache /no/such/cache",)}


def test_the_arithmetic_is_readable(llama: Path) -> None:
    """It is shown when a model is refused, so it must add up for a reader."""
    assert told(llama).why == (
        "weights 15 GiB (headers of 1 safetensors files) + cache 4 GiB (32768 tokens of 128 KiB) "
        "+ overhead 2.4 GiB = 21.4 GiB"
    )


def test_asleep_it_keeps_a_residual_and_its_weights_in_host_memory(llama: Path) -> None:
    """0.9 GiB + 4 % of the weights; all weights on the host at level 1."""
    footprint = told(llama).footprint
    assert footprint.asleep == int(0.9 * GiB) + 15 * GiB // 25
    assert footprint.host == 15 * GiB


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 32768),
        ({"max_model_len": 65536}, 65536),
        ({"max_model_len": 1024}, 16 * 1024),
        ({"extra_args": ("--max-model-len", "64k")}, 64000),
        ({"extra_args": ("--max-num-seqs=2",)}, 8192),
        ({"max_model_len": 1024, "extra_args": ("--max-num-seqs", "4")}, 4096),
    ],
)
def test_the_cache_holds_one_longest_or_sixteen_short_requests(
    llama: Path, settings: dict[str, Any], tokens: int
) -> None:
    """vLLM refuses to start with less than one longest request's cache; more than one request is what it is for."""
    assert told(llama, **settings).kv_cache == tokens * KV_8B


@pytest.mark.parametrize(("dtype", "per_token"), [("fp8", KV_8B // 2), ("fp8_e5m2", KV_8B // 2), ("auto", KV_8B)])
def test_the_caches_type_counts(llama: Path, dtype: str, per_token: int) -> None:
    """An 8-bit cache is half as large."""
    assert told(llama, extra_args=("--kv-cache-dtype", dtype)).kv_per_token == per_token


def test_a_guess_shrinks_to_its_device_if_one_request_still_fits(llama: Path) -> None:
    """A 24 GiB card runs an 8B model with less cache than we would like: that must not be refused."""
    found = told(llama, device=22 * GiB)
    assert found.footprint.awake <= 0.9 * 22 * GiB
    assert GiB <= found.kv_cache < 4 * GiB
    assert "what 0.9 of the device leaves; 4 GiB wanted" in found.why
    assert told(llama, device=16 * GiB).kv_cache == 4 * GiB  # hopeless: the refusal shows what it would take


def test_tensor_parallel_divides(llama: Path) -> None:
    """Weights and heads by two, and NCCL on top."""
    found = told(llama, tensor_parallel_size=2)
    assert found.kv_cache == 2 * GiB
    assert found.footprint.awake == int(7.5 * GiB) + 2 * GiB + 2 * GiB + 15 * GiB // 2 * 6 // 100
    assert (found.weights, found.footprint.host) == (15 * GiB, 15 * GiB)


def test_devices_elsewhere_take_their_share_of_the_weights_along(llama: Path) -> None:
    """Per device it is the same; the host memory of level 1 is each machine's own."""
    here, alone = told(llama, tensor_parallel_size=2, local_devices=1), told(llama, tensor_parallel_size=2)
    assert (here.footprint.awake, here.weights) == (alone.footprint.awake, alone.weights)
    assert here.footprint.host == alone.footprint.host // 2


def test_pipeline_parallel_divides_layers(llama: Path) -> None:
    """Each stage keeps its own layers' cache."""
    assert told(llama, pipeline_parallel_size=4).kv_cache == GiB


def test_eager_saves_the_graphs(llama: Path) -> None:
    """No CUDA graphs, half a gibibyte less."""
    assert told(llama).footprint.awake - told(llama, extra_args=("--enforce-eager",)).footprint.awake == GiB // 2


def test_overhead_is_bounded(tmp_path: Path) -> None:
    """70 GiB of weights do not make 6 % of overhead more."""
    path = model(tmp_path, LLAMA_8B, BF16=60 * GiB)
    assert "+ overhead 4 GiB" in told(path).why


def test_windowed_layers_cost_their_window_only(tmp_path: Path) -> None:
    """Half the layers with a window of 1,024 at 131,072 tokens: hardly more than half the cache."""
    config = LLAMA_8B | {"max_position_embeddings": 131072, "sliding_window": 1024, "model_type": "gemma2"}
    found = told(model(tmp_path, config, BF16=15 * GiB))
    assert found.kv_cache == 16 * 4096 * (131072 + 16 * 1024)
    assert found.notes == ("16 of 32 attention layers keep only 1024 tokens",)


def test_an_encoder_keeps_no_cache(tmp_path: Path) -> None:
    """An embedding model is its weights and the overhead."""
    config = LLAMA_8B | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}
    found = told(model(tmp_path, config, F16=GiB))
    assert (found.kv_cache, found.kv_per_token) == (0, 0)
    assert found.footprint.awake == GiB + 3 * GiB // 2 + GiB * 6 // 100


# ---- types and quantisation -------------------------------------------------------------------


def test_wide_floats_are_loaded_narrow(tmp_path: Path) -> None:
    """vLLM loads 32-bit checkpoints as 16-bit unless told otherwise."""
    path = model(tmp_path, LLAMA_8B, F32=30 * GiB)
    assert told(path).weights == 15 * GiB
    assert "30 GiB stored, loaded at 2 bytes a value" in told(path).why
    assert told(path, dtype="float32").weights == 30 * GiB
    assert told(path, dtype="float32").kv_per_token == 2 * KV_8B


def test_quantised_weights_are_taken_as_stored(tmp_path: Path) -> None:
    """Packed integers with 32-bit scales: nothing of it changes when loaded."""
    config = LLAMA_8B | {"quantization_config": {"quant_method": "awq"}}
    found = told(model(tmp_path, config, I32=4 * GiB, F32=GiB))
    assert found.weights == 5 * GiB
    assert "awq" in found.why


def test_quantisation_on_loading_narrows(llama: Path) -> None:
    """``--quantization fp8`` on a 16-bit checkpoint: one byte a value."""
    assert told(llama, extra_args=("--quantization", "fp8")).weights == 15 * GiB // 2


def test_pytorch_files_have_the_configurations_type(tmp_path: Path) -> None:
    """A .bin does not tell its type without being loaded, config.json does."""
    model(tmp_path, LLAMA_8B | {"torch_dtype": "float32"})
    sparse(tmp_path / "pytorch_model.bin", 4 * GiB)
    assert told(tmp_path).weights == 2 * GiB


def test_a_gguf_file_tells_all(tmp_path: Path) -> None:
    """Weights by its size, the cache by its head."""
    figures = {"llama.block_count": 32, "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}
    head = {"general.architecture": "llama", **figures, "llama.embedding_length": 4096, "llama.context_length": 8192}
    path = gguf(tmp_path / "m.gguf", head, 5 * GiB)
    found = told(path)
    assert (found.weights, found.kv_per_token, found.kv_cache, found.notes) == (5 * GiB, KV_8B, 4 * GiB, ())


# ---- what the user says -----------------------------------------------------------------------


def test_a_fraction_has_vllms_meaning(llama: Path) -> None:
    """Of the whole device, all in all; the engine sizes its cache itself, as the user asked it to."""
    found = told(llama, gpu_memory=0.35)
    assert found.footprint.awake == found.footprint.starting == 28 * GiB
    assert (found.footprint.source, found.kv_cache) == (Source.CONFIGURED, 0)
    assert found.why.startswith("28 GiB 0.35 of 80 GiB as configured: weights 15 GiB")


def test_the_share_of_a_free_device_is_a_fraction_too(llama: Path) -> None:
    """The most that it may be started with; what is free at that moment decides."""
    found = told(llama, when_free=WhenFree())
    assert (found.footprint.awake, found.kv_cache) == (64 * GiB, 0)
    assert told(llama, when_free=WhenFree(shares={})).footprint == told(llama).footprint
    (note,) = told(llama, when_free=WhenFree(shares={0.9: 0.1})).notes
    assert note.startswith("when_free.shares gives 8 GiB, but it needs about")


def test_the_engines_own_flag_is_a_fraction_too(llama: Path) -> None:
    """Otherwise the ledger would promise one figure and the engine take another."""
    assert told(llama, extra_args=("--gpu-memory-utilization", "0.5")).footprint.awake == 40 * GiB


def test_bytes_leave_the_rest_to_the_cache(llama: Path) -> None:
    """20 GiB less weights and overhead."""
    found = told(llama, gpu_memory=20 * GiB)
    assert (found.footprint.awake, found.footprint.source) == (20 * GiB, Source.CONFIGURED)
    assert found.kv_cache == 20 * GiB - 15 * GiB - 3 * GiB // 2 - 15 * GiB * 6 // 100


@pytest.mark.parametrize("asked", [16 * GiB, 0.2, 1])
def test_too_little_is_said_with_the_arithmetic(llama: Path, asked: float | int) -> None:
    """The engine would fail after minutes of loading; the note says it now."""
    found = told(llama, gpu_memory=asked)
    assert "2.4 GiB" not in found.notes[0]
    assert "it needs about 17.4 GiB for weights and overhead and 1 GiB for one request" in found.notes[0]
    assert found.kv_cache == 0


@pytest.mark.parametrize(
    "settings",
    [{"options": {"kv_cache_memory": "8GiB"}}, {"extra_args": ("--kv-cache-memory-bytes", str(8 * GiB))}],
)
def test_a_cache_that_the_user_sized_is_that_size(llama: Path, settings: dict[str, Any]) -> None:
    """In the engine kind's option or its own flag."""
    assert told(llama, **settings).kv_cache == 8 * GiB


def test_sleeping_figures_can_be_set(llama: Path) -> None:
    """Until they are measured, the operator may know better."""
    footprint = told(llama, memory_asleep=3 * GiB, host_memory=7 * GiB).footprint
    assert (footprint.asleep, footprint.host) == (3 * GiB, 7 * GiB)


# ---- without files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("fp16", 14e9), ("bf16", 14e9), (None, 14e9), ("fp32", 28e9), ("fp8", 7e9), ("int8", 7e9), ("int4", 4.2e9)],
)
def test_param_count_and_precision_make_the_weights(precision: str | None, weights: float) -> None:
    """P's configuration: 7 billion parameters at a precision."""
    assert told("org/x", param_count=7.0, precision=precision).weights == round(weights)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("Qwen/Qwen3-0.6B", 1.2e9),
        ("org/gemma-270m", 0.54e9),
        ("meta-llama/Llama-3.1-70B-Instruct", 140e9),
        ("Qwen/Qwen3-30B-A3B", 60e9),
        ("org/Llama-3-8B-AWQ", 4.8e9),
        ("org/Llama-3-8B-FP8", 8e9),
        ("org/Llama-3-8B-w4a16", 4.8e9),
        ("org/Mixtral-8x7B-v0.1", 8 * 7e9 * 5 / 6 * 2),
    ],
)
def test_a_size_in_the_name_is_better_than_nothing(name: str, weights: float) -> None:
    """And it is said that it is only that."""
    found = told(name)
    assert found.weights == pytest.approx(weights)
    assert "its size is only guessed from its name" in found.notes


@pytest.mark.parametrize("name", ["BAAI/bge-m3", "org/model-v2", "org/b200-tuned", "org/7bins"])
def test_other_numbers_are_no_sizes(name: str) -> None:
    """A version is not a size: then nothing is known, and the device is given whole."""
    found = told(name)
    assert found.weights == 0
    assert found.footprint.awake == found.footprint.host == int(0.9 * DEVICE)
    assert "set gpu_memory or param_count" in found.why


def test_an_unknown_model_takes_what_was_configured() -> None:
    """Engines of other kinds have no files that we read; their figures are the operator's."""
    footprint = told("what", gpu_memory=20 * GiB, host_memory=9 * GiB).footprint
    assert (footprint.awake, footprint.host, footprint.source) == (20 * GiB, 9 * GiB, Source.CONFIGURED)


def test_a_remote_engine_takes_nothing() -> None:
    """Its memory is another machine's."""
    assert told("org/Llama-70B", engine="remote").footprint == Footprint(0, 0)


def test_a_stand_in_takes_what_its_options_say() -> None:
    """Rehearsals are exact."""
    options = {"memory": "20GiB", "memory_starting": "22GiB", "memory_asleep": "1GiB", "weights": "15GiB"}
    found = told("x", engine="sim", options=options)
    assert found.footprint == Footprint(22 * GiB, 20 * GiB, GiB, 15 * GiB, Source.CONFIGURED)
    assert told("x", engine="sim", gpu_memory=8 * GiB).footprint == Footprint(
        8 * GiB, 8 * GiB, 0, 4 * GiB, Source.CONFIGURED
    )


def test_without_any_device_the_files_still_count(llama: Path) -> None:
    """A CPU-only machine: fractions of no device are left out."""
    there = told(llama, engine="sglang")
    nowhere = told(llama, engine="sglang", device=0, gpu_memory=0.5)
    assert there.footprint.awake == nowhere.footprint.awake


def test_the_cache_of_models_is_read(tmp_path: Path) -> None:
    """A repository id means its snapshot; ``--revision`` another one."""
    model(cached(tmp_path, "org/m", "new"), LLAMA_8B, BF16=4 * GiB)
    model(cached(tmp_path, "org/m", "old", ref="v1"), LLAMA_8B, BF16=2 * GiB)
    config = ModelConfig("chat", model="org/m")
    assert (
        estimate(config, tmp_path, DEVICE).weights == 2 * GiB or estimate(config, tmp_path, DEVICE).weights == 4 * GiB
    )
    assert estimate(replace(config, extra_args=("--revision", "v1")), tmp_path, DEVICE).weights == 2 * GiB


# ---- bad input --------------------------------------------------------------------------------


def test_a_broken_configuration_leaves_the_weights(tmp_path: Path) -> None:
    """The cache is then guessed, and it is said why."""
    path = model(tmp_path, None, BF16=16_000_000_000)
    (path / "config.json").write_text("{")
    found = told(path)
    assert found.weights == 16_000_000_000
    assert found.kv_per_token == (96 + 3 * 8) << 10
    assert "config.json is not JSON" in found.notes[0]


def test_an_unreadable_folder_falls_back_on_the_name(tmp_path: Path) -> None:
    """As when the engine's user owns the cache and the daemon may not look."""
    (tmp_path / "Llama-8B").symlink_to(tmp_path / "Llama-8B")  # a loop fails for root, too
    found = told(tmp_path / "Llama-8B")
    assert found.weights == 16_000_000_000


def test_weights_without_end_are_not_believed(tmp_path: Path) -> None:
    """Headers that promise 96 TiB: the sum decides, not each file."""
    path = model(tmp_path / "m", LLAMA_8B)
    for number in range(3):
        safetensors(path / f"{number}.safetensors", {"BF16": 1 << 45}, missing=1 << 45)
    found = told(path)
    assert found.weights == 0
    assert any("cannot be true" in note for note in found.notes)


ODD: list[Any] = [None, True, -1, 0, 3, 10**30, 1.5, float("nan"), "", "x", [], [1, "x"], {}, {"x": 1}]
ODD += [{"rope_type": "yarn", "factor": odd} for odd in ODD] + [LLAMA_8B | {"num_hidden_layers": odd} for odd in ODD]
KEYS = st.sampled_from([
    *LLAMA_8B, "text_config", "rope_scaling", "quantization_config", "sliding_window", "layer_types", "kv_lora_rank",
    "dtype", "attn_config", "hybrid_override_pattern", "attn_layer_indices", "sliding_window_pattern", "head_dim",
])  # fmt: skip


@given(st.dictionaries(KEYS, st.sampled_from(ODD), max_size=6))
def test_no_configuration_makes_it_raise(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    """config.json is others' input; whatever is in it, the daemon starts."""
    path = tmp_path_factory.mktemp("odd")
    sparse(path / "model.safetensors", MiB)
    (path / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    found = told(path)
    assert found.weights == MiB
    assert found.footprint.awake >= MiB


# ---- fitting ----------------------------------------------------------------------------------


TWO = (Device(0, "a", 24 * GiB, GiB), Device(1, "b", 24 * GiB, GiB))


def test_a_model_larger_than_the_machine_is_refused_with_the_arithmetic(llama: Path) -> None:
    """At check time, by the same words as at request time."""
    big = ModelConfig("big", model=str(llama), gpu_memory=30 * GiB)
    why = too_large(big, estimate(big, NOWHERE, 24 * GiB), TWO)
    assert why.startswith("big needs 30 GiB on 1 device (30 GiB as configured: weights 15 GiB")
    assert why.endswith("; devices 0, 1 have 24 GiB less a reserve of 1 GiB: 23 GiB each")


def test_what_fits_is_not_refused(llama: Path) -> None:
    """Nor what will run on a CPU, for want of any device."""
    fits = ModelConfig("fits", model=str(llama), gpu_memory=20 * GiB)
    assert too_large(fits, estimate(fits, NOWHERE, 24 * GiB), TWO) == ""
    assert too_large(fits, estimate(fits, NOWHERE, 0), ()) == ""


def test_more_devices_than_there_are_is_refused(llama: Path) -> None:
    """Or than the model may use."""
    wide = ModelConfig("wide", model=str(llama), tensor_parallel_size=2, devices=(1,))
    why = too_large(wide, estimate(wide, NOWHERE, 24 * GiB), TWO)
    assert why == "wide needs 2 devices, and there is 1 for it"


def test_a_pinned_set_that_fills_the_devices_is_said(llama: Path) -> None:
    """Pinned models are never evicted: nothing else could ever be loaded."""
    pins = [(ModelConfig(name, gpu_memory=22 * GiB), told("x", gpu_memory=22 * GiB)) for name in ("a", "b")]
    assert overfull_pins(pins[:1], TWO) == ""
    assert overfull_pins(pins, TWO).startswith(
        "the pinned models fill the devices: a 22 GiB + b 22 GiB = 44 GiB of 46 GiB"
    )


# ---- reading flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (("--max-num-seqs", "4"), "4"),
        (("--max_num_seqs=4",), "4"),
        (("--other", "--max-num-seqs", "4"), "4"),
        (("--max-num-seqs",), "true"),
        (("--max-num-seqs", "--other"), "true"),
        (("max-num-seqs", "4"), ""),
        ((), ""),
    ],
)
def test_flags_are_read_as_vllm_reads_them(args: tuple[str, ...], value: str) -> None:
    """Underscores are dashes, ``=`` is a space."""
    assert argument(ModelConfig("m", extra_args=args), "max-num-seqs") == value


@pytest.mark.parametrize(
    ("text", "number"), [("8192", 8192), ("8k", 8000), ("8K", 8192), ("2G", 2 * GiB), ("-1", 0), ("x", 0)]
)
def test_numbers_are_read_as_vllm_reads_them(text: str, number: int) -> None:
    """Small letters are decimal, capitals binary."""
    assert whole(text) == number


def test_llama_cpp_gets_the_context_that_fits(tmp_path: Path) -> None:
    """Its own longest is often larger than any device; what somebody asked for is not cut."""
    head: dict[str, str | int | list[str]] = {
        "general.architecture": "llama", "llama.block_count": 32, "llama.context_length": 131072,
        "llama.embedding_length": 4096, "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8,
    }  # fmt: skip
    file = gguf(tmp_path / "a-Q8_0.gguf", head, 8 * GiB)
    card = 16 * GiB
    found = told(file, card, engine="llama.cpp")
    assert 0 < found.context < 131072
    assert found.context % 256 == 0
    assert found.kv_cache == found.context * found.kv_per_token
    assert found.footprint.awake <= 0.9 * card
    assert told(file, 80 * GiB, engine="llama.cpp").context == 0
    asked = told(file, card, engine="llama.cpp", max_model_len=131072)
    assert (asked.context, asked.kv_cache) == (0, 131072 * found.kv_per_token)
    on_cpu = estimate(ModelConfig("m", engine="llama.cpp", model=str(file)), NOWHERE, 0, 32 * GiB)
    assert on_cpu.kv_cache <= 8 * GiB < on_cpu.kv_cache + 256 * on_cpu.kv_per_token
