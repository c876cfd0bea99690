"""Engine kinds: each a small stateless class that says what to run and which calls mean what.

``base`` is the contract, the other modules are the kinds; ``engine_of`` finds a
model's, and ``environments`` where an engine's program is installed. Third
parties register a class (or an instance) in the entry-point group
``vllmd.engines``, or a runner (``runner.BaseRunner``); whatever one of theirs
raises becomes a ConfigError that names it (``guard``), so a plug-in cannot take
the daemon down.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, cast

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Bindable, Engine
from vllmd.engines.guard import Guarded, GuardedKind, missing_methods
from vllmd.errors import ConfigError

if TYPE_CHECKING:
    from importlib import metadata

GROUP = "vllmd.engines"
BUILT_IN = {
    "vllm": "vllmd.engines.vllm:Vllm",
    "sim": "vllmd.engines.sim:Sim",
    "simengine": "vllmd.engines.sim:Sim",
    "sglang": "vllmd.engines.sglang:Sglang",
    "llama.cpp": "vllmd.engines.llama_cpp:LlamaCpp",
    "llama-server": "vllmd.engines.llama_cpp:LlamaCpp",
    "triton": "vllmd.engines.triton:Triton",
    "comfyui": "vllmd.engines.comfyui:Comfyui",
    "tei": "vllmd.engines.tei:Tei",
    "transformers": "vllmd.engines.transformers:Transformers",
    "command": "vllmd.engines.command:Command",
    "remote": "vllmd.engines.remote:Remote",
}

log = logging.getLogger("vllmd.engines")


def engine_of(model: ModelConfig) -> Engine:
    """The engine of a model: its kind, or what the kind makes of the model's own settings.

    Raises ConfigError that says where the model is configured.
    """
    try:
        kind = engine_kind(model.engine)
    except ConfigError as error:
        where = f"{model.where}: " if model.where else ""
        raise ConfigError(f"{where}models.{model.name}.engine: {error.message}") from error
    return cast(Bindable, kind).bind(model) if _is_bindable(model.engine) else cast(Engine, kind)


@functools.cache
def _is_bindable(name: str) -> bool:
    """Asked once of each kind: a protocol is slow to compare with."""
    return isinstance(engine_kind(name), Bindable)


@functools.cache
def engine_kind(name: str) -> Engine | Bindable:
    """The engine kind of that name, built in or a plug-in. Raises ConfigError naming close matches."""
    if name in BUILT_IN:
        return _built_in(BUILT_IN[name])
    from importlib import metadata  # imports mail and archives, so only where a kind is not built in

    for entry in metadata.entry_points(group=GROUP):
        if entry.name == name:
            return _plug_in(entry)
    raise ConfigError(_unknown(name))


def engine_names() -> list[str]:
    """The names that ``engine:`` accepts here."""
    from importlib import metadata

    return sorted({*BUILT_IN, *(entry.name for entry in metadata.entry_points(group=GROUP))})


def _built_in(path: str) -> Engine | Bindable:
    module, _, name = path.partition(":")
    kind: Engine | Bindable = getattr(importlib.import_module(module), name)()
    return kind


def _plug_in(entry: metadata.EntryPoint) -> Engine | Bindable:
    try:
        thing = entry.load()
        kind = _made(entry, thing)
    except (Exception, SystemExit) as error:
        log.exception("engine plug-in %s (%s) cannot be loaded", entry.name, entry.value)
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the engine plug-in {entry.name!r} ({entry.value}) cannot be loaded: {what}") from error
    if callable(getattr(kind, "bind", None)):
        return GuardedKind(entry.name, kind)
    if missing := missing_methods(kind):
        what = f"lacks {', '.join(missing)}; see vllmd.engines.base.Engine"
        raise ConfigError(f"the engine plug-in {entry.name!r} ({entry.value}) {what}")
    return Guarded(entry.name, kind)


def _made(entry: metadata.EntryPoint, thing: Any) -> Any:
    """The kind that an entry point's class, runner or object is."""
    if not isinstance(thing, type):
        return thing
    from vllmd.engines import runner  # few have one

    return runner.RunnerKind(entry.name, entry.value, thing) if runner.is_runner(thing) else thing()


def _unknown(name: str) -> str:
    import difflib  # for mistakes only

    known = engine_names()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown engine {name!r}{hint} (known: {', '.join(known)})"
