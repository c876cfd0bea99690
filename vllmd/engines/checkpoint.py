"""A model's weight files: how many bytes of which type, read without loading them.

safetensors (index or headers), GGUF (file size), PyTorch (file size). A wrong
or missing file becomes a note and the next best source, never an exception.
They are foreign files (``vllmd.foreign``): headers and indexes are stepped
through, never held.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from vllmd.foreign import File, Folder, Unreadable, about, members, quoted, shown
from vllmd.frozen import frozen
from vllmd.hub import ggufs, is_projector

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_INDEX = 64 << 20  # bytes; those of the largest models so far have 25 million
MAX_WEIGHTS = 1 << 46  # bytes (64 TiB); a larger figure is a mistake in the file
MAX_NOTES = 5  # of a kind, in full; the others are counted

_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")


@frozen
class Weights:
    """Bytes by type as stored (safetensors' names such as BF16; "" where unknown), their source, and oddities."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    how: str = ""
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes in all, as stored."""
        return sum(self.sizes.values())


def weights_of(path: Path, tag: str = "", root: Path | None = None) -> Weights:
    """The weights in a folder, or of a GGUF file; ``total`` is 0 if unknown. Raises OSError, Unreadable.

    ``root``: out of which no link may lead.
    """
    if path.is_file():
        return _gguf(Folder(path.parent, root), [path.name])
    folder = Folder(path, root)
    names = folder.names()
    weights = _safetensors(folder, names)
    if weights.total:
        return weights
    there = ggufs(folder, names)
    other = _gguf(folder, _gguf_files(folder, there, tag)) if there else _pytorch(folder, names)
    return Weights(other.sizes, other.how, weights.notes + other.notes)


def weight_names(path: Path, tag: str = "", root: Path | None = None) -> list[str]:
    """The names of the weight files in a folder, or of a file's folder. Raises OSError, Unreadable.

    ``root``: out of which no link may lead.
    """
    if path.is_file():
        return _parts(Folder(path.parent, root), path.name)
    folder = Folder(path, root)
    names = folder.names()
    listed = list(_index(folder, names, ".safetensors.index.json").names or _loose(names))
    if not listed and (there := ggufs(folder, names)):
        listed = _gguf_files(folder, there, tag)
    return listed or list(_index(folder, names, ".bin.index.json").names) or _pytorch_files(names)


def gguf_file(path: Path, tag: str = "", root: Path | None = None) -> Path | None:
    """The GGUF file (the first of a split one) that ``path`` means. Raises OSError, Unreadable."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    folder = Folder(path, root)
    return next((path / name for name in _gguf_files(folder, ggufs(folder, folder.names()), tag)), None)


def projector_file(path: Path, root: Path | None = None) -> Path | None:
    """The GGUF file in a folder that lets a model see: ``mmproj*.gguf``. Raises OSError, Unreadable."""
    folder = Folder(path, root) if path.is_dir() else None
    there = ggufs(folder, folder.names()) if folder else []
    names = [name for name in there if folder and is_projector(name) and folder.size(name)]
    return path / min(names, key=len) if names else None


# ---- safetensors ------------------------------------------------------------------------------


def _safetensors(folder: Folder, names: Sequence[str]) -> Weights:
    index = _index(folder, names, ".safetensors.index.json")
    wanted = index.names or _loose(names)
    there = [name for name in wanted if folder.size(name) is not None]
    if len(there) < len(wanted) and index.total:
        missing = f"{len(wanted) - len(there)} of {len(wanted)} safetensors files are not here"
        return Weights({"": index.total}, f"total_size of {shown(index.file)}", (*index.notes, missing))
    sizes: dict[str, int] = {}
    notes: list[str] = []
    for name in there:
        for dtype, size in _header_sizes(folder, name, notes).items():
            sizes[dtype] = sizes.get(dtype, 0) + size
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"the same of {len(notes) - MAX_NOTES} more files"]
    return _sane(Weights(sizes, f"headers of {len(there)} safetensors files", (*index.notes, *notes)))


@frozen
class _Index:
    file: str = ""
    names: tuple[str, ...] = ()
    total: int = 0
    notes: tuple[str, ...] = ()


def _index(folder: Folder, names: Sequence[str], suffix: str) -> _Index:
    """The index with this suffix; ``model.`` and ``pytorch_model.`` before others, as engines do."""
    indexes = [name for name in names if name.endswith(suffix)]
    if not indexes:
        return _Index()
    file = min(indexes, key=lambda name: (not name.startswith(("model", "pytorch")), name))
    named: set[str] = set()
    total: object = None
    try:
        with folder.open(file) as opened:
            if opened.size > MAX_INDEX:
                raise Unreadable(f"is larger than {MAX_INDEX >> 20} MiB")
            for path, value in members(opened.read, frozenset({"weight_map", "metadata"})):
                if path == ("metadata", "total_size"):
                    total = value
                elif path[0] == "weight_map" and len(path) > 1 and isinstance(value, str):
                    named.add(value)
    except (OSError, Unreadable) as error:
        return _Index(notes=(about(shown(file), error),))
    inside = tuple(sorted(name for name in named if Path(name).name == name and "\0" not in name))
    notes = [] if len(inside) == len(named) else [f"{shown(file)} names files outside its folder"]
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total <= MAX_WEIGHTS:
        notes.append(f"{shown(file)} has no sensible total_size ({quoted(total)})")
        total = 0
    return _Index(file, inside, int(total), tuple(notes))


