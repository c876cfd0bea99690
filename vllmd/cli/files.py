"""Reading and replacing files; each error is a Failure that says what to do."""

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
    """The text of a file that must exist; ``-`` is the standard input. Raises Failure."""
    import sys

    if str(path) == "-":
        return sys.stdin.read()
    if not path.exists():
        raise Failure(f"there is no {path}", EX_NOINPUT)
    return read(path)


def replace(path: Path, text: str) -> None:
    """Replace the text of a file in one step, and keep its mode and owner; a full disk leaves it as it was."""
    target = Path(os.path.realpath(path))
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if target.exists():
                old = target.stat()
                os.fchmod(descriptor, old.st_mode & 0o7777)
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
            else:
                os.fchmod(descriptor, 0o644)  # mkstemp's files are their owner's alone
            os.fsync(descriptor)
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, PermissionError):
            raise Failure(f"you may not write {path}; try again with sudo", EX_NOPERM) from None
        raise Failure(f"{path} cannot be written: {error.strerror}; it is as it was", EX_CANTCREAT) from None
