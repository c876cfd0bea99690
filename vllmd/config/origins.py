"""Where each setting was given, by its path: of ten thousand models so many that they are kept as numbers.

A path as text and a ``Where`` take 250 bytes, and each model has some of them. But the settings of a section are read
together, and nearly every model has the same few: so a section is its path with one row of numbers, which are those of
its settings' names (a tuple, kept once), and of each setting the line, the column and the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from struct import Struct
from typing import TypeVar

from vllmd.config.nodes import Where

T = TypeVar("T")

_NUMBER = Struct("I")
_PLACE = Struct("III")  # line, column, and which source


class Origins(Mapping[str, Where]):
    """The places by path. What is noted first counts, but a section before what was noted by itself."""

    def __init__(self) -> None:
        self._sections: dict[str, bytes] = {}
        self._single: dict[str, Where] = {}
        self._names: dict[tuple[str, ...], int] = {}  # in the order of their numbers, as are the sources
        self._sources: dict[str, int] = {}
        self._names_by_number: list[tuple[str, ...]] = []
        self._sources_by_number: list[str] = []

    def note(self, path: str, where: Where) -> None:
        """One setting, or whatever else has a path."""
        if self._in_section(path) is None:
            self._single.setdefault(path, where)

    def note_section(self, path: str, names: Sequence[str], places: Sequence[Where]) -> None:
        """The settings of a section, each with its place; ``path`` is the section's, "" the whole configuration's."""
        if path in self._sections:
            for name, where in zip(names, places, strict=True):
                self.note(f"{path}.{name}" if path else name, where)
            return
        key, sources = tuple(names), self._sources
        number = self._names.get(key)
        if number is None:
            number = self._names[key] = len(self._names)
            self._names_by_number.append(key)
        row = [number]
        for source, line, column in places:
            if source not in sources:
                sources[source] = len(sources)
                self._sources_by_number.append(source)
            row += line, column, sources[source]
        self._sections[path] = _row(len(row)).pack(*row)

    def __getitem__(self, path: str) -> Where:
        where = self._in_section(path) or self._single.get(path)
        if where is None:
            raise KeyError(path)
        return where

    def get(self, path: str, default: T = None) -> Where | T:  # type: ignore[assignment]
        """The place of what has that path, else ``default``."""
        return self._in_section(path) or self._single.get(path) or default

    def __iter__(self) -> Iterator[str]:
        for section, row in self._sections.items():
            for name in self._names_of(row):
                yield f"{section}.{name}" if section else name
        yield from self._single

    def __len__(self) -> int:
        return sum(len(self._names_of(row)) for row in self._sections.values()) + len(self._single)

    def _names_of(self, row: bytes) -> tuple[str, ...]:
        (number,) = _NUMBER.unpack_from(row)
        names: tuple[str, ...] = self._names_by_number[number]
        return names

    def _in_section(self, path: str) -> Where | None:
        section, _, name = path.rpartition(".")
        row = self._sections.get(section)
        if row is None or name not in (names := self._names_of(row)):
            return None
        line, column, source = _PLACE.unpack_from(row, _NUMBER.size + names.index(name) * _PLACE.size)
        return Where(self._sources_by_number[source], line, column)


_ROWS: dict[int, Struct] = {}


def _row(length: int) -> Struct:
    """The form of a row with so many numbers, made once."""
    if length not in _ROWS:
        _ROWS[length] = Struct(f"{length}I")
    return _ROWS[length]
