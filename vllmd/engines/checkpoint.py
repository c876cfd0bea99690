"""A model's weight files: how many bytes of which type, read without loading them.

safetensors (index or headers), GGUF (file size), PyTorch (file size). A wrong
or missing file becomes a note and the next best source, never an exception.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmd.hub import Unreadable, read_json

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_WEIGHTS = 1 << 46  # bytes (64 TiB); a larger figure is a mistake in the file

_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes by type as stored (safetensors' names such as BF16; "" where not told), from what, and oddities."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    how: str = ""
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes in all, as stored."""
        return sum(self.sizes.values())


def weights_of(path: Path, tag: str = "") -> Weights:
    """The weights in a folder, or of a GGUF file; ``total`` 0 if none can be told. Raises OSError."""
    if path.is_file():
        return _gguf([path])
    found = _safetensors(path)
    if found.total:
        return found
    other = _gguf(_gguf_files(path, tag)) if list(path.glob("*.gguf")) else _pytorch(path)
    return Weights(other.sizes, other.how, found.notes + other.notes)


def gguf_file(path: Path, tag: str = "") -> Path | None:
    """The GGUF file (the first of a split one) that ``path`` means."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    return next(iter(_gguf_files(path, tag)), None)


# ---- safetensors ------------------------------------------------------------------------------


def _safetensors(folder: Path) -> Weights:
    index = _index(folder, ".safetensors.index.json")
    names = index.names or _loose(folder)
    there = [folder / name for name in names if (folder / name).is_file()]
    if len(there) < len(names) and index.total:
        missing = f"{len(names) - len(there)} of {len(names)} safetensors files are not here"
        return Weights({"": index.total}, f"total_size of {index.file}", (*index.notes, missing))
    sizes: dict[str, int] = {}
    notes = list(index.notes)
    for path in there:
        for dtype, size in _header_sizes(path, notes).items():
            sizes[dtype] = sizes.get(dtype, 0) + size
    return _sane(Weights(sizes, f"headers of {len(there)} safetensors files", tuple(notes)))


@dataclass(frozen=True, slots=True)
class _Index:
    file: str = ""
    names: tuple[str, ...] = ()
    total: int = 0
    notes: tuple[str, ...] = ()


def _index(folder: Path, suffix: str) -> _Index:
    """The index with this suffix; ``model.`` and ``pytorch_model.`` before others, as engines do."""
    files = sorted(folder.glob(f"*{suffix}"), key=lambda path: (not path.name.startswith(("model", "pytorch")), path))
    if not files:
        return _Index()
    try:
        content = read_json(files[0])
    except Unreadable as error:
        return _Index(notes=(str(error),))
    listed, metadata = content.get("weight_map"), content.get("metadata")
    named = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    names = tuple(sorted(name for name in named if Path(name).name == name))
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    notes = [] if len(names) == len(named) else [f"{files[0].name} names files outside its folder"]
    if not isinstance(total, int | float) or not 0 < total <= MAX_WEIGHTS:
        notes.append(f"{files[0].name} has no sensible total_size ({total!r})")
        total = 0
    return _Index(files[0].name, names, int(total), tuple(notes))


def _loose(folder: Path) -> tuple[str, ...]:
    """safetensors files without an index; Mistral's ``consolidated`` copy only where it is the only one."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return tuple(name for name in names if not name.startswith("consolidated")) or tuple(names)


def _header_sizes(path: Path, notes: list[str]) -> dict[str, int]:
    """Bytes by type that a file's header promises; of a broken one the file's size, with a note."""
    length = path.stat().st_size
    try:
        header, start = _header(path, length)
        sizes, end = _tensors(header)
    except Unreadable as error:
        notes.append(f"{path.name}: {error}; its size is taken instead")
        return {"": length}
    if start + end > length:
        notes.append(f"{path.name} is cut off: {length} of {start + end} bytes are here")
    return sizes


def _header(path: Path, length: int) -> tuple[dict[str, Any], int]:
    """The header and where the data starts. Format: https://huggingface.co/docs/safetensors (8 bytes size, JSON)."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= min(MAX_HEADER, length - 8):
            raise Unreadable(f"its header is cut off or corrupt ({size} bytes of header in a file of {length})")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise Unreadable("its header is no JSON object")
    return header, 8 + size


def _tensors(header: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    sizes: dict[str, int] = {}
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = tensor["data_offsets"]
            dtype = str(tensor["dtype"])
            if not 0 <= first <= last <= MAX_WEIGHTS:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise Unreadable(f"its header has no sensible place for tensor {name!r}") from None
        sizes[dtype] = sizes.get(dtype, 0) + int(last - first)
        end = max(end, int(last))
    return sizes, end


# ---- others -----------------------------------------------------------------------------------


def _pytorch(folder: Path) -> Weights:
    index = _index(folder, ".bin.index.json")
    if index.total:
        return Weights({"": index.total}, f"total_size of {index.file}", index.notes)
    paths = [*folder.glob("pytorch_model*.bin")] or [*folder.glob("consolidated*.pth")]
    return _sane(Weights({"": _sum(paths)}, f"size of {len(paths)} PyTorch files", index.notes))


def _gguf_files(folder: Path, tag: str) -> list[Path]:
    """One model's GGUF files: those that ``tag`` (such as Q4_K_M) names, else the largest; all parts of a split one."""
    whole: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.gguf")):
        if path.is_file() and not path.name.startswith("mmproj"):
            whole.setdefault(_SPLIT.sub("", path.stem), []).append(path)
    tagged = [paths for stem, paths in whole.items() if tag and tag.lower() in stem.lower()]
    return max(tagged or whole.values(), key=_sum, default=[])


def _gguf(paths: list[Path]) -> Weights:
    return _sane(Weights({"GGUF": _sum(paths)}, f"size of {paths[0].name if paths else 'no file'}"))


def _sum(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _sane(weights: Weights) -> Weights:
    if weights.total <= MAX_WEIGHTS:
        return weights
    return Weights({}, weights.how, (*weights.notes, f"{weights.total} bytes of weights cannot be true"))
