"""Figures that were learnt, kept over restarts: a cache, safe to delete, never believed blindly.

One JSON file in the service's cache directory, or for ``vllmd serve`` in the
user's: ``{"costs": {...}}``, as ``vllmd.core.costs.CostBook`` has them.
It forgets by itself what was measured of a model that is now configured otherwise.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from vllmd.foreign import Folder

log = logging.getLogger("vllmd.learnt")


class Learnt:
    """The cache file; without a path it remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.costs: dict[str, Any] = {}
        self._written = ""

    def load(self) -> None:
        """Read the file; one that is missing or damaged counts as empty."""
        if self._path is None:
            return
        try:
            self.costs = dict(Folder(self._path.parent).json(self._path.name)["costs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error.__cause__, FileNotFoundError):  # nothing has been learnt yet
                return
            what = "cannot be read" if isinstance(error.__cause__, OSError) else "is damaged"
            log.warning("ignoring %s, it %s (%s); figures are learnt anew", self._path, what, error)
            self.costs = {}

    def save(self) -> None:
        """Write it whole or not at all; a full disk is told and costs nothing but the figures."""
        if self._path is None:
            return
        text = json.dumps({"costs": self.costs}, sort_keys=True)
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
