"""Values, cheap to make and cheap to declare. Nobody changes those that are ``frozen``.

``dataclass(frozen=True)`` sets each field by a call past its own guard: a value of six fields takes five times as long
to make as without, and a request makes eight of them. So mypy is the guard here, and at run time there is none.

And ``dataclass`` writes and compiles up to eight functions for each class as it is declared, which takes a third of a
millisecond. The daemon declares 280 classes before it answers its first client, and makes values of fifty until then.
So a class is declared with its slots and no more. Its ``__init__`` is written when its first value is made, what
``dataclasses`` knows of it (``fields``, ``replace``, ``asdict``) when somebody asks, and all classes share what
compares, hashes and shows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, cast, dataclass_transform

T = TypeVar("T")
_MADE = object()  # stands for a default that is made for each value


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """A dataclass with slots, compared and hashed by its fields, which mypy lets nobody set."""
    return _with_slots(cls, _hash)


@dataclass_transform(field_specifiers=(field,))
def mutable(cls: type[T]) -> type[T]:
    """A dataclass with slots, compared by its fields; since they change it cannot be hashed."""
    return _with_slots(cls, None)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def sparse(cls: type[T]) -> type[T]:
    """As ``frozen``, for a class of many fields that mostly are as by default: a value has only the others.

    One of fifty fields takes 150 bytes instead of 470. Where a factory makes a default, all share what it makes.
    """
    declared, made, defaults = declare(cls), cast(Any, cls), dict[str, Any]()
    for name, given in declared.items():
        default = given.default if isinstance(given, Field) else given
        if isinstance(given, Field) and given.default_factory is not MISSING:
            default = given.default_factory()
        if default is not MISSING:
            defaults[name] = default
            setattr(cls, name, default)
    required = [name for name in declared if name not in defaults]

    def init(self: object, *values: Any, **given: Any) -> None:
        if values:
            given = _by_name(cls, declared, values, given)
        for name, value in given.items():
            if name not in declared:
                raise TypeError(f"{cls.__qualname__} has no field {name!r}")
            if name not in defaults or value is not defaults[name]:
                setattr(self, name, value)
        if missing := [name for name in required if name not in given]:
            raise TypeError(f"{cls.__qualname__} needs {', '.join(missing)}")

    made.__init__, made.__repr__, made.__eq__, made.__hash__ = init, _represent, _equal, _hash
    made._compared, made.__signature__ = _COMPARED, _SIGNATURE
    return cls


def declare(cls: type) -> dict[str, Any]:
    """Note the fields of a class that has slots of its own, or none, for ``dataclasses``.

    Returns those that it has itself: the default, the ``field()`` or MISSING of each.
    """
    annotated = inspect.get_annotations(cls)
    known: Any = cls
    known._declared = {
        name: cls.__dict__.get(name, MISSING) for name in annotated if "ClassVar" not in str(annotated[name])
    }
    known.__dataclass_fields__ = _FIELDS
    return dict(known._declared)


def _with_slots(cls: type[T], hashed: Callable[[Any], int] | None) -> type[T]:
    body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    declared = declare(cls)
    for name in declared:
        body.pop(name, None)
    before = getattr(cls, "__match_args__", ())
    by_place = [name for name, default in declared.items() if _by_place(default) and name not in before]
    inherited = {name for base in cls.__mro__[1:] for name in base.__dict__.get("__slots__", ())}
    body["__slots__"] = tuple([name for name in declared if name not in inherited])
    body["__match_args__"] = (*before, *by_place)
    body["_declared"], body["__dataclass_fields__"], body["_compared"] = declared, _FIELDS, _COMPARED
    body["__signature__"] = _SIGNATURE
    for name, shared in _SHARED.items():
        body.setdefault(name, shared)
    if "__eq__" not in body:
        body["__eq__"] = _equal
        body.setdefault("__hash__", hashed)
    metaclass: Any = type(cls)
    made: type[T] = metaclass(cls.__name__, cls.__bases__, body)
    made.__qualname__ = cls.__qualname__
    return made


def _by_place(default: object) -> bool:
    """Whether the field may be given without its name."""
    return not isinstance(default, Field) or (default.init and default.kw_only is not True)


def _by_name(cls: type, names: Iterable[str], values: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """All values by the names of their fields. Raises TypeError where there are too many, or one is given twice."""
    by_place = dict(zip(names, values, strict=False))
    if len(by_place) < len(values) or not by_place.keys().isdisjoint(given):
        raise TypeError(f"{cls.__qualname__} is given more values than it has fields, or one of them twice")
    return {**by_place, **given}


# -- what all classes share


def _first_init(self: object, *given: object, **named: object) -> None:
    """Stands for ``__init__`` until the first value of a class is made."""
    cls = next(base for base in type(self).__mro__ if "_declared" in base.__dict__)
    cls.__init__ = _write_init(cls)  # type: ignore[misc]
    cls.__init__(self, *given, **named)  # type: ignore[misc]


def _equal(self: Any, other: Any) -> bool:
    """Equal are those of one class whose compared fields are."""
    return bool(self._compared(self) == self._compared(other)) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(self._compared(self))


def _represent(self: Any) -> str:
    shown = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr)
    return f"{type(self).__qualname__}({shown})"


_SHARED = {"__init__": _first_init, "__repr__": _represent}

# -- what is made for a class when it is needed


def _declared(cls: type) -> dict[str, Any]:
    """The fields of a class, with those of its bases: the default, the ``field()`` or MISSING of each."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        found |= base.__dict__.get("_declared", {})
    return found


