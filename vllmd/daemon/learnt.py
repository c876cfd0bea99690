"""Figures that were learnt, kept over restarts: a cache, safe to delete, never believed blindly.

One JSON file in the service's cache directory, or for ``vllmd serve`` in the
user's: ``{"costs": {...}, "runs": {...}, "decisions": {...}, "starts": {...}, "failures": {...},
"loaders": {...}}``, the costs as ``vllmd.core.costs.CostBook`` has them; it forgets by itself what was measured
of a model that is now configured otherwise. ``runs`` are the last instances of each
engine, so that what they wrote can be shown also to those who may not read the journal;
``decisions`` the last ones about each, as ``/admin/decisions`` has them: what is asked
about a model outlives the daemon.
``starts`` tell of each engine's last start how long it took and where that time went: the daemon ends when it is idle.
``failures`` are those that nobody has cleared (``failures.py``). ``loaders``: how fast each was (``engines.loaders``).
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

from vllmd.api.answers import Decision
from vllmd.api.codec import parse, plain
from vllmd.api.json_types import ForeignJson
from vllmd.daemon.dates import Dates
from vllmd.daemon.failures import Failure
from vllmd.daemon.last_starts import Start, Starts
from vllmd.daemon.state_files import write_whole
from vllmd.engines.loaders import LoaderBook
from vllmd.foreign import Folder
from vllmd.systemd.throttle import Repeated

log = logging.getLogger("vllmd.learnt")

RUNS, DECISIONS, MOST_ENGINES = 3, 5, 512  # of an engine, and engines, that are remembered


class Learnt:
    """The cache file; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.costs: ForeignJson = {}  # in the form of ``core.costs``
        self.runs: dict[str, list[tuple[str, float]]] = {}  # engine -> its last instances, and when each ended
        self.decisions: dict[str, list[Decision]] = {}  # engine or model -> the last ones about it
        self.earlier: dict[str, list[Decision]] = {}  # those of them that an earlier daemon made
        self.starts = Starts()
        self.failures: dict[str, Failure] = {}  # by engine
        self.loaders = LoaderBook()
        self.dates = Dates()  # of decisions, and of changes of state
        self._written = ""
        self.trouble = ""  # why it cannot be written now
        self._trouble = Repeated(log)

    def decided(self, decision: Decision) -> None:
        """Something was decided about a model; the same once more counts as the last time."""
        known = self.decisions.pop(decision.model, [])
        if known and (known[-1].what, known[-1].why) == (decision.what, decision.why):
            if (earlier := self.earlier.get(decision.model)) and earlier[-1] is known[-1]:
                earlier.pop()
            known = known[:-1]
        self.decisions[decision.model] = [*known, decision][-DECISIONS:]
        while len(self.decisions) > MOST_ENGINES:
            del self.decisions[next(iter(self.decisions))]

    def ended(self, engine: str, instance: str) -> None:
        """Note when the run of an engine ended."""
        runs = self.runs.pop(engine, [])
        self.runs[engine] = [*runs, (instance, time.time())][-RUNS:]  # behind those that ended before
        while len(self.runs) > MOST_ENGINES:
            del self.runs[next(iter(self.runs))]

    def load(self) -> None:
        """Read the file; one that is missing or damaged counts as empty."""
        if self._path is None:
            return
        try:
            content = Folder(self._path.parent).json(self._path.name)
            self.costs = dict(content["costs"])
            runs = dict(content.get("runs", {})).items()
            self.runs = {name: [(str(run), float(at)) for run, at in ended] for name, ended in runs}
            made = dict(content.get("decisions", {})).items()
            self.decisions = {
                name: [replace(parse(Decision, each), model=name) for each in kept] for name, kept in made
            }
            self.earlier = {name: list(kept) for name, kept in self.decisions.items()}
            starts = dict(content.get("starts", {})).items()
            self.starts = Starts((name, Start.read(kept)) for name, kept in starts)
            self.failures = {name: Failure.read(kept) for name, kept in dict(content.get("failures", {})).items()}
            self.loaders = LoaderBook(content.get("loaders", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error.__cause__, FileNotFoundError):  # nothing has been learnt yet
                return
            what = "cannot be read" if isinstance(error.__cause__, OSError) else "is damaged"
            log.warning("ignoring %s, it %s (%s); figures are learnt anew", self._path, what, error)
            self.costs, self.runs, self.decisions, self.earlier, self.failures = {}, {}, {}, {}, {}
            self.starts, self.loaders = Starts(), LoaderBook()

    def save(self) -> None:
        """Write the file whole or not at all; a full disk is logged, and costs nothing but the figures."""
        if self._path is None:
            return
        failures = {name: asdict(failure) for name, failure in self.failures.items()}
        starts = {name: asdict(start) for name, start in self.starts.items()}
        kept = {"costs": self.costs, "runs": dict(self.runs), "decisions": dict(self.decisions), "starts": starts}
        kept |= {"failures": failures, "loaders": self.loaders.plain()}
        text = json.dumps(kept, default=plain)
        if text == self._written:
            return
        try:
            write_whole(self._path, text, sync=False)
            self._written = text
            self.trouble = ""
            self._trouble.over()
        except OSError as error:
            self.trouble = f"learnt figures cannot be kept in {self._path}: {error.strerror or error}"
            self._trouble.say(logging.WARNING, "%s", self.trouble)
