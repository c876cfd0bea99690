"""What is known of a model before it has ever run: by its files, else the configuration, else its name."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines.architecture import Architecture, UnknownArchitecture, architecture
from vllmd.engines.checkpoint import MAX_WEIGHTS, Weights, gguf_file, weights_of
from vllmd.engines.gguf import config_of
from vllmd.foreign import Unreadable, within
from vllmd.frozen import frozen
from vllmd.hub import Located, locate, read_json
from vllmd.sizes import GiB
from vllmd.sizes import in_words as size

log = logging.getLogger("vllmd.engines")

READING = 12.0  # seconds for all files of one model, of a file system that may not answer at all

_BITS = {"64": 8.0, "32": 4.0, "16": 2.0, "8": 1.0, "6": 0.85, "5": 0.7, "4": 0.6, "3": 0.5, "2": 0.4}
_FOUR_BIT = ("awq", "gptq", "bitsandbytes", "bnb", "marlin", "gguf")
_WIDE_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "half": "F16", "bfloat16": "BF16"}
# Compiled by ``re`` for the first model of which only the name tells.
_COUNT = r"(?i)(?<![a-z0-9.])(?:(\d{1,2})x)?(\d{1,4}(?:\.\d{1,3})?)(b|m)(?![a-z0-9])"
_PRECISION = r"(?i)awq|gptq|bnb|gguf|(?:nv|mx)?fp[48]|int[48]|[48]-?bit|w[48]a\d+|q[2-8]_"


@frozen
class Facts:
    """What is known of a model before anything is divided or added. ``weights`` 0: nothing.

    ``adapters``: bytes that its LoRA adapters take on each device.
    """

    weights: int = 0
    how: str = ""
    cache: Architecture | None = None
    notes: tuple[str, ...] = ()
    adapters: int = 0


def facts_of(model: ModelConfig, hub: Path) -> Facts:
    """The best source that says anything: the files, the configured count, the name."""
    facts = _from_files(model, hub)
    if not facts.weights:
        known = _from_count(model) or _from_name(model) or Facts()
        facts = replace(known, cache=facts.cache, notes=facts.notes + known.notes)
    return facts


def _from_files(model: ModelConfig, hub: Path) -> Facts:
    """The weights and the cache by the model's files; whatever is wrong with them becomes a note on this one model."""
    try:
        return within(READING, lambda: _read_files(model, hub))
    except OSError as error:
        return Facts(notes=(f"{error.filename or model.source}: {error.strerror}",))
    except Unreadable as error:
        return Facts(notes=(str(error),))
    except Exception as error:  # a defect of ours; the other models must start all the same
        log.exception("%s: its files cannot be made sense of", model.name)
        return Facts(notes=(f"its files cannot be made sense of ({type(error).__name__})",))


def _read_files(model: ModelConfig, hub: Path) -> Facts:
    located = locate(model.source, hub, argument(model, "revision"))
    if located.path is None:
        return Facts(notes=(located.why,))
    weights = weights_of(located.path, located.tag, located.root)
    cache, notes = _cache(located, located.path)
    if not weights.total:
        return Facts(cache=cache, notes=(f"{located.why}: no weights in it", *weights.notes, *notes))
    loaded, how = _as_loaded(model, weights, cache)
    return Facts(loaded, how, cache, (*weights.notes, *notes))


def _cache(located: Located, path: Path) -> tuple[Architecture | None, tuple[str, ...]]:
    try:
        gguf = gguf_file(path, located.tag, located.root)
        file = path / "config.json"
        alone = path.is_dir() and file.exists()
        if alone or gguf is None:
            cache = architecture(read_json(file, located.root))
        else:
            cache = architecture(config_of(gguf, located.root))
    except (Unreadable, UnknownArchitecture) as error:
        return None, (f"{error}; its cache is guessed from its size",)
    except OSError as error:
        return None, (f"{error.filename}: {error.strerror}; its cache is guessed from its size",)
    return cache, ((cache.note(),) if cache.note() else ())


