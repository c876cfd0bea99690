"""The versions of a kind side by side, and the links that say which one is in use.

::

    ROOT/KIND/VERSION/          a whole environment; it is never changed once it is here
    ROOT/KIND/current           a link to the one in use
    ROOT/KIND/previous          a link to the one before that
    ROOT/KIND/.making-XXXX/     one that is being made; the next holder of the lock removes what is left of it
    ROOT/KIND/.lock             held by a process that changes anything here

A link is replaced by one rename, and an environment comes to its place by one rename: at every moment there is a whole
one in use, or none as before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vllmd.engines import environments
from vllmd.engines.environments import CURRENT, Environment
from vllmd.errors import BadRequest, Conflict, Forbidden, NotFound
from vllmd.frozen import frozen
from vllmd.installer.recipes import KINDS

PREVIOUS, NOTE, MAKING = "previous", ".vllmd-engine.json", ".making-"
VERSION = re.compile(r"[0-9][0-9A-Za-z.+!_-]{0,63}")


@frozen
class Note:
    """The note in an environment: its build, its size in bytes, and when it was made (``at``, Unix time)."""

    build: str = ""
    size: int = 0
    at: float = 0.0


def noted(environment: Environment) -> Note:
    """The note of an environment; an empty one for an environment that an administrator made."""
    try:
        data = json.loads((environment.path / NOTE).read_text())
        return Note(str(data["build"]), int(data["size"]), float(data["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Note()


def note(path: Path, build: str) -> None:
    """Write the note of an environment, with its present size."""
    size = sum(size_of(entry) for entry in path.rglob("*"))
    (path / NOTE).write_text(json.dumps(asdict(Note(build, size, time.time()))))


def size_of(path: Path) -> int:
    """Bytes on disk; 0 for a file that has gone meanwhile."""
    with contextlib.suppress(OSError):
        return path.lstat().st_blocks * 512
    return 0


def known_kind(kind: str) -> str:
    """``kind``, if vllmd installs that engine. Raises BadRequest."""
    if kind not in KINDS:
        raise BadRequest(f"vllmd installs no engine {kind!r}; it installs {', '.join(KINDS)}")
    return kind


def known_version(version: str) -> str:
    """``version``, if it may be the name of a folder and a word for pip. Raises BadRequest."""
    if not VERSION.fullmatch(version):
        raise BadRequest(f"{version!r} is no version; one is 0.33.0")
    return version


@contextlib.contextmanager
def changing(root: Path, kind: str) -> Iterator[Path]:
    """Lock the folder of a kind, and tidy it. Raises Conflict where another process has the lock, Forbidden."""
    folder = root / known_kind(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        advice = f"; it must belong to the installer's user: sudo chown -R vllmd-installer: {folder}"
        raise Forbidden(
            f"{folder} cannot be written: {error.strerror}" + advice * (root == environments.SYSTEM)
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another vllmctl engine is at work on {kind}; try again once it is done") from None
        for left in folder.glob(".making-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield folder


def here(root: Path, kind: str) -> list[Environment]:
    """The versions in this root, the newest first."""
    return environments.installed(kind, {"VLLMD_ENGINES": str(root)})


def in_use(root: Path, kind: str) -> Environment | None:
    """The environment of this root in which engines are started."""
    return environments.in_use(kind, variables={"VLLMD_ENGINES": str(root)})


def use(folder: Path, version: str) -> str:
    """Start engines in this version from now on. Returns the version before. Needs the lock. Raises NotFound."""
    root, kind = folder.parent, folder.name
    if version not in [one.version for one in here(root, kind)]:
        found = ", ".join(one.version for one in here(root, kind)) or "none"
        raise NotFound(f"{kind} {version} is not installed in {root}; these are: {found}")
    before = in_use(root, kind)
    if before and before.version != version:
        _link(folder / PREVIOUS, before.version)
    _link(folder / CURRENT, version)
    return before.version if before else ""


def rollback(folder: Path) -> tuple[str, str]:
    """Use the version that was in use before. Returns it and the one that it replaces. Raises NotFound."""
    previous = folder / PREVIOUS
    if not previous.is_symlink() or not (previous / "bin/python").exists():
        raise NotFound(f"no version of {folder.name} was in use before this one, or it has been removed; "
                       "vllmctl engine list shows those that are here")  # fmt: skip
    version = os.readlink(previous)
    return version, use(folder, version)


def remove(folder: Path, version: str) -> str:
    """Remove a version from which nothing runs. Returns the one in use then. Raises NotFound, Conflict."""
    root, kind = folder.parent, folder.name
    path = folder / version
    if version not in [one.version for one in here(root, kind)]:
        raise NotFound(f"{kind} {version} is not installed in {root}")
    if pids := running_from(path):
        raise Conflict(f"{kind} {version} runs, as process {', '.join(map(str, pids))}: stop its models first, or "
                       "vllmctl engine use another version, then vllmctl reload")  # fmt: skip
    gone = folder / f"{MAKING}removed-{version}"
    path.rename(gone)
    for link in (CURRENT, PREVIOUS):
        with contextlib.suppress(OSError):
            if os.readlink(folder / link) == version:
                (folder / link).unlink()
    shutil.rmtree(gone, ignore_errors=True)
    now = in_use(root, kind)
    return now.version if now else ""


def running_from(path: Path, proc: Path = Path("/proc")) -> list[int]:
    """The processes that were started from an environment, as their command lines tell."""
    wanted, found = os.fsencode(path) + b"/", list[int]()
    for each in proc.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if wanted in each.read_bytes():
                found.append(int(each.parent.name))
    return sorted(set(found) - {os.getpid()})


def _link(link: Path, version: str) -> None:
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(version)
    fresh.replace(link)
