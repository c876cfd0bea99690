"""The names of engine kinds, as far as the configuration must know them: ``defaults`` has settings by kind."""

from __future__ import annotations

# Built-in kinds, each by the name under which ``defaults`` has its settings; ``vllmd.engines`` has the classes.
ENGINE_KINDS = (
    *("vllm", "llama.cpp", "sglang", "transformers", "tei", "triton", "comfyui", "command", "remote", "sim"),
)
ALSO = {"llama-server": "llama.cpp", "simengine": "sim"}
# Kinds with environments, of which a model may name a version (``engines/environments.py``).
WITH_VERSIONS = ("vllm", "llama.cpp", "sglang", "transformers")
# Settings that mean nothing to another kind of engine.
ENGINES_OWN = frozenset({"options", "extra_args", "command", "engine_version"})


def one_name(kind: str) -> str:
    """The one name of a kind that has several."""
    return ALSO.get(kind, kind)


def is_engine_kind(name: str) -> bool:
    """Whether there is an engine kind of this name, built in or of a plug-in."""
    if one_name(name) in ENGINE_KINDS:
        return True
    from importlib import metadata  # most configurations name no plug-in, and the first request waits for imports

    return any(entry.name == name for entry in metadata.entry_points(group="vllmd.engines"))
