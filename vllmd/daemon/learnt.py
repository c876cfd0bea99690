"""Figures that were learnt, kept over restarts: a cache, safe to delete, never believed blindly.

One JSON file in the service's cache directory, or for ``vllmd serve`` in the
user's: ``{"costs": {...}, "runs": {...}}``, the costs as ``vllmd.core.costs.CostBook``
has them; it forgets by itself what was measured of a model that is now configured
otherwise. ``runs`` are the last instances of each engine, so that what they wrote can
be shown also to those who may not read the journal.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from vllmd.foreign import Folder

log = logging.getLogger("vllmd.learnt")

RUNS, MOST_ENGINES = 3, 512  # instances of an engine, and engines, that are remembered


class Learnt:
    """The cache file; without a path it remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.costs: dict[str, Any] = {}
        self.runs: dict[str, list[tuple[str, float]]] = {}  # engine -> its last instances, and when each ended
        self._written = ""

    def ended(self, engine: str, instance: str) -> None:
        """An engine has ended."""
        runs = self.runs.pop(engine, [])
        self.runs[engine] = [*runs, (instance, time.time())][-RUNS:]  # behind those that ended before
        while len(self.runs) > MOST_ENGINES:
            del self.runs[next(iter(self.runs))]

    def load(self) -> None:
        """Read the file; one that is missing or damaged counts as empty."""
        if self._path is None or not self._path.exists():
            return
        try:
            told = Folder(self._path.parent).json(self._path.name)
            self.costs = dict(told["costs"])
            runs = dict(told.get("runs", {})).items()
            self.runs = {name: [(str(run), float(at)) for run, at in ended] for name, ended in runs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("ignoring %s, it is damaged (%s); figures are learnt anew", self._path, error)
            self.costs, self.runs = {}, {}

    def save(self) -> None:
        """Write it whole or not at all; a full disk is told and costs nothing but the figures."""
        if self._path is None:
            return
        text = json.dumps({"costs": self.costs, "runs": self.runs}, sort_keys=True)
        if text == self._written:
            return
        part = self._path.with_suffix(".part")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_text(text)
            os.replace(part, self._path)
            self._written = text
        except OSError as error:
            log.warning("cannot keep learnt figures in %s: %s", self._path, error)
