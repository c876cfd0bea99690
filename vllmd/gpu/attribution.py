"""Attribute the memory of devices: to models by their processes, the rest is external memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllmd.errors import OUT_OF_FILES
from vllmd.gpu.sample import DeviceSample, Sample

TINY = 16 << 20  # bytes in use without a process: less than this is rounding, no external memory
CGROUP_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_NONE: Mapping[tuple[str, int], int] = {}

Attribution = tuple[dict[int, int], dict[tuple[str, int], int]]


def attribute(
    sample: Sample, pids: Mapping[str, Iterable[int]], expected: Mapping[tuple[str, int], int] = _NONE
) -> Attribution:
    """``({index: bytes of external memory}, {(model, index): bytes})`` for every device that could be read.

    External memory is that of other processes, and memory without a process (the driver's own, and what a dead process
    left behind), since no engine can have either. A model without memory on a device is left out.

    If the device hides sizes or processes, ``expected`` (the ledger's bytes of each model) is subtracted from the
    memory without a process before the rest counts as external; otherwise engines would be charged twice. It never
    becomes a model's measured figure.
    """
    owner = {pid: model for model, its in pids.items() for pid in its}
    external: dict[int, int] = {}
    models: dict[tuple[str, int], int] = {}
    for index, device in sample.devices.items():
        held = _held(device, owner)
        models.update({(model, index): size for model, size in held.items()})
        hidden = _hidden(device, owner, held, {model: size for (model, at), size in expected.items() if at == index})
        rest = device.used - sum(held.values()) - hidden
        external[index] = rest if rest > TINY else 0
    return external, models


def _held(device: DeviceSample, owner: Mapping[int, str]) -> dict[str, int]:
    """Model -> bytes, without models that have a process of unknown size: their sum would be wrong."""
    held: dict[str, int] = {}
    for pid, size in device.processes.items():
        if pid in owner:
            held[owner[pid]] = held.get(owner[pid], 0) + size
    unknown = {owner[pid] for pid in device.unsized if pid in owner}
    return {model: size for model, size in held.items() if model not in unknown}


def _hidden(
    device: DeviceSample, owner: Mapping[int, str], held: Mapping[str, int], expected: Mapping[str, int]
) -> int:
    """Bytes of models, by the ledger, that the device does not show."""
    unknown = {owner[pid] for pid in device.unsized if pid in owner}
    if device.hides_processes:
        unknown |= set(owner.values()) - held.keys()
    return sum(size for model, size in expected.items() if model in unknown)


def pids_of(cgroup: Path | str | None, main_pid: int | None = None, proc: Path = Path("/proc")) -> frozenset[int]:
    """An engine's processes: those in its cgroup and below, else its main process's session and descendants.

    ``cgroup``: a folder, or a path as in ``/proc/PID/cgroup``; "" or None where the engine has none of its own. Raises
    OSError where we have no file descriptor to look with.
    """
    folder = _folder(cgroup)
    if folder is not None:
        return frozenset(_in_cgroup(folder))
    return frozenset() if main_pid is None else _family(main_pid, proc)


def _folder(cgroup: Path | str | None) -> Path | None:
    if not cgroup:
        return None
    relative = str(cgroup).lstrip("/")
    for candidate in (Path(cgroup), *(root / relative for root in CGROUP_ROOTS)):
        if (candidate / "cgroup.procs").is_file():
            return candidate
    return None


def _in_cgroup(folder: Path) -> Iterable[int]:
    for path, _, _ in os.walk(folder, onerror=_raise_if_out_of_files):
        try:
            lines = Path(path, "cgroup.procs").read_text().split()
            yield from (int(line) for line in lines if line != "0")  # 0: not of our pid namespace
        except OSError as error:
            _raise_if_out_of_files(error)


def _raise_if_out_of_files(error: OSError) -> None:
    """Raise only the error of having no file descriptor; else the cgroup or the process went away while we looked.

    The memory of processes that are not found for want of a descriptor would be taken for external memory.
    """
    if error.errno in OUT_OF_FILES:
        raise error


def _family(main: int, proc: Path) -> frozenset[int]:
    """The session that ``main`` leads and all its descendants, so that an orphaned worker still counts as its own."""
    children: dict[int, list[int]] = {}
    family: set[int] = set()
    for pid, (parent, session) in _processes(proc).items():
        children.setdefault(parent, []).append(pid)
        if main in (pid, session):
            family.add(pid)
    unseen = list(family)
    while unseen:
        new = [child for child in children.get(unseen.pop(), ()) if child not in family]
        family.update(new)
        unseen.extend(new)
    return frozenset(family)


def _processes(proc: Path) -> dict[int, tuple[int, int]]:
    """pid -> (parent, session) of every process that can be seen."""
    found: dict[int, tuple[int, int]] = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(folder.name)] = (int(fields[1]), int(fields[3]))
            except OSError as error:
                _raise_if_out_of_files(error)
            except (IndexError, ValueError):
                continue  # it went away while we looked
    return found
