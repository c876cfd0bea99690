"""Values that nobody changes, cheap to make and cheap to declare.

``dataclass(frozen=True)`` sets each field by a call past its own guard: a value of six fields takes five times as long
to make as without, and a request makes eight of them. And it writes and compiles six functions for each class, of
which most are never called: of the daemon's start, with its 260 classes, that was a fifth. So here mypy is the guard,
at run time there is none, and all classes share what compares, hashes and shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, cast, dataclass_transform

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


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def sparse(cls: type[T]) -> type[T]:
    """The same for a class of many fields that mostly are as by default: an object has only the others.

    One of fifty fields takes 150 bytes instead of 470. Where a default is made by a factory, all share what that makes.
    """
    made: Any = dataclass(eq=False, repr=False, init=False)(cls)
    names, defaults = [each.name for each in fields(made)], _defaults_of(made)
    required = [name for name in names if name not in defaults]
    for name, value in defaults.items():
        setattr(made, name, value)

    def init(self: object, *values: Any, **given: Any) -> None:
        if values:
            given = {**dict(zip(names, values, strict=False)), **given}
        for name, value in given.items():
            if name in defaults:
                if value is not defaults[name]:
                    setattr(self, name, value)
            elif name in required:
                setattr(self, name, value)
            else:
                raise TypeError(f"{cls.__qualname__} has no field {name!r}")
        if missing := [name for name in required if name not in given]:
            raise TypeError(f"{cls.__qualname__} needs {', '.join(missing)}")

    made.__init__ = init
    _compare(made, attrgetter(*[each.name for each in fields(made) if each.compare]))
    _show(made, [each.name for each in fields(made) if each.repr])
    return cast(type[T], made)


def _defaults_of(cls: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, those of factories made once."""
    defaults = {each.name: each.default for each in fields(cls) if each.default is not MISSING}
    made = {each.name: each.default_factory() for each in fields(cls) if each.default_factory is not MISSING}
    return {**defaults, **made}


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
