"""Figures that were learnt, kept over restarts: a cache, safe to delete, never believed blindly.

One JSON file: ``{"footprints": {fingerprint: {...}}, "costs": {...}}``. A
footprint belongs to a fingerprint of a model's settings, so a changed model is
measured afresh.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllmd.core.types import Footprint, Source

log = logging.getLogger("vllmd.learnt")


class Learnt:
    """The cache file; without a path it remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.footprints: dict[str, Footprint] = {}
        self.costs: dict[str, Any] = {}
        self._written = ""

    def load(self) -> None:
        """Read the file; one that is missing or damaged counts as empty."""
        if self._path is None or not self._path.exists():
            return
        try:
            kept = json.loads(self._path.read_text())
            self.footprints = {key: _footprint(value) for key, value in kept["footprints"].items()}
            self.costs = dict(kept["costs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("ignoring %s, it is damaged (%s); figures are learnt anew", self._path, error)
            self.footprints, self.costs = {}, {}

    def save(self) -> None:
        """Write it whole or not at all; a full disk is told and costs nothing but the figures."""
        if self._path is None:
            return
        text = json.dumps({"footprints": {key: asdict(value) for key, value in self.footprints.items()},
                           "costs": self.costs}, sort_keys=True)  # fmt: skip
        if text == self._written:
            return
        part = self._path.with_suffix(".part")
        try:
            part.write_text(text)
            os.replace(part, self._path)
            self._written = text
        except OSError as error:
            log.warning("cannot keep learnt figures in %s: %s", self._path, error)


def _footprint(kept: dict[str, int]) -> Footprint:
    figures = {key: int(kept[key]) for key in ("starting", "awake", "asleep", "host")}
    if min(figures.values()) < 0:
        raise ValueError("negative memory")
    return Footprint(**figures, source=Source(kept["source"]))
