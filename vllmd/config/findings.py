"""What reading the configuration brings to light: problems, warnings, and where each setting came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllmd.config.nodes import Where
from vllmd.config.types import Config
from vllmd.text import printable


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong (or, as a warning, doubtful): where, of which key, why, and what would be right."""

    where: Where
    path: str
    what: str
    accepted: str = ""
    nearest: str = ""
    alone: bool = False  # it concerns one model, which cannot be loaded; all others can be served

    def __str__(self) -> str:
        told = self.what
        if self.nearest:
            told += f'; did you mean "{self.nearest}"?'
        if self.accepted:
            told += f"{'' if told.endswith('?') else ';'} accepted: {self.accepted}"
        path = f"{self.path}: " if self.path else ""
        return printable(f"{self.where}: {path}{told}")  # names stand in paths, whoever wrote them


@dataclass(frozen=True, slots=True)
class Reading:
    """All that reading brought to light. ``origins``: from where each setting that was given came, by path."""

    config: Config
    problems: tuple[Problem, ...] = ()
    origins: Mapping[str, Where] = field(default_factory=dict)


class Findings:
    """Collects problems and warnings of a configuration, each once, with its place."""

    def __init__(self) -> None:
        self._problems: dict[tuple[Where, str], Problem] = {}
        self.warnings: list[Problem] = []
        self.origins: dict[str, Where] = {}

    def complain(
        self, where: Where, path: str, what: str, accepted: str = "", nearest: str = "", *, alone: bool = False
    ) -> None:
        """Each place and reason once, however many models inherit it. ``alone``: it is a matter of one model."""
        self._problems.setdefault((where, what), Problem(where, path, what, accepted, nearest, alone))

    def warn(self, where: Where, path: str, what: str) -> None:
        """What works, but should be looked at."""
        if not any(known.where == where and known.what == what for known in self.warnings):  # models may share one
            self.warnings.append(Problem(where, path, what))

    def problems(self) -> tuple[Problem, ...]:
        """By file and line, files in the order in which they were found wrong."""
        order: dict[str, int] = {}
        for problem in self._problems.values():
            order.setdefault(problem.where.source, len(order))
        found = self._problems.values()
        return tuple(sorted(found, key=lambda p: (order[p.where.source], p.where.line, p.where.column)))
