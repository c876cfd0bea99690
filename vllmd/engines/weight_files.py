"""The files that an engine will read when it loads its model, in the order in which it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines.checkpoint import weight_names
from vllmd.engines.facts import argument
from vllmd.engines.options import text
from vllmd.foreign import Unreadable
from vllmd.frozen import frozen
from vllmd.hub import locate

# Kinds that read no such files, or whose files are not known.
_OTHERS = frozenset({"remote", "command", "comfyui", "triton"})
_OTHER_FORMATS = frozenset({"dummy", "ipc_cache", "modelexpress", "tensorizer"})  # of vLLM, which read none, or others
_NUMBER = re.compile(r"(\d+)")


@frozen
class WeightFile:
    """A weight file. ``root``: out of which no link may lead."""

    path: Path
    root: Path | None = None


def weight_files(model: ModelConfig, hub: Path) -> list[WeightFile]:
    """The model's weight files that are on this machine; none where that is unknown. vLLM and SGLang read shards by
    their numbers.
    """
    if model.engine in _OTHERS or argument(model, "load-format") in _OTHER_FORMATS:
        return []
    try:
        located = locate(model.source, hub, argument(model, "revision"))
        if located.path is None:
            return []
        folder = located.path.parent if located.path.is_file() else located.path
        paths = [folder / name for name in natural(weight_names(located.path, located.tag, located.root))]
    except (OSError, Unreadable):
        return []
    beside = [Path(projector)] if model.engine == "llama.cpp" and (projector := text(model, "mmproj")) else []
    return [WeightFile(path, located.root) for path in paths] + [WeightFile(path) for path in beside]


def natural(names: Sequence[str]) -> list[str]:
    """In the order of the numbers in them: 2 before 10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _NUMBER.split(name)])
