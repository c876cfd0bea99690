"""An engine's output in a rotating file beside the journal, where the configuration asks for it."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path

log = logging.getLogger("vllmd.logfile")

SIZE, KEPT = 10 << 20, 5  # bytes of one file, and how many old ones


class LogFile:
    """``{model}_{port or instance}.log``; a file that cannot be written is told once and harms nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.suppress(OSError):  # the first line will tell
            path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Quiet(path, maxBytes=SIZE, backupCount=KEPT, encoding="utf-8", delay=True)

    def write(self, lines: Iterable[str]) -> None:
        """Append the lines."""
        for line in lines:
            self._handler.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """No more; what a full disk did not take is lost."""
        with contextlib.suppress(OSError):
            self._handler.close()


class _Quiet(RotatingFileHandler):
    """Says once that it cannot write, instead of a traceback for every line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in the ``except`` of a failed write."""
        if not self.told:
            self.told = True
            why = sys.exc_info()[1]
            log.error("cannot write %s: %s; its lines are in the journal only", self.baseFilename, why)


def path_of(folder: Path, model: str, port_or_instance: str) -> Path:
    """Where the output of a model's engine is kept; a model's slashes become underscores."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}_{port_or_instance}.log"
