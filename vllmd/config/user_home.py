"""The user's home, which may be missing: a container's user is often a bare number, and cron jobs lack HOME."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path


def user_home(env: Mapping[str, str] = os.environ) -> Path | None:
    """``HOME``, else what the system knows of the user; None if there is none."""
    if env.get("HOME"):
        return Path(env["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def expanded(text: str) -> Path:
    """The path with ``~`` replaced. Raises ValueError where the user has no home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no home directory that ~ could mean; write the whole path") from None
