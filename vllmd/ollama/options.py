"""The table of ``options``: what Ollama calls it, what it must be, and what engines call it.

Those that are not in it have no effect, and the client is told so (``x-vllmd-ignored``): ``num_ctx``, ``num_gpu`` and
the like say how an engine is to be started, which is the configuration's and the same for all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllmd.frozen import frozen
from vllmd.ollama.fields import Fields

Read = Callable[[Fields, str], Any]


@frozen
class Option:
    """``names``: the engines', all of which are sent. ``unset``: values that say nothing, such as a seed of -1."""

    read: Read
    names: tuple[str, ...]
    unset: Callable[[Any], bool] = lambda value: False


def _negative(value: float) -> bool:
    return value < 0


OPTIONS: Mapping[str, Option] = {
    "num_predict": Option(Fields.whole, ("max_tokens",), lambda value: value <= 0),  # -1: without end; -2: to the full
    "temperature": Option(Fields.number, ("temperature",)),
    "top_k": Option(Fields.whole, ("top_k",)),
    "top_p": Option(Fields.number, ("top_p",)),
    "min_p": Option(Fields.number, ("min_p",)),
    "seed": Option(Fields.whole, ("seed",), _negative),
    "stop": Option(Fields.texts, ("stop",), lambda value: not value),
    "presence_penalty": Option(Fields.number, ("presence_penalty",)),
    "frequency_penalty": Option(Fields.number, ("frequency_penalty",)),
    "repeat_penalty": Option(Fields.number, ("repetition_penalty", "repeat_penalty")),  # vLLM's and llama.cpp's name
    # llama.cpp's alone; others pass over what they do not know
    "typical_p": Option(Fields.number, ("typical_p",)),
    "repeat_last_n": Option(Fields.whole, ("repeat_last_n",)),
    "mirostat": Option(Fields.whole, ("mirostat",)),
    "mirostat_tau": Option(Fields.number, ("mirostat_tau",)),
    "mirostat_eta": Option(Fields.number, ("mirostat_eta",)),
}


def translated(options: Fields) -> tuple[dict[str, Any], list[str]]:
    """The engines' parameters, and the options that have no effect. Raises BadRequest for a wrong type."""
    found: dict[str, Any] = {}
    ignored: list[str] = []
    for name in options:
        option = OPTIONS.get(name)
        if option is None:
            ignored.append(name)
            continue
        value = option.read(options, name)
        if not option.unset(value):
            found |= dict.fromkeys(option.names, value)
    return found, ignored
