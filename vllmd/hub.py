"""Models on this machine's disk: the Hugging Face cache as huggingface_hub lays it out, and plain folders.

::

    HF_HOME/hub/models--ORG--NAME/refs/main              a commit's hash
    HF_HOME/hub/models--ORG--NAME/snapshots/HASH/...     links into ../../blobs

Reads names and small JSON files only; downloads nothing, runs nothing, and
never follows a name out of the folder that it was found in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_FILE = 32 << 20  # bytes; a JSON file beyond this is no configuration
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt")

_REPOSITORY = re.compile(r"(?!.*(\.\.|--))[\w][\w.-]*(/[\w][\w.-]*)?")
_COMMIT = r"(?!\.+$)[\w.-]+"
_GENERATE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForImageTextToText")
_ADAPTER = "adapter_config.json"


class Unreadable(ValueError):
    """A file is not what it should be; the message names the file and says what is wrong, readable."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model's files are: a folder or a single file; ``tag`` picks a GGUF in it. ``path`` None: not here."""

    path: Path | None
    why: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A model in the cache. ``size``: bytes of its weight files. ``kind``: generate, embed, rerank or transcribe."""

    name: str
    path: Path
    size: int
    kind: str


def locate(source: str, hf_home: Path, revision: str = "") -> Located:
    """The files of ``source``: a path, or a repository id (``org/name``, or ``org/name:TAG`` for a GGUF)."""
    if source.startswith(("/", "./", "../", "~")):
        path = Path(source).expanduser()
        return Located(path, str(path)) if path.exists() else Located(None, f"{path} does not exist")
    repository, _, tag = source.partition(":")
    if not is_repository(repository):
        return Located(None, f"{source!r} is neither a path nor a repository id")
    folder = _cache(hf_home) / ("models--" + repository.replace("/", "--"))
    try:
        snapshot = _snapshot(folder, revision or "main")
    except OSError as error:
        return Located(None, f"{folder}: {error.strerror}")
    if snapshot is None:
        return Located(None, f"{repository} is not in the cache {folder.parent}")
    return Located(snapshot, f"{repository} in the cache", tag)


def discover(hf_home: Path) -> tuple[Found, ...]:
    """Every model in the cache that an engine can serve, by name.

    Left out: data sets, adapters, tokenizers, image generators, downloads without any weights yet.
    """
    try:
        folders = sorted(_cache(hf_home).glob("models--*"))
    except OSError:
        return ()
    return tuple(found for folder in folders for found in _examine(folder))


def is_repository(name: str) -> bool:
    """Whether it has the form of a repository id; one that looks like a path or a flag has not."""
    return _REPOSITORY.fullmatch(name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises Unreadable."""
    try:
        if path.stat().st_size > SMALL_FILE:
            raise Unreadable(f"{path.name} is larger than {SMALL_FILE >> 20} MiB")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise Unreadable(f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path.name} is no JSON object")
    return content


def _cache(hf_home: Path) -> Path:
    return hf_home / "hub"


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The snapshot that a ref or a hash names; without that ref the newest one (as after an interrupted download)."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    wanted = revision
    ref = folder / "refs" / revision
    if ".." not in revision and ref.is_file():
        wanted = ref.read_text(errors="replace").strip()
    if re.fullmatch(_COMMIT, wanted) and (snapshots / wanted).is_dir():
        return snapshots / wanted
    there = [path for path in snapshots.iterdir() if re.fullmatch(_COMMIT, path.name) and path.is_dir()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None) if revision == "main" else None


def _examine(folder: Path) -> Iterator[Found]:
    name = folder.name.removeprefix("models--").replace("--", "/")
    try:
        snapshot = _snapshot(folder, "main")
        if snapshot is None:
            return
        names = {path.name for path in snapshot.iterdir()}
        size = sum(_sizes(snapshot))
        kind = _kind(name, snapshot, names) if size else ""
    except (OSError, Unreadable):
        return
    if kind:
        yield Found(name, snapshot, size, kind)


def _sizes(snapshot: Path) -> Iterable[int]:
    """Sizes of its weight files; a link whose blob has not been downloaded is none."""
    return (path.stat().st_size for path in snapshot.iterdir() if path.suffix in WEIGHTS and path.is_file())


def _kind(name: str, snapshot: Path, names: set[str]) -> str:
    """What it is for; "" if it is not a model that can be served."""
    if any(each.endswith(".gguf") for each in names):
        return "generate"
    if "config.json" not in names or _ADAPTER in names or "model_index.json" in names:
        return ""
    architectures = [str(each) for each in read_json(snapshot / "config.json").get("architectures") or ()]
    if any(each.startswith("Whisper") for each in architectures):
        return "transcribe"
    if any(each.endswith("ForSequenceClassification") for each in architectures) or "rerank" in name.lower():
        return "rerank"
    if "modules.json" in names:  # sentence-transformers: an embedding model, whatever it was made from
        return "embed"
    if any(each.endswith(_GENERATE) for each in architectures):
        return "generate"
    return "embed" if any(each.endswith("Model") for each in architectures) else ""
