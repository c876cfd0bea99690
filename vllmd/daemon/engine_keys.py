"""The keys that engines on TCP ports ask clients for: one for each start, known to the engine and the daemon alone.

A daemon that takes over a running engine must know its key, and has nowhere to keep one that others could not read:
notes beside a cgroup are everybody's to read. So each key is made from the engine's name, which no other start ever
has, and a secret in the daemon's own cache. Without the file (deleted, or no cache) it is a new secret, and engines
with keys that an earlier daemon left cannot be asked anything: they are stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from pathlib import Path

from vllmd.foreign import Folder, Unreadable

log = logging.getLogger("vllmd")

SIZE = 32  # bytes


class EngineKeys:
    """Makes them. ``folder``: where the secret is kept; None: for as long as this daemon lives."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder and folder / "engine.key"
        self._secret = b""

    def of(self, instance: str) -> str:
        """The key of one start."""
        self._secret = self._secret or self._kept() or self._new()
        return hmac.new(self._secret, instance.encode(), hashlib.sha256).hexdigest()

    def _kept(self) -> bytes:
        if self._file is None:
            return b""
        with contextlib.suppress(OSError, Unreadable):
            secret = Folder(self._file.parent).read(self._file.name, SIZE)
            return secret if len(secret) == SIZE else b""
        return b""

    def _new(self) -> bytes:
        secret = os.urandom(SIZE)
        if self._file is not None:
            part = self._file.with_suffix(".part")
            try:
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(secret)
                part.replace(self._file)
            except OSError as error:
                log.warning("cannot keep %s: %s; engines with keys will not outlive this daemon", self._file, error)
        return secret
