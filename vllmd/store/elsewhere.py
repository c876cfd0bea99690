"""Models that other programs have on this machine: Ollama's and LM Studio's GGUF files, used where they are.

::

    OLLAMA/manifests/registry.ollama.ai/library/NAME/TAG       JSON: which blob is the model
    OLLAMA/blobs/sha256-HASH                                   the GGUF file
    LMSTUDIO/ORG/NAME/FILE.gguf

Both may belong to anybody: they are read through ``vllmd.foreign``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllmd.foreign import Folder, Unreadable
from vllmd.frozen import frozen
from vllmd.hub import cache_of, discover, is_projector, locate

MODEL_LAYER = "application/vnd.ollama.image.model"
MOST = 2000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/ -]{0,199}", re.ASCII)


@frozen
class Elsewhere:
    """A model of another program. ``size``: bytes of its file."""

    name: str
    path: Path
    size: int
    program: str


def ollama_roots(environment: Mapping[str, str]) -> list[Path]:
    """Where Ollama's models may be: as OLLAMA_MODELS says, the user's, and its service's."""
    home = environment.get("HOME") or "/"
    named = environment.get("OLLAMA_MODELS")
    places = [named, f"{home}/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/models"]
    return [Path(place) for place in places if place]


def lmstudio_roots(environment: Mapping[str, str]) -> list[Path]:
    """Where LM Studio's models may be."""
    home = environment.get("HOME") or "/"
    return [Path(home, ".lmstudio/models"), Path(home, ".cache/lm-studio/models")]


def everything(environment: Mapping[str, str] = os.environ) -> list[Elsewhere]:
    """The models of both programs, by name."""
    found = [one for root in ollama_roots(environment) for one in ollama(root)]
    found += [one for root in lmstudio_roots(environment) for one in lmstudio(root)]
    return sorted(found[:MOST], key=lambda one: one.name)


def own_cache(environment: Mapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Names and sizes of the models in the invoking user's own Hugging Face cache."""
    return [(one.name, one.size) for one in discover(cache_of(environment))]


def own_path(repository: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The path of a repository in the user's own cache; None if it is not there."""
    return locate(repository, cache_of(environment)).path if "/" in repository else None


def ollama(root: Path) -> Iterator[Elsewhere]:
    """The models of one store of Ollama's; those that cannot be read are left out."""
    for manifest in _files(root / "manifests", 4):
        parts = manifest.relative_to(root / "manifests").parts
        name = f"{'/'.join(parts[2:-1] if parts[1] == 'library' else parts[1:-1])}:{parts[-1]}"
        with contextlib.suppress(OSError, Unreadable):
            layers = Folder(manifest.parent, root).json(manifest.name).get("layers")
            for layer in layers if isinstance(layers, list) else ():
                if not isinstance(layer, dict) or layer.get("mediaType") != MODEL_LAYER:
                    continue
                digest = layer.get("digest")
                if isinstance(digest, str) and _DIGEST.fullmatch(digest) and _NAME.fullmatch(name):
                    blob = digest.replace(":", "-")
                    size = Folder(root / "blobs").size(blob)
                    if size:
                        yield Elsewhere(name, root / "blobs" / blob, size, "Ollama")


def lmstudio(root: Path) -> Iterator[Elsewhere]:
    """The models in LM Studio's folder; of a split one its first file."""
    for path in _files(root, 3):
        part = re.search(r"-(\d{5})-of-\d{5}\.gguf$", path.name)
        if path.suffix != ".gguf" or is_projector(path.name) or (part and part[1] != "00001"):
            continue
        name = f"{path.parent.relative_to(root)}/{path.name}"
        size = Folder(path.parent, root).size(path.name)
        if size and _NAME.fullmatch(name):
            yield Elsewhere(name, path, size, "LM Studio")


def _files(root: Path, depth: int) -> Iterator[Path]:
    """The entries ``depth`` levels below ``root``, by name; none where it cannot be read."""
    level = [root]
    for _ in range(depth):
        inner: list[Path] = []
        for folder in level:
            with contextlib.suppress(OSError, Unreadable):
                inner += [folder / name for name in Folder(folder, root).names() if not name.startswith(".")]
        level = inner[:MOST]
    yield from level
