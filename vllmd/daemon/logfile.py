"""An engine's output in a rotating file beside the journal, where the configuration asks for it."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from vllmd.config.names import readable

log = logging.getLogger("vllmd.logfile")

SIZE, KEPT = 10 << 20, 5  # bytes of one file, and how many old ones
MOST = 200 << 20  # bytes of all runs of a model
RUNS = 5  # runs of a model whose files are kept: an engine that dies at once, again and again, must not fill the disk
_RUN = re.compile(r"(?P<model>.+)_(?P<name>[a-z0-9-]+)-[0-9a-f]{6}\.log(?:\.\d+)?")
RATE, BURST = 1 << 20, 8 << 20  # bytes per second in the long run, and at a time


class LogFile:
    """``{model}_{port or instance}.log``; a file that cannot be written is logged once and harms nothing.

    What an engine writes faster than ``RATE`` is left out and counted.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        with contextlib.suppress(OSError):  # the first line will tell
            path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Quiet(path, maxBytes=SIZE, backupCount=KEPT, encoding="utf-8", errors="replace", delay=True)
        self._clock = clock
        self._room, self._at, self._missed = float(BURST), clock(), 0

    def write(self, lines: Iterable[str]) -> None:
        """Append lines, up to a rate; how many are left out is counted and written."""
        now = self._clock()
        self._room, self._at = min(float(BURST), self._room + (now - self._at) * RATE), now
        for line in lines:
            if self._room < len(line):
                self._missed += 1
                continue
            self._room -= len(line) + 1
            self._tell_missed()
            self._emit(line)

    def _tell_missed(self) -> None:
        if self._missed:
            self._emit(f"[{self._missed} lines were left out here: more than {RATE >> 20} MiB/s; the journal has them]")
            self._missed = 0

    def _emit(self, line: str) -> None:
        self._handler.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Close the file; lines that a full disk did not take are lost."""
        self._tell_missed()
        with contextlib.suppress(OSError):
            self._handler.close()


class _Quiet(RotatingFileHandler):
    """A handler that logs once that it cannot write, instead of printing a traceback for every line."""

    is_logged = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in the ``except`` of a failed write."""
        if not self.is_logged:
            self.is_logged = True
            why = sys.exc_info()[1]
            log.error("cannot write %s: %s; its lines are in the journal only", self.baseFilename, why)


def path_of(folder: Path, model: str, port_or_instance: str) -> Path:
    """Where the output of a model's engine is kept; a model's slashes become underscores."""
    return folder / f"{_safe(model)}_{port_or_instance}.log"


def forget_old_runs(folder: Path, model: str) -> None:
    """Remove the files of a model's earlier runs but the last ones, of which all hold ``MOST`` bytes at most.

    Raises OSError.
    """
    name = re.compile(rf"({re.escape(_safe(model))}_(?:\d+|{re.escape(readable(model))}-[0-9a-f]{{6}}))\.log(?:\.\d+)?")
    runs: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if match := name.fullmatch(path.name):
            runs.setdefault(match[1], []).append(path)
    newest = sorted(runs.values(), key=lambda files: max(file.lstat().st_mtime for file in files), reverse=True)
    room = MOST - SIZE * (KEPT + 1)  # one more is about to begin
    for number, files in enumerate(newest):
        room -= sum(file.lstat().st_size for file in files)
        if number >= RUNS - 1 or room < 0:
            for file in files:
                file.unlink(missing_ok=True)


def forget_removed_models(folder: Path, models: Collection[str]) -> None:
    """Remove the oldest files of models that are none of these any more, until the rest holds ``MOST`` bytes in all.

    By their names alone, so that other files there stay. Raises OSError.
    """
    known, left = {_safe(model) for model in models}, []
    for path in folder.iterdir():
        match = _RUN.fullmatch(path.name)
        if match and match["model"] not in known and match["name"] == readable(match["model"]):
            left.append((path.lstat(), path))
    room = MOST
    for seen, path in sorted(left, key=lambda entry: entry[0].st_mtime, reverse=True):
        room -= seen.st_size
        if room < 0:
            path.unlink(missing_ok=True)


def _safe(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model)
