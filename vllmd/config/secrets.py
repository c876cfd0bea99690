"""Secrets that are kept in files or systemd credentials, and keys as digests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

LARGEST = 64 << 10


def read(name: str, beside: Path, env: Mapping[str, str]) -> str:
    """The secret in file ``name``: absolute, or a credential in $CREDENTIALS_DIRECTORY, or beside the configuration.

    Raises OSError where it cannot be read, ValueError where it is not one line of text.
    """
    from vllmd.foreign import Folder  # 5 ms that configurations without such files need not pay

    path = place(name, beside, env)
    data = Folder(path.parent).read(path.name, LARGEST)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("the file is not text") from None
    if not text or not text.isprintable():
        raise ValueError("the file is empty" if not text else "the file has more than one line")
    return text


def place(name: str, beside: Path, env: Mapping[str, str]) -> Path:
    """Where that file is."""
    path = Path(name).expanduser()
    credentials = env.get("CREDENTIALS_DIRECTORY")
    if credentials and not path.is_absolute() and (Path(credentials) / path).exists():
        return Path(credentials) / path
    return path if path.is_absolute() else beside / path


def digest(key: str) -> str:
    """SHA-256 in hex of a key; a key written as ``sha256:HEX`` is one already. Raises ValueError if that is not hex."""
    if not key.startswith("sha256:"):
        import hashlib  # 5 ms that configurations without keys need not pay

        return hashlib.sha256(key.encode()).hexdigest()
    value = key.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("sha256: is followed by 64 hexadecimal digits")
    return value
