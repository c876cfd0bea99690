"""The key-value cache of a model by its ``config.json``: layers, heads, windows, latents.

KV bytes of a token in a layer: 2 · kv_heads · head_dim · width, or for
multi-head latent attention (DeepSeek) (kv_lora_rank + qk_rope_head_dim) · width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllmd.foreign import quoted
from vllmd.frozen import frozen

Raw = Mapping[str, Any]

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_head_kv", "kv_n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "n_ctx")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "text_model", "decoder")
_ENCODERS = ("bert", "roberta", "electra", "mpnet", "deberta", "nomic", "gte", "new", "clip", "siglip", "vit")
_NO_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv6", "rwkv7")
_SLIDING_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
_OWN_ROPE = ("su", "longrope", "llama3", "mrope", "default", "proportional")  # these do not stretch the length


class UnknownArchitecture(ValueError):
    """The configuration does not say what is needed, or says something impossible; the message tells what."""


@frozen
class Architecture:
    """A model's cache. ``growing`` layers keep every token, ``windowed`` ones the last ``window`` tokens.

    ``heads`` and ``head_dim`` are of keys and values; ``latent`` values per token and layer instead, if not 0.
    ``length``: tokens of its longest context, 0 if not told. ``dtype``: as config.json has it, "" if not told.
    ``quantised``: the method of an already quantised model, else "".
    """

    growing: int
    windowed: int = 0
    window: int = 0
    heads: int = 0
    head_dim: int = 0
    latent: int = 0
    length: int = 0
    dtype: str = ""
    quantised: str = ""

    def layer_token(self, width: int, ranks: int = 1) -> int:
        """Bytes of one token in one layer on each of ``ranks`` tensor-parallel devices; ``width`` bytes a value.

        Heads are divided, at least one to each; a latent is kept whole by everyone.
        """
        return self.latent * width if self.latent else 2 * -(-self.heads // ranks) * self.head_dim * width

    def note(self) -> str:
        """What is special about the cache; "" if nothing."""
        if self.windowed:
            return f"{self.windowed} of {self.windowed + self.growing} attention layers keep only {self.window} tokens"
        return ""


def architecture(config: Raw) -> Architecture:
    """What ``config`` (the object in config.json) says. Raises Odd."""
    text = _text_part(config)
    kind = str(text.get("model_type") or config.get("model_type") or "")
    layers = _number(text, *_LAYERS)
    if layers is None:
        raise UnknownArchitecture("config.json does not tell the number of layers")
    growing, windowed, window = _split(text, kind, layers)
    cache = Architecture(
        growing, windowed, window, length=_length(text), dtype=_dtype(config, text), quantised=_method(config, text)
    )
    if growing + windowed == 0 or _is_encoder(config, kind):
        return replace(cache, growing=0, windowed=0)
    rank = _number(text, "kv_lora_rank")
    if rank is not None:
        return replace(cache, latent=rank + (_number(text, "qk_rope_head_dim") or 0))
    heads, head_dim = _heads(text)
    return replace(cache, heads=heads, head_dim=head_dim)


def _text_part(config: Raw) -> Raw:
    """The language model's part of a multimodal model's configuration."""
    for name in _NESTED:
        nested = config.get(name)
        if isinstance(nested, dict) and (any(key in nested for key in (*_LAYERS, *_NESTED))):
            return _text_part(nested)
    return config


def _heads(text: Raw) -> tuple[int, int]:
    attention = text.get("attn_config")
    nested: Raw = attention if isinstance(attention, dict) else {}
    heads = _number(text, *_HEADS)
    kv_heads = _number(text, *_KV_HEADS) or _number(nested, *_KV_HEADS) or heads
    if text.get("multi_query") is True and not _number(text, *_KV_HEADS):
        kv_heads = 1
    hidden = _number(text, *_HIDDEN)
    head_dim = _number(text, *_HEAD_DIM) or (hidden // heads if hidden and heads else None)
    if not kv_heads or not head_dim:
        raise UnknownArchitecture("config.json does not tell the heads of its attention")
    return kv_heads, head_dim


def _split(text: Raw, kind: str, layers: int) -> tuple[int, int, int]:
    """Layers whose cache grows, layers with a window, and the window in tokens."""
    window = _number(text, "sliding_window", "attention_chunk_size") or 0
    listed = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(listed, list) and listed:
        names = [str(name) for name in listed]
        windowed = sum("sliding" in name or "chunked" in name for name in names)
        growing = sum(name in ("full_attention", "attention", "global", "hybrid") for name in names)
        return (growing, windowed, window) if window else (growing + windowed, 0, 0)
    growing = _attention_layers(text, kind, layers)
    if not window or text.get("use_sliding_window") is False:
        return growing, 0, 0
    full = _full_among(text, kind, growing)
    return full, growing - full, window


def _attention_layers(text: Raw, kind: str, layers: int) -> int:
    """Layers with attention: hybrids have others, too, whose state does not grow with the tokens."""
    if kind in _NO_ATTENTION:
        return 0
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return pattern.count("*")
    indices = text.get("attn_layer_indices")
    if isinstance(indices, list):
        return min(len(indices), layers)
    period = _number(text, "attn_layer_period", "full_attention_interval")
    return -(-layers // period) if period and "attn_layer_period" in text else layers // (period or 1)


def _full_among(text: Raw, kind: str, layers: int) -> int:
    """Layers without a window in a model that has one."""
    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:  # such as LLLG: three local layers, one global
        return layers * pattern.count("G") // len(pattern)
    every = _number(text, "sliding_window_pattern", "_sliding_window_pattern") or _SLIDING_EVERY.get(kind)
    if every:
        return layers // every
    if "attention_chunk_size" in text:
        return layers // (_number(text, "no_rope_layer_interval") or 4)
    return min(layers, _number(text, "max_window_layers") or 0) if "max_window_layers" in text else 0


def _length(text: Raw) -> int:
    """Tokens of the longest context that vLLM derives, rotary scaling included."""
    length = _number(text, *_LENGTH) or 0
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, dict):
        return length
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    factor = scaling.get("factor")
    if kind in _OWN_ROPE or isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= 1000:
        return length
    if kind == "yarn":
        length = _number(scaling, "original_max_position_embeddings") or length
    return int(length * factor)


def _is_encoder(config: Raw, kind: str) -> bool:
    """A model that reads a text once and keeps nothing: no cache."""
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    writes = any("CausalLM" in name or "Generation" in name for name in names)
    words = kind.replace("-", "_").split("_")
    return not writes and any(word.endswith(_ENCODERS) for word in words)


def _dtype(config: Raw, text: Raw) -> str:
    for part in (text, config):
        value = part.get("dtype") or part.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return ""


def _method(config: Raw, text: Raw) -> str:
    for part in (config, text):
        value = part.get("quantization_config") or part.get("compression_config")
        if isinstance(value, dict):
            method = value.get("quant_method") or value.get("quant_algo")
            return method if isinstance(method, str) and re.fullmatch(r"[\w.-]{1,40}", method) else "quantised"
    return ""


def _number(part: Raw, *names: str) -> int | None:
    """The first of these that is there, as a positive number. Raises Odd for an impossible one."""
    for name in names:
        value = part.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100_000_000:
            raise UnknownArchitecture(f"config.json: {name} is {quoted(value, 40)}, not a number that can be true")
        if value:
            return value
    return None
