"""Reading Containerfiles, as far as ours go: instructions, continued lines, JSON forms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

INSTRUCTIONS = frozenset(
    ["ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL"]
) | {"USER", "VOLUME", "WORKDIR"}


@dataclass(frozen=True)
class Step:
    """One instruction. ``line`` counts from 1."""

    line: int
    name: str
    text: str

    def argv(self) -> list[str]:
        """Of CMD, ENTRYPOINT and HEALTHCHECK: the JSON form, which needs no shell. Raises ValueError."""
        return list(json.loads(self.text[self.text.index("[") :]))

    def pairs(self) -> dict[str, str]:
        """Of ENV and ARG."""
        return dict(word.split("=", 1) for word in self.text.split())


def read(path: Path) -> list[Step]:
    """The instructions. Raises ValueError for one that is unknown, or has nothing after it."""
    steps, begun, parts = [], 0, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun or number
        parts.append(line.strip().removesuffix("\\").strip())
        if line.rstrip().endswith("\\"):
            continue
        steps.append(_step(begun, " ".join(parts)))
        begun, parts = 0, []
    if parts:
        raise ValueError(f"line {begun}: it ends in a continued line")
    return steps


def _step(line: int, text: str) -> Step:
    name, _, rest = text.partition(" ")
    if name not in INSTRUCTIONS or not rest:
        raise ValueError(f"line {line}: {text!r} is no instruction")
    return Step(line, name, rest)