def _write_init(cls: type) -> Callable[..., None]:
    """Write ``__init__`` as ``dataclass`` does."""
    known: dict[str, Any] = {"_MADE": _MADE}  # what its code names: beside this the default of the field x as _of_x
    parameters: dict[bool, list[str]] = {True: [], False: []}  # those given by place, and by name alone
    lines = []
    for name, given in _declared(cls).items():
        default: Any = given.default if isinstance(given, Field) else given
        make: Any = given.default_factory if isinstance(given, Field) else MISSING
        known[f"_of_{name}"] = default if make is MISSING else make
        if isinstance(given, Field) and not given.init:
            if known[f"_of_{name}"] is not MISSING:  # else whoever derives it sets it
                lines.append(f"self.{name} = _of_{name}{'' if make is MISSING else '()'}")
            continue
        if make is not MISSING:
            stands_for, value = "=_MADE", f"_of_{name}() if {name} is _MADE else {name}"
        else:
            stands_for, value = "" if default is MISSING else f"=_of_{name}", name
        parameters[_by_place(given)].append(name + stands_for)
        lines.append(f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    by_name = ["*", *parameters[False]] if parameters[False] else []
    exec(f"def __init__({', '.join(['self', *parameters[True], *by_name])}): {'; '.join(lines) or 'pass'}", known)
    init: Callable[..., None] = known["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _write_signature(cls: type) -> inspect.Signature:
    whole = inspect.signature(_write_init(cls))
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _write_fields(cls: type) -> dict[str, Field[Any]]:
    """Have ``dataclasses`` describe a class without slots that has the same fields."""
    kinds: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        kinds |= inspect.get_annotations(base)
    declared = _declared(cls)
    twin = {name: default for name, default in declared.items() if default is not MISSING}
    twin |= {"__annotations__": {name: kinds[name] for name in declared}, "__module__": cls.__module__}
    twin["__doc__"] = cls.__name__  # else ``dataclass`` parses a signature to write one
    described: Any = dataclass(init=False, repr=False, eq=False)(type(cls.__name__, (), twin))
    found: dict[str, Field[Any]] = described.__dataclass_fields__
    return found


def _write_compared(cls: Any) -> Callable[[Any], object]:
    compared = [name for name, given in _declared(cls).items() if not isinstance(given, Field) or given.compare]
    return attrgetter(*compared) if compared else staticmethod(lambda value: ())


class _Later:
    """An attribute of the class that is made at the first look at it."""

    def __init__(self, name: str, make: Callable[[type], object]) -> None:
        self._name, self._make = name, make

    def __get__(self, value: object, cls: type) -> object:
        owner = next(base for base in cls.__mro__ if self._name in base.__dict__)
        if owner.__dict__[self._name] is self:  # else another thread has made it since this one looked
            setattr(owner, self._name, self._make(owner))
        return getattr(owner, self._name)


_FIELDS, _COMPARED = _Later("__dataclass_fields__", _write_fields), _Later("_compared", _write_compared)
_SIGNATURE = _Later("__signature__", _write_signature)
