"""The loader that reads a model's weights into its engine: the engine's own choice, or a faster one that is installed.

Whether another loader gains depends on the disk, the machine and the engine's version, and only a start can tell.
So the first starts tell: one with the engine's own loader, then one with each other that is there, and from then on
the fastest. What is compared is the seconds of a start's phase ``weights`` for each GiB, of starts that had the same
environment, the same file system, and the files both times in the page cache, or both times not. What others save in
other phases (reading ahead) is in it, as it is in what a client waits for.

A start that fails with a loader that was chosen here is begun anew without it. The loader is not tried again for that
model, nor for any model after the second that it failed for.

Facts about vLLM 0.32 that shape this file (its source read; ``runai_streamer`` run on a CPU, the others not):

- ``runai_streamer`` runs everywhere. It takes every safetensors file in the folder, whatever the index says: a second
  copy of the weights, such as Mistral's, would be loaded as well.
- ``fastsafetensors`` asks for a CUDA device. It has whole files on it, up to two at a time, beside the weights.
- ``instanttensor`` is for NVIDIA's alone, and reads past the page cache: reading ahead would be in its way.
- ``modelexpress`` wants a server, ``ipc_cache`` a process that keeps the weights, and what ``tensorizer``,
  ``sharded_state`` and ``runai_streamer_sharded`` read has been written for them: those are named in extra_args.
- After sleep level 2 all three read the weights again (``reload_weights``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vllmd.config.types import ModelConfig
from vllmd.engines.weight_files import WeightFile
from vllmd.foreign import Folder
from vllmd.frozen import frozen
from vllmd.sizes import GiB

SMALLEST = GiB  # bytes of weights from which on a start tells anything
WORTH = 2.0  # seconds that the engine's own loader must take for another one to be tried
GAIN = 0.9  # of those, what another one may take at most
MODELS = 2  # models for which a loader may fail until it is tried for no model any more
PLACES = 64  # places for which the speed of loaders is kept
COLD, WARM = 0.1, 0.9  # shares of the files in the page cache, up to and from which a start is one or the other
LOOKS = 16  # pages of each file that are looked for in the page cache
_PACKAGES = ("lib/python3*/site-packages", "local/lib/python3*/dist-packages", "lib/python3/dist-packages")


@frozen
class Loader:
    """A load format of vLLM's. ``module``: a file of its package, relative to site-packages.

    ``nvidia``: it needs such a device. ``direct``: it reads past the page cache. ``whole``: files that it has on the
    device at a time. ``strict``: it takes every safetensors file of the folder.
    """

    format: str
    module: str
    nvidia: bool = False
    direct: bool = False
    whole: int = 0
    strict: bool = False


LOADERS = (
    Loader("instanttensor", "instanttensor/__init__.py", nvidia=True, direct=True),
    Loader("fastsafetensors", "fastsafetensors/parallel_loader.py", nvidia=True, whole=2),
    Loader("runai_streamer", "runai_model_streamer/__init__.py", strict=True),
)
DIRECT = frozenset(loader.format for loader in LOADERS if loader.direct)


@runtime_checkable
class CanLoadFast(Protocol):
    """A kind of engine whose loader can be chosen."""

    def loaders(self, model: ModelConfig, argv: Sequence[str]) -> Sequence[Loader]:
        """The loaders installed where this command runs, the most promising first; none where the user has chosen."""

    def load_with(self, argv: Sequence[str], load_format: str) -> tuple[str, ...]:
        """The command that loads so."""


def there(python: str, *, nvidia: bool) -> tuple[Loader, ...]:
    """The loaders that an interpreter could import, by their files: nothing is run or imported for it."""
    import glob  # the first start of a vLLM

    prefix = os.path.dirname(os.path.dirname(python))
    folders = [folder for pattern in _PACKAGES for folder in glob.glob(f"{prefix}/{pattern}")]
    formats: set[str] = set()
    for folder in folders:
        try:
            formats |= _in(folder, os.stat(folder).st_mtime_ns)
        except OSError:
            continue
    return tuple(loader for loader in LOADERS if loader.format in formats and (nvidia or not loader.nvidia))


@lru_cache(maxsize=32)
def _in(folder: str, changed: int) -> frozenset[str]:
    """The load formats whose package is in that folder, which has ``changed`` when it gained or lost one."""
    return frozenset(each.format for each in LOADERS if os.path.exists(f"{folder}/{each.module}"))


# -- the files


@frozen
class Files:
    """A model's weight files at its start. Bytes; ``cached``: the share in the page cache.

    ``alone``: there are no other safetensors files beside them.
    """

    size: int = 0
    largest: int = 0
    cached: float = 0.0
    filesystem: str = ""
    alone: bool = True


def look(files: Sequence[WeightFile], is_cached: Callable[[int, int, int], bool], mounts: str) -> Files:
    """Look at them; none of them is read. Raises OSError, Unreadable. ``mounts``: as /proc/self/mountinfo has them.

    ``is_cached``: whether so many bytes of a descriptor from an offset on are in the page cache.
    """
    paths = [file.path for file in files]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return Files()
    sizes, looked, cached = [], 0, 0
    for file in files:
        with Folder(file.path.parent, file.root).open(file.path.name) as opened:
            places = range(0, opened.size, max(1, -(-opened.size // LOOKS)))
            sizes.append(opened.size)
            looked += len(places)
            cached += sum(is_cached(opened.fd, at, 1) for at in places)
    beside = {path.name for path in paths[0].parent.glob("*.safetensors")}
    return Files(
        sum(sizes),
        max(sizes),
        cached / looked if looked else 0.0,
        filesystem(os.path.realpath(paths[0]), mounts),
        alone=beside == {path.name for path in paths},
    )


def filesystem(path: str, mounts: str) -> str:
    """The file system that a path is on, as ``ext4 /dev/sda1``; its name outlives the daemon and its namespaces."""
    filesystem, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        words, kinds = before.split(), after.split()
        if len(words) < 5 or len(kinds) < 2:
            continue
        point = words[4].replace("\\040", " ")
        if len(point) >= longest and (path == point or path.startswith(point.rstrip("/") + "/")):
            filesystem, longest = " ".join(kinds[:2]), len(point)
    return filesystem


def fitting(loaders: Iterable[Loader], files: Files, room: int) -> list[str]:
    """The formats that can read these files. ``room``: bytes of each device that its weights leave; 0: unknown."""
    return [
        loader.format
        for loader in loaders
        if (files.alone or not loader.strict) and loader.whole * files.largest <= max(room, 0)
    ]


# -- what was measured


@dataclass(slots=True)
class Note:
    """Of one place: seconds for a GiB by format, "" being the engine's own, and the models that a format failed for."""

    per_gib: dict[str, float] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)


