"""Files of the daemon's own, which outlive it: where they are, and how they are written, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def state_file(environment: Mapping[str, str], home: Path | None, variable: str, name: str) -> Path | None:
    """The path of a file that must outlive the daemon. ``name``: the unit's own folder for it, and the file.

    In the unit's StateDirectory= of that folder's name, else in the user's state folder, or where ``variable`` says.
    None where that is empty, and for a user without a home.
    """
    if variable in environment:
        return Path(environment[variable]) if environment[variable] else None
    folder, _, file = name.partition("/")
    for given in environment.get("STATE_DIRECTORY", "").split(":"):
        if given.endswith(f"/{folder}"):
            return Path(given) / file
    state = environment.get("XDG_STATE_HOME") or (home and home / ".local/state")
    return Path(state) / "vllmd" / file if state else None


def write_whole(path: Path, text: str, *, public: bool = False, sync: bool = True) -> None:
    """Replace a file in one step, so that a crash leaves the old one or the new one. Raises OSError.

    ``public``: every user may read it. ``sync``: it is on the disk when this returns; a cache need not be.
    """
    part = path.with_name(f".{path.name}.part")
    mode = 0o644 if public else 0o600
    path.parent.mkdir(mode=0o755 if public else 0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # whatever the umask, or an earlier file of that name, has left
            file.write(text)
            if sync:
                file.flush()
                os.fsync(descriptor)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
