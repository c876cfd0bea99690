"""How the last start of each engine went: the seconds that it took, in all and by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from vllmd.api.json_types import ForeignJson
from vllmd.engines.start_phases import WEIGHTS
from vllmd.frozen import frozen

MOST_ENGINES = 512  # whose last start is remembered


@frozen
class Start:
    """One start that came through. ``like``: another start with the same value finds its compiled code.

    ``loader``: the load format that was chosen for it, "" for the engine's own.
    """

    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds; none where its beginning was not seen
    like: str = ""
    loader: str = ""

    @property
    def version(self) -> str:
        """The engine's version; "" where it had no environment."""
        return self.like.partition(" ")[2].rpartition("/")[2]

    @classmethod
    def read(cls, kept: ForeignJson) -> Start:
        """A start as it was written down. Raises KeyError, TypeError or ValueError for anything else."""
        phases = {str(phase): float(seconds) for phase, seconds in dict(kept.get("phases", {})).items()}
        return cls(float(kept["seconds"]), phases, str(kept.get("like", "")), str(kept.get("loader", "")))


class Starts(dict[str, Start]):
    """The last start of each engine that came through, by its id; the last ones of them all are kept."""

    def note(self, engine: str, start: Start) -> None:
        """Keep how a start went, and forget the oldest where there are too many."""
        self.pop(engine, None)
        self[engine] = start  # behind those that started before
        while len(self) > MOST_ENGINES:
            del self[next(iter(self))]


def in_words(spent: Mapping[str, float], loader: str = "") -> str:
    """``process 0.1 s, weights 8.2 s (fastsafetensors)``: for the log; what took no time is left out."""
    by = {WEIGHTS: f" ({loader})"} if loader else {}
    return ", ".join(f"{phase} {seconds:.1f} s{by.get(phase, '')}" for phase, seconds in spent.items()
                     if seconds >= 0.05)  # fmt: skip