class LoaderBook:
    """How fast each loader was, by place: environment, file system, and whether the files were in the page cache."""

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        """``kept``: what ``plain`` returned. Raises KeyError, TypeError or ValueError for anything else."""
        self._notes = {
            str(place): Note(
                {str(name): float(seconds) for name, seconds in dict(note["per_gib"]).items()},
                {str(name): [str(model) for model in models] for name, models in dict(note["failed"]).items()},
            )
            for place, note in (kept or {}).items()
        }

    def plain(self) -> dict[str, Any]:
        """The whole book, as JSON can have it."""
        return {place: {"per_gib": note.per_gib, "failed": note.failed} for place, note in self._notes.items()}

    def choose(self, place: str, model: str, formats: Sequence[str], size: int) -> str:
        """The format for a start with ``size`` bytes of weights: "" leaves it to the engine."""
        note = self._notes.get(place, Note())
        own = note.per_gib.get("")
        if own is None or size < SMALLEST or own * size / GiB < WORTH:
            return ""
        usable = [one for one in formats if model not in (failed := note.failed.get(one, [])) and len(failed) < MODELS]
        if untried := next((one for one in usable if one not in note.per_gib), ""):
            return untried
        best = min(usable, key=lambda one: note.per_gib[one], default="")
        return best if best and note.per_gib[best] <= GAIN * own else ""

    def knows(self, place: str) -> bool:
        """Whether the engine's own loader has been measured there."""
        return "" in self._notes.get(place, Note()).per_gib

    def measured(self, place: str, load_format: str, seconds: float, size: int) -> None:
        """A start has read ``size`` bytes in so many seconds; what was before counts half."""
        if size < SMALLEST or seconds <= 0:
            return
        note = self._of(place)
        now, before = seconds / (size / GiB), note.per_gib.get(load_format)
        note.per_gib[load_format] = round(now if before is None else (before + now) / 2, 3)

    def failed(self, place: str, load_format: str, model: str) -> None:
        """Note that a model's start failed with a loader."""
        models = self._of(place).failed.setdefault(load_format, [])
        if model not in models:
            models.append(model)

    def excused(self, place: str, load_format: str, model: str) -> None:
        """Note that the start failed without the loader as well."""
        note = self._of(place)
        left = [one for one in note.failed.pop(load_format, []) if one != model]
        if left:
            note.failed[load_format] = left

    def _of(self, place: str) -> Note:
        note = self._notes.pop(place, Note())
        self._notes[place] = note  # behind those that were used before
        while len(self._notes) > PLACES:
            del self._notes[next(iter(self._notes))]
        return note


def place(python: str, files: Files) -> str:
    """What two starts must have in common to be compared; "" where this one can be compared with none."""
    if not files.filesystem or COLD < files.cached < WARM:
        return ""
    return f"{Path(python).parent.parent} | {files.filesystem} | {'page cache' if files.cached >= WARM else 'disk'}"