def _as_loaded(model: ModelConfig, weights: Weights, cache: Architecture | None) -> tuple[int, str]:
    """The bytes of the weights once loaded, and their source: floats as wide as they will be, all else as stored."""
    stored = _STORED.get(cache.dtype if cache else "", "")
    if cache and cache.quantised:
        return weights.total, f"{weights.how}, {cache.quantised}"
    width = loaded_width(model)
    loaded = sum(amount * _scale(dtype or stored, width) for dtype, amount in weights.sizes.items())
    if round(loaded) == weights.total:
        return weights.total, weights.how
    return round(loaded), f"{weights.how}, {size(weights.total)} stored, loaded at {width:g} bytes a value"


def _scale(dtype: str, width: float) -> float:
    return width / _WIDE_FLOATS[dtype] if dtype in _WIDE_FLOATS else 1.0


def loaded_width(model: ModelConfig) -> float:
    """Bytes that a float takes once loaded."""
    quantised = argument(model, "quantization", "q")
    if quantised:
        return _width(quantised)
    return 4.0 if is_wide(model) else 2.0


def is_wide(model: ModelConfig) -> bool:
    """Whether the model is configured to compute in 32 bits."""
    return (model.dtype or argument(model, "dtype")) in ("float32", "float")


def _width(precision: str) -> float:
    """Bytes a parameter at a precision such as fp16, int4, w4a16, awq, Q4_K_M; with the scales of small ones."""
    text = precision.lower()
    bits = re.search(r"(?<!\d)(64|32|16|8|6|5|4|3|2)(?!\d)", text.removeprefix("b"))
    if any(name in text for name in _FOUR_BIT) and not bits:
        return _BITS["4"]
    if text == "half":
        return 2.0
    return _BITS[bits[1]] if bits else 2.0


def _from_count(model: ModelConfig) -> Facts | None:
    count = model.param_count
    if count is None or not 0 < count * 1e9 * 4 <= MAX_WEIGHTS:
        return None
    width = _width(model.precision) if model.precision else loaded_width(model)
    return Facts(round(count * 1e9 * width), f"param_count {count:g} billion at {width:g} bytes")


def _from_name(model: ModelConfig) -> Facts | None:
    """From a size in the name; a mixture's ``8x7B`` shares about a sixth of the one between the eight."""
    hit = re.search(_COUNT, model.source.rstrip("/").rpartition("/")[2])
    if hit is None:
        return None
    billions = float(hit[2]) / (1000 if hit[3] in "mM" else 1)
    if hit[1] and int(hit[1]) > 1:
        billions *= int(hit[1]) * 5 / 6
    width = _width(model.precision) if model.precision else _name_width(model)
    how = f"{billions:g} billion parameters by its name at {width:g} bytes"
    return Facts(round(billions * 1e9 * width), how, notes=("its size is only guessed from its name",))


def _name_width(model: ModelConfig) -> float:
    """From words in the name such as AWQ, FP8 or Int4."""
    hit = re.search(_PRECISION, model.source)
    return _width(hit[0]) if hit else loaded_width(model)


def argument(model: ModelConfig, *names: str) -> str:
    """The value that ``extra_args`` give one of these flags, named without dashes.

    "" if none of them is there, ``true`` if it has no value.
    """
    args = model.extra_args
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if not arg.startswith("-") or name.lstrip("-").replace("_", "-") not in names:
            continue
        if equals:
            return value
        following = args[at + 1] if at + 1 < len(args) else "-"
        return "true" if following.startswith("-") else following
    return ""


def whole(text: str) -> int:
    """A positive number as vLLM's flags take it (``8192``, ``8k``, ``8K``); 0 for anything else."""
    hit = re.fullmatch(r"(\d{1,15})([kKmMgG]?)", text.strip())
    if hit is None:
        return 0
    return int(hit[1]) * {"": 1, "k": 1000, "K": 1024, "m": 1_000_000, "M": 1 << 20, "g": 10**9, "G": GiB}[hit[2]]
