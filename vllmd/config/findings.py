"""What reading the configuration brings to light: problems, warnings, and where each setting came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from vllmd.config.nodes import Node, Where
from vllmd.config.origins import Origins
from vllmd.config.types import Config
from vllmd.config.value_types import what_it_is
from vllmd.frozen import frozen
from vllmd.text import printable


@frozen
class Problem:
    """One thing that is wrong (or, as a warning, doubtful): where, of which key, why, and what would be right."""

    where: Where
    path: str
    what: str
    accepted: str = ""
    nearest: str = ""
    unfit: str = ""  # the model, by name, that it keeps from ever being loaded; all others can be served

    def __str__(self) -> str:
        text = self.what
        if self.nearest:
            text += f'; did you mean "{self.nearest}"?'
        if self.accepted:
            text += f"{'' if text.endswith('?') else ';'} accepted: {self.accepted}"
        path = f"{self.path}: " if self.path else ""
        return printable(f"{self.where}: {path}{text}")  # a path may hold a model's name with control characters


@frozen
class Reading:
    """A configuration as far as it could be read. ``origins``: the place of each setting that was given, by path."""

    config: Config
    problems: tuple[Problem, ...] = ()
    origins: Mapping[str, Where] = field(default_factory=dict)


class Findings:
    """Collects problems and warnings of a configuration, each once, with its place."""

    def __init__(self) -> None:
        self._problems: dict[tuple[Where, str], Problem] = {}
        self.warnings: list[Problem] = []
        self.origins = Origins()

    def complain(
        self, where: Where, path: str, what: str, accepted: str = "", nearest: str = "", *, unfit: str = ""
    ) -> None:
        """Note a problem, once for each place and reason, however many models inherit it. ``unfit``: see Problem."""
        self._problems.setdefault((where, what), Problem(where, path, what, accepted, nearest, unfit))

    def warn(self, where: Where, path: str, what: str) -> None:
        """Note, likewise once, what works but should be looked at."""
        if not any(known.where == where and known.what == what for known in self.warnings):
            self.warnings.append(Problem(where, path, what))

    def mapping(self, node: Node, path: str, accepts: str) -> Node | None:
        """``node`` if it is a mapping; else None, and a problem."""
        if node.is_map:
            return node
        self.complain(node.where, path, f"{what_it_is(node)} is not a mapping", accepts)
        return None

    def problems(self) -> tuple[Problem, ...]:
        """All problems by line, file after file in the order in which the first problem of each was found."""
        problems, order = self._problems.values(), dict[str, int]()
        for problem in problems:
            order.setdefault(problem.where.source, len(order))
        return tuple(sorted(problems, key=lambda p: (order[p.where.source], p.where.line, p.where.column)))
