"""The cache's size from config.json, for the shapes that published models have."""

from __future__ import annotations

from typing import Any

import pytest

from tests.estimate.files import LLAMA_8B
from vllmd.engines.architecture import Architecture, UnknownArchitecture, architecture


def per_token(config: dict[str, Any], ranks: int = 1) -> int:
    """16-bit bytes of one token in all growing layers."""
    found = architecture(config)
    return found.growing * found.layer_token(2, ranks)


QWEN3_06B = LLAMA_8B | {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
FALCON_7B = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}
CHATGLM3 = {"num_layers": 28, "num_attention_heads": 32, "multi_query_group_num": 2, "kv_channels": 128}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "d_model": 1280,
    "max_target_positions": 448,
}
MPT = {"n_layers": 32, "n_heads": 32, "d_model": 4096, "attn_config": {"kv_n_heads": 8}}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (LLAMA_8B, 2 * 32 * 8 * 128 * 2),
        (QWEN3_06B, 2 * 28 * 8 * 128 * 2),
        (GPT2, 2 * 12 * 12 * 64 * 2),
        (FALCON_7B, 2 * 32 * 1 * 64 * 2),
        (CHATGLM3, 2 * 28 * 2 * 128 * 2),
        (WHISPER, 2 * 32 * 20 * 64 * 2),
        (MPT, 2 * 32 * 8 * 128 * 2),
    ],
)
def test_names_differ_but_the_product_is_the_same(config: dict[str, Any], size: int) -> None:
    """2 · layers · KV heads · head dimension · bytes, whatever the family calls them."""
    assert per_token(config) == size


def test_a_latent_is_one_vector_and_is_not_divided() -> None:
    """DeepSeek-V3 keeps 512 + 64 values a layer, the same on every tensor-parallel rank."""
    deepseek = LLAMA_8B | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert per_token(deepseek) == per_token(deepseek, ranks=8) == 576 * 61 * 2


@pytest.mark.parametrize(("ranks", "share"), [(2, 4), (8, 1), (16, 1), (3, 3)])
def test_heads_are_divided_but_never_below_one(ranks: int, share: int) -> None:
    """With more ranks than KV heads each rank keeps a whole head."""
    assert per_token(LLAMA_8B, ranks) == 2 * 32 * share * 128 * 2


@pytest.mark.parametrize("name", ["text_config", "llm_config", "language_config"])
def test_multimodal_models_nest_their_language_model(name: str) -> None:
    """The vision tower's layers keep no cache."""
    assert (
        architecture({"model_type": "some_vl", "vision_config": {"num_hidden_layers": 24}, name: LLAMA_8B}).growing
        == 32
    )


def test_nesting_may_be_twofold() -> None:
    """Qwen-Omni: thinker_config.text_config."""
    assert architecture({"thinker_config": {"text_config": LLAMA_8B}}).growing == 32


WINDOW = {"sliding_window": 1024}
GEMMA3 = LLAMA_8B | WINDOW | {"model_type": "gemma3_text", "num_hidden_layers": 62}


@pytest.mark.parametrize(
    ("config", "growing", "windowed"),
    [
        (LLAMA_8B | WINDOW, 0, 32),  # Mistral 7B v0.1
        (LLAMA_8B | WINDOW | {"use_sliding_window": False}, 32, 0),  # Qwen2
        (LLAMA_8B | WINDOW | {"max_window_layers": 28}, 28, 4),
        (LLAMA_8B | WINDOW | {"model_type": "gemma2"}, 16, 16),
        (GEMMA3, 10, 52),
        (GEMMA3 | {"sliding_window_pattern": 2}, 31, 31),
        (LLAMA_8B | WINDOW | {"sliding_window_pattern": "LLLG"}, 8, 24),  # EXAONE 4
        (LLAMA_8B | WINDOW | {"layer_types": ["full_attention", "sliding_attention"] * 16}, 16, 16),  # gpt-oss
        (LLAMA_8B | {"attention_chunk_size": 8192}, 8, 24),  # Llama 4
    ],
)
def test_windows_stop_growing(config: dict[str, Any], growing: int, windowed: int) -> None:
    """Counting a windowed layer as a growing one overstates long contexts several times."""
    found = architecture(config)
    assert (found.growing, found.windowed) == (growing, windowed)


def test_a_window_is_said() -> None:
    """The operator sees why the cache is smaller than the formula."""
    assert architecture(GEMMA3).note() == "52 of 62 attention layers keep only 1024 tokens"


@pytest.mark.parametrize(
    ("more", "growing"),
    [
        ({"full_attention_interval": 4}, 8),  # Qwen3-Next
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, 4),  # Jamba
        ({"hybrid_override_pattern": "M-M*-M*-"}, 2),  # Nemotron-H
        ({"attn_layer_indices": [9, 18, 27]}, 3),  # Bamba
        ({"layers_block_type": ["mamba", "mamba", "attention", "hybrid"]}, 2),
        ({"layer_types": ["linear_attention", "full_attention"] * 16}, 16),
        ({"model_type": "mamba"}, 0),
    ],
)
def test_hybrids_keep_a_cache_in_their_attention_layers_only(more: dict[str, Any], growing: int) -> None:
    """A state-space layer's state does not grow with the tokens."""
    assert architecture(LLAMA_8B | more).growing == growing


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "nomic_bert"])
def test_encoders_keep_nothing(kind: str) -> None:
    """bge-m3 and its like read a text once."""
    assert per_token(LLAMA_8B | {"model_type": kind, "architectures": ["SomeModel"]}) == 0


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 8192),
        ({"rope_type": "llama3", "factor": 8.0}, 8192),
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "linear", "factor": "huge"}, 8192),
    ],
)
def test_length_follows_rotary_scaling_as_vllm_does(scaling: object, length: int) -> None:
    """It decides how much cache one longest request needs, without which vLLM does not start."""
    assert architecture(LLAMA_8B | {"rope_scaling": scaling}).length == length


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": None}, "does not tell the number of layers"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads is 'list'"),
        ({"num_attention_heads": None, "num_key_value_heads": None}, "does not tell the heads"),
        ({"hidden_size": True}, "hidden_size is True"),
    ],
)
def test_impossible_figures_are_named(change: dict[str, Any], says: str) -> None:
    """A wrong figure must become a note that names it, not a wrong estimate."""
    with pytest.raises(UnknownArchitecture, match=says):
        architecture(LLAMA_8B | change)


def test_dtype_and_quantisation_are_told() -> None:
    """Both decide what the weights take once loaded."""
    config = LLAMA_8B | {"quantization_config": {"quant_method": "awq"}, "dtype": "torch.float16"}
    assert (architecture(config).dtype, architecture(config).quantised) == ("float16", "awq")
    assert architecture(LLAMA_8B) == Architecture(32, heads=8, head_dim=128, length=8192, dtype="bfloat16")
