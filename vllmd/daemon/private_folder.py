"""The run directory of a daemon that no unit has given one: in the folder for temporary files, removed at its end.

A daemon that is killed leaves it behind. So each holds a lock on its own as long as it lives, which the kernel gives
back whatever ends it, and the next daemon of the same user removes those that nobody holds and that are empty. With
something in it a directory stays: an engine may still be ending there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vllmd.errors import ConfigError

PREFIX = "vllmd_"  # six characters, as sockets' paths are short; that of older versions, vllmd-, holds no lock
FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A directory of our own. Raises ConfigError, which says what to do, where none can be made."""
    import shutil  # a daemon of a unit needs neither
    import tempfile

    try:
        remove_abandoned(Path(tempfile.gettempdir()))
        path, lock = _made()
    except OSError as error:
        what = "engines' sockets need a folder; TMPDIR or VLLMD_ENGINE_RUN_DIR names one that can be written"
        raise ConfigError(f"{error.strerror or error}: {what}") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _made() -> tuple[Path, int]:
    """A new one with its lock, tried again where another daemon took it for abandoned before it was locked."""
    import tempfile

    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, FLAGS)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(path):
                return Path(path), lock
            os.close(lock)


def remove_abandoned(within: Path) -> None:
    """Remove the empty ones of our own user's whose daemon is dead."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(within):
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    """Raises OSError where it is no directory, is held, or has something in it."""
    handle = os.open(path, FLAGS)
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rmdir(path)
    finally:
        os.close(handle)
