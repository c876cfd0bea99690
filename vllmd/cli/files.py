"""Reading and replacing files, with words for what goes wrong."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vllmd.cli.failures import EX_CANTCREAT, EX_DATAERR, EX_NOINPUT, EX_NOPERM, Failure


def read(path: Path) -> str:
    """The text of a file; "" if there is none."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except PermissionError:
        raise Failure(f"you may not read {path}", EX_NOPERM) from None
    except UnicodeDecodeError:
        raise Failure(f"{path} is not UTF-8 text", EX_DATAERR) from None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}", EX_NOINPUT) from None


def existing(path: Path) -> str:
    """The text of a file that must be there; ``-`` is the standard input."""
    import sys

    if str(path) == "-":
        return sys.stdin.read()
    if not path.exists():
        raise Failure(f"there is no {path}", EX_NOINPUT)
    return read(path)


def replace(path: Path, text: str) -> None:
    """Write the file anew in one step, with the mode and owner that it had; nothing is lost if the disk is full."""
    target = Path(os.path.realpath(path))
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _like(target, descriptor)
            os.fsync(descriptor)
        os.replace(temporary, target)
    except PermissionError:
        _forget(temporary)
        raise Failure(f"you may not write {path}; try again with sudo", EX_NOPERM) from None
    except OSError as error:
        _forget(temporary)
        raise Failure(f"{path} cannot be written: {error.strerror}; it is as it was", EX_CANTCREAT) from None


def _like(target: Path, descriptor: int) -> None:
    try:
        old = target.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, 0o644)
        return
    os.fchmod(descriptor, old.st_mode & 0o7777)
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, old.st_uid, old.st_gid)


def _forget(temporary: str) -> None:
    if temporary and os.path.exists(temporary):
        os.unlink(temporary)
