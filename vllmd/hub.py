"""Models on this machine's disk: the Hugging Face cache as huggingface_hub lays it out, and plain folders.

::

    CACHE/models--ORG--NAME/refs/main              a commit's hash
    CACHE/models--ORG--NAME/snapshots/HASH/...     links into ../../blobs

CACHE is what ``cache_of`` says.

Reads names and small JSON files only; downloads nothing, runs nothing, and
never follows a name or a link out of the repository that it was found in. The
cache is the engines' to write: all of it is read through ``vllmd.foreign``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllmd.foreign import Folder, Unreadable, shown, within
from vllmd.frozen import frozen

__all__ = [
    "PLACES",
    "Found",
    "Located",
    "Unreadable",
    "cache_of",
    "discover",
    "ggufs",
    "kind_at",
    "locate",
    "read_json",
]

log = logging.getLogger("vllmd.hub")

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt")

_REPOSITORY = re.compile(r"(?!.*(\.\.|--))[\w][\w.-]*(/[\w][\w.-]*)?")
_COMMIT = r"(?!\.+$)[\w.-]+"
_GENERATE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForImageTextToText")
_ADAPTER = "adapter_config.json"
ONE_MODEL, ALL_MODELS = 2.0, 20.0  # seconds for looking at one repository of the cache, and at all
REPOSITORIES = 5000  # that are looked at


# Of the variables by which huggingface_hub is told where it is, those that name it, and all of them.
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
PLACES = (*CACHES, "HF_HOME")


def cache_of(environment: Mapping[str, str], home: Path | None = None) -> Path:
    """Where an engine in this environment has its cache; ``home`` goes before ``HOME``."""
    for name in CACHES:
        if environment.get(name):
            return Path(environment[name])
    given, cache = environment.get("HF_HOME"), environment.get("XDG_CACHE_HOME") if home is None else None
    if given:
        return Path(given) / "hub"
    return Path(cache or (home or Path(environment.get("HOME") or "/")) / ".cache") / "huggingface" / "hub"


@frozen
class Located:
    """Where a model's files are: a folder or a single file; ``tag`` picks a GGUF in it. ``path`` None: not here.

    ``root``: out of which no link may lead, of a repository in the cache.
    """

    path: Path | None
    why: str
    tag: str = ""
    root: Path | None = None


@frozen
class Found:
    """A model in the cache. ``size``: bytes of its weight files. ``kind``: generate, embed, rerank or transcribe.

    ``engine``: the only kind of engine that its files are for, such as llama.cpp for GGUF; "" for any.
    """

    name: str
    path: Path
    size: int
    kind: str
    engine: str = ""


def locate(source: str, cache: Path, revision: str = "") -> Located:
    """The files of ``source``: a path, or a repository id (``org/name``, or ``org/name:TAG`` for a GGUF).

    Raises OSError, Unreadable.
    """
    if source.startswith(("/", "./", "../", "~")):
        try:
            path = Path(source).expanduser()
        except RuntimeError:
            return Located(None, f"{source}: there is no home directory that ~ could mean")
        return Located(path, str(path)) if path.exists() else Located(None, f"{path} does not exist")
    repository, _, tag = source.partition(":")
    if not is_repository(repository):
        return Located(None, f"{source!r} is neither a path nor a repository id")
    folder = cache / ("models--" + repository.replace("/", "--"))
    try:
        snapshot = _snapshot(folder, revision or "main")
    except OSError as error:
        return Located(None, f"{folder}: {error.strerror}")
    if snapshot is None:
        return Located(None, f"{repository} is not in the cache {folder.parent}")
    return Located(snapshot, f"{repository} in the cache", tag, folder)


def discover(cache: Path) -> tuple[Found, ...]:
    """Every model in the cache that an engine can serve, by name.

    Left out: data sets, adapters, tokenizers, image generators, downloads without any weights yet; and, with a line
    in the log, whatever cannot be read as a model, or is not named like a repository.
    """
    found: list[Found] = []
    ends = time.monotonic() + ALL_MODELS
    for folder in _repositories(cache):
        left = ends - time.monotonic()
        if left <= 0:
            log.warning("%s: looked no further than %s after %g s", cache, shown(folder.name), ALL_MODELS)
            break
        try:
            found += within(min(ONE_MODEL, left), lambda folder=folder: list(_examine(folder)))  # type: ignore[misc]
        except OSError as error:
            log.info("%s is left out: %s", shown(folder.name), error.strerror)
        except Unreadable as error:
            log.warning("%s is left out: %s", shown(folder.name), error)
        except Exception as error:  # a defect of ours, found by one repository, must not hide the others
            log.exception("%s is left out: %s", shown(folder.name), type(error).__name__)
    return tuple(found)


def _repositories(cache: Path) -> list[Path]:
    try:
        names = within(ONE_MODEL, Folder(cache).names)
    except OSError:
        return []
    except Unreadable as error:
        log.warning("no models are looked for in %s: %s", cache, error)
        return []
    return [cache / name for name in names if name.startswith("models--")][:REPOSITORIES]


def is_repository(name: str) -> bool:
    """Whether it has the form of a repository id; one that looks like a path or a flag has not."""
    return _REPOSITORY.fullmatch(name) is not None


def read_json(path: Path, root: Path | None = None) -> dict[str, Any]:
    """The JSON object in a small file. Raises Unreadable."""
    return Folder(path.parent, root).json(path.name)


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The snapshot that a ref or a hash names; without that ref the newest one (as after an interrupted download)."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    wanted = revision
    if ".." not in revision and (named := _ref(folder, revision)) is not None:
        wanted = named
    if re.fullmatch(_COMMIT, wanted) and (snapshots / wanted).is_dir():
        return snapshots / wanted
    names = Folder(snapshots, folder).names() if revision == "main" else ()
    there = [snapshots / name for name in names if re.fullmatch(_COMMIT, name)]
    return max(filter(Path.is_dir, there), key=lambda path: path.stat().st_mtime, default=None)


def _ref(folder: Path, revision: str) -> str | None:
    """The commit that a ref names; None if there is no such ref."""
    try:
        return Folder(folder / "refs", folder).read(revision, 200).decode(errors="replace").strip()
    except (OSError, Unreadable):
        return None


def _examine(folder: Path) -> Iterator[Found]:
    name = folder.name.removeprefix("models--").replace("--", "/")
    if not is_repository(name):  # engines may write there: it could be a path, a flag, or several lines
        raise Unreadable("it is not named like a repository")
    path = _snapshot(folder, "main")
    if path is None:
        return
    snapshot = Folder(path, folder)
    names = snapshot.names()
    names += [name for name in ggufs(snapshot, names) if "/" in name]
    size = sum(_sizes(snapshot, names))
    kind = _kind(name, snapshot, frozenset(names)) if size else ""
    if kind:
        only_gguf = {os.path.splitext(each)[1] for each in names}.intersection(WEIGHTS) == {".gguf"}
        yield Found(name, path, size, kind, "llama.cpp" if only_gguf else "")


def ggufs(folder: Folder, names: Iterable[str]) -> list[str]:
    """The GGUF files in a folder, whose ``names`` are given, and in the folders in it: many have one for each
    quantisation."""
    found = [name for name in names if name.endswith(".gguf")]
    for name in names:
        if "." not in name:
            with contextlib.suppress(OSError, Unreadable):
                found += [f"{name}/{each}" for each in folder.sub(name).names() if each.endswith(".gguf")]
    return found


def ggufs_of(path: Path) -> list[str]:
    """The GGUF files that are models in a snapshot; none where it cannot be read."""
    with contextlib.suppress(OSError, Unreadable):
        folder = Folder(path, path.parents[1])
        return [name for name in ggufs(folder, folder.names()) if not is_projector(name) and folder.size(name)]
    return []


def cached_files(cache: Path, repository: str, tag: str = "", *, whole: bool) -> tuple[Path, ...]:
    """What of the cache is a repository's, or of its GGUF files those of one quantisation.

    ``whole``: the repository itself, where nothing else than that would be left. () where nothing is there.
    """
    folder = cache / ("models--" + repository.replace("/", "--"))
    if not is_repository(repository) or not folder.is_dir() or folder.is_symlink():
        return ()
    snapshot = _snapshot(folder, "main")
    there = ggufs_of(snapshot) if snapshot else []
    mine = [name for name in there if tag.lower() in name.rpartition("/")[2].lower()]
    if whole and (not tag or len(mine) == len(there) or not snapshot):
        return (folder,)
    return tuple(snapshot / name for name in mine) if snapshot and tag else ()


def is_projector(name: str) -> bool:
    """Whether it turns images into tokens, beside a model; it is called mmproj-..., or ...-mmproj-..."""
    return "mmproj" in name.rpartition("/")[2].lower()


def _sizes(snapshot: Folder, names: Iterable[str]) -> Iterator[int]:
    """Sizes of its weight files; a link whose blob has not been downloaded is none."""
    return (snapshot.size(name) or 0 for name in names if name.endswith(WEIGHTS))


def kind_at(located: Located) -> str:
    """What the model whose files these are is for, see ``Found``; "" for GGUF files, which may be for anything.

    Raises OSError, Unreadable.
    """
    if located.path is None or not located.path.is_dir():
        return ""
    folder = Folder(located.path, located.root)
    names = folder.names()
    return "" if any(name.endswith(".gguf") for name in names) else _kind("", folder, frozenset(names))


def _kind(name: str, snapshot: Folder, names: frozenset[str]) -> str:
    """What it is for; "" if it is not a model that can be served."""
    if any(each.endswith(".gguf") and not is_projector(each) for each in names):
        return "generate"
    if "config.json" not in names or _ADAPTER in names or "model_index.json" in names:
        return ""
    told = snapshot.json("config.json").get("architectures")
    architectures = [str(each) for each in told] if isinstance(told, list) else []
    if any(each.startswith("Whisper") for each in architectures):
        return "transcribe"
    if any(each.endswith("ForSequenceClassification") for each in architectures) or "rerank" in name.lower():
        return "rerank"
    if "modules.json" in names:  # sentence-transformers: an embedding model, whatever it was made from
        return "embed"
    if any(each.endswith(_GENERATE) for each in architectures):
        return "generate"
    return "embed" if any(each.endswith("Model") for each in architectures) else ""
