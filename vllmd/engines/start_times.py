"""How long a first start takes, by an engine's kind and the size of its model, before any was measured here.

Rough figures for one modern machine with its files on a local disk: what the
scheduler believes until the first start of that kind has ended. From then on it
corrects them by what that one took. While one is under way, what its log has
shown so far says how much is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllmd.config.types import ModelConfig
from vllmd.config.value_types import DURATION, SECONDS

GB = 1e9
UNKNOWN = 10.0  # seconds for kinds that others have added, beside the reading of the weights

_TIMES: Mapping[str, Callable[[float], float]] = {  # W: gigabytes of weights -> seconds
    "vllm": lambda w: 37 + 0.2 * w,  # compiles and captures graphs
    "sglang": lambda w: 30 + 0.2 * w,
    "transformers": lambda w: 15 + 0.3 * w,
    "llama.cpp": lambda w: 1.5 + 0.4 * w,  # maps its file
    "tei": lambda w: 4 + 0.4 * w,
    "triton": lambda w: 8 + 0.3 * w,
    "comfyui": lambda w: 10 + 0.2 * w,
    "command": lambda w: 5 + 0.2 * w,
    "remote": lambda w: 0.2,  # only a probe
}

# The share of a start that is over when a phase of its log begins. 0: a phase that does not depend on its pace.
_SHARES: Mapping[str, Mapping[str, float]] = {
    "vllm": {
        "nodes": 0.0,
        "download": 0.0,
        "configuring": 0.15,
        "workers": 0.25,
        "weights": 0.3,
        "profiling": 0.45,
        "compile": 0.5,
        "graphs": 0.8,
        "warm-up": 0.95,
        "serving": 0.98,
    },
    "llama.cpp": {"download": 0.0, "weights": 0.05, "context": 0.9, "warm-up": 0.92, "serving": 0.98},
    "sglang": {"configuring": 0.15, "weights": 0.35, "profiling": 0.55, "graphs": 0.6, "warm-up": 0.9, "serving": 0.98},
    "transformers": {"weights": 0.5, "serving": 0.98},
    "tei": {"download": 0.0, "weights": 0.1, "warm-up": 0.7, "serving": 0.98},
    "triton": {"weights": 0.2, "loaded": 0.9, "serving": 0.98},
}

# What a program does before its log says anything, where that is no import of Python's modules.
_FIRST: Mapping[str, str] = {"llama.cpp": "program", "tei": "program", "command": "program", "remote": "program"}


def first_phase(kind: str) -> str:
    """The phase of a start whose log has shown none yet."""
    return _FIRST.get(kind, "imports")


def share_begun(kind: str, phase: str) -> float | None:
    """The share of a start's time that is over when ``phase`` begins; None where that is not known."""
    return _SHARES.get(kind, {}).get(phase)


def start_time(model: ModelConfig, kind: str, weights: int) -> float:
    """The seconds of a start before any was measured. ``weights`` in bytes. A stand-in's are its option."""
    if kind == "sim":
        return 0.5 + _load_time(model)
    known = _TIMES.get(kind)
    return known(weights / GB) if known else UNKNOWN + 0.2 * weights / GB


def _load_time(model: ModelConfig) -> float:
    """A stand-in's ``load_time``; 0 for a wrong one, which its start reports."""
    match = DURATION.fullmatch(str(model.options.get("load_time", "0s")).strip())
    return float(match[1]) * SECONDS[match[2].lower()] if match else 0.0
