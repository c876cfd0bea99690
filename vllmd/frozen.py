"""Values that nobody changes, cheap to make and cheap to declare.

``dataclass(frozen=True)`` sets each field by a call past its own guard: a value of six fields takes five times as long
to make as without, and a request makes eight of them. And it writes and compiles six functions for each class, of
which most are never called: of the daemon's start, with its 260 classes, that was a fifth. So here mypy is the guard,
at run time there is none, and all classes share what compares, hashes and shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """A dataclass with slots, compared and hashed by its fields, which mypy lets nobody set."""
    made = dataclass(slots=True, eq=False, repr=False)(cls)
    compared = [each.name for each in fields(made) if each.compare]  # type: ignore[arg-type]
    shown = [each.name for each in fields(made) if each.repr]  # type: ignore[arg-type]
    _compare(made, attrgetter(*compared) if compared else lambda self: ())
    if "__repr__" not in cls.__dict__:
        _show(made, shown)
    return made


def _show(cls: type, names: list[str]) -> None:
    def represent(self: object) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    cls.__repr__ = represent  # type: ignore[assignment]


def _compare(cls: type, values: Callable[[Any], Any]) -> None:
    """Equal are those of one class whose ``values`` are, unless it has a way of its own."""

    def equal(self: object, other: object) -> bool:
        return bool(values(self) == values(other)) if other.__class__ is self.__class__ else NotImplemented

    def hashed(self: object) -> int:
        return hash(values(self))

    if "__eq__" not in cls.__dict__:
        cls.__eq__, cls.__hash__ = equal, hashed  # type: ignore[assignment,method-assign]