def _loose(names: Sequence[str]) -> tuple[str, ...]:
    """safetensors files without an index; Mistral's ``consolidated`` copy only where there is no other."""
    files = [name for name in names if name.endswith(".safetensors")]
    return tuple(name for name in files if not name.startswith("consolidated")) or tuple(files)


def _header_sizes(folder: Folder, name: str, notes: list[str]) -> dict[str, int]:
    """Bytes by type that a file's header promises; of a broken one the file's size, with a note."""
    length = folder.size(name) or 0
    try:
        with folder.open(name) as file:
            length = file.size
            sizes, end = _header(file, length)
    except (OSError, Unreadable) as error:
        notes.append(f"{about(shown(name), error)}; its size is taken instead")
        return {"": length}
    if end > length:
        notes.append(f"{shown(name)} is cut off: {length} of {end} bytes are here")
    return sizes


def _header(file: File, length: int) -> tuple[dict[str, int], int]:
    """Bytes by type, and where the last tensor ends. Raises OSError, Unreadable.

    Format: https://huggingface.co/docs/safetensors (8 bytes size, JSON, then the data).
    """
    prefix = file.read(8)
    size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= size <= min(MAX_HEADER, length - 8):
        raise Unreadable(f"its header is cut off or corrupt ({size} bytes of header in a file of {length})")
    left = size

    def read(wanted: int) -> bytes:
        nonlocal left
        data = file.read(min(wanted, left))
        left -= len(data)
        return data

    sizes: dict[str, int] = {}
    end = 0
    try:
        for path, tensor in members(read, frozenset({"__metadata__"})):
            if path[0] != "__metadata__":
                dtype, first, last = _tensor(path[0], tensor)
                sizes[dtype] = sizes.get(dtype, 0) + last - first
                end = max(end, last)
    except Unreadable as error:
        raise Unreadable(about("its header", error)) from error
    return sizes, 8 + size + end


def _tensor(name: str, tensor: Any) -> tuple[str, int, int]:
    """Type, first and last byte of a tensor. Raises Unreadable."""
    try:
        first, last = tensor["data_offsets"]
        dtype = str(tensor["dtype"])
        if not 0 <= first <= last <= MAX_WEIGHTS or len(dtype) > 20:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise Unreadable(f"has no sensible place for tensor {quoted(name)}") from None
    return dtype, int(first), int(last)


# ---- others -----------------------------------------------------------------------------------


def _pytorch(folder: Folder, names: Sequence[str]) -> Weights:
    index = _index(folder, names, ".bin.index.json")
    if index.total:
        return Weights({"": index.total}, f"total_size of {shown(index.file)}", index.notes)
    files = _pytorch_files(names)
    return _sane(Weights({"": _sum(folder, files)}, f"size of {len(files)} PyTorch files", index.notes))


def _parts(folder: Folder, name: str) -> list[str]:
    """The file; or all parts of a split GGUF, of which it is one."""
    stem = _SPLIT.sub("", name.removesuffix(".gguf"))
    if not name.endswith(".gguf") or stem == name.removesuffix(".gguf"):
        return [name]
    return [other for other in folder.names() if _SPLIT.sub("", other.removesuffix(".gguf")) == stem]


def _pytorch_files(names: Sequence[str]) -> list[str]:
    """PyTorch's files without an index."""
    files = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)]
    return files or [name for name in names if re.fullmatch(r"consolidated.*\.pth", name)]


def _gguf_files(folder: Folder, names: Sequence[str], tag: str) -> list[str]:
    """One model's GGUF files: those that ``tag`` (such as Q4_K_M) names, else the largest; all parts of a split one."""
    whole: dict[str, list[str]] = {}
    for name in names:
        if not is_projector(name) and folder.size(name) is not None:
            whole.setdefault(_SPLIT.sub("", name.removesuffix(".gguf")), []).append(name)
    tagged = [found for stem, found in whole.items() if tag and tag.lower() in stem.lower()]
    return max(tagged or whole.values(), key=lambda found: _sum(folder, found), default=[])


def _gguf(folder: Folder, names: Sequence[str]) -> Weights:
    return _sane(Weights({"GGUF": _sum(folder, names)}, f"size of {shown(names[0]) if names else 'no file'}"))


def _sum(folder: Folder, names: Iterable[str]) -> int:
    return sum(folder.size(name) or 0 for name in names)


def _sane(weights: Weights) -> Weights:
    if weights.total <= MAX_WEIGHTS:
        return weights
    return Weights({}, weights.how, (*weights.notes, f"{weights.total} bytes of weights cannot be true"))
