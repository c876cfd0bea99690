"""Answers as JSON, from JSON, and as JSON Schema 2020-12, all drawn from the dataclasses of ``answers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from vllmd.api.answers import Answer
from vllmd.api.json_types import Schema

T = TypeVar("T", bound=Answer)
Reader = Callable[[object], object]

MAPPING = get_origin(Mapping[str, object])
LEAVES: Mapping[object, tuple[tuple[type, ...], str, Schema]] = {  # what is accepted, in words, as a schema
    str: ((str,), "a text", {"type": "string"}),
    bool: ((bool,), "true or false", {"type": "boolean"}),
    int: ((int, float), "a number", {"type": "integer", "minimum": 0}),
    float: ((int, float), "a number", {"type": "number"}),
    Mapping: ((dict,), "an object", {"type": "object"}),
}


class Unexpected(ValueError):
    """JSON that is not what it was to be; the message says where, and what was expected there."""


# -- to JSON


def encoded(value: object) -> bytes:
    """``value``, which may hold answers, as compact JSON."""
    return json.dumps(value, separators=(",", ":"), default=plain).encode()


def plain(value: object) -> object:
    """An answer as the JSON object that it is, its parts as they are; for ``json.dumps(default=...)``."""
    return fields(value) if isinstance(value, Answer) else str(value)


def fields(answer: Answer) -> dict[str, object]:
    """The fields that are told."""
    told, sparse = vars(answer), type(answer).sparse
    return {n: each for n, each in told.items() if each is not None or n not in sparse} if sparse else told


# -- from JSON


def parse(kind: type[T], data: object) -> T:
    """The answer in decoded JSON. A field that is not told has its default, one that is not known is kept as it is.

    Raises Unexpected for a value of another type, and where a field is missing that has no default.
    """
    found = _record(kind, data)
    assert isinstance(found, kind)
    return found


def _record(kind: type[Answer], data: object) -> Answer:
    if not isinstance(data, dict):
        raise Unexpected(f"an object was expected, not {_shown(data)}")
    readers, empty = _readers(kind)
    read = {**{name: {} for name in empty}, **data}
    for name, reader in readers.items():
        if name in data:
            try:
                read[name] = reader(data[name])
            except Unexpected as error:
                raise Unexpected(f"{name}: {error}") from None
        elif name not in read and not hasattr(kind, name):
            raise Unexpected(f"{name} is missing")
    answer = object.__new__(kind)
    vars(answer).update(read)
    return answer


def fields_of(kind: type[Answer]) -> Mapping[str, object]:
    """The fields of an answer with their types, those of its bases first."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


_known: dict[type[Answer], tuple[Mapping[str, Reader], frozenset[str]]] = {}


def _readers(kind: type[Answer]) -> tuple[Mapping[str, Reader], frozenset[str]]:
    """How each field is read, and which are an empty object by default; worked out once for each class.

    Any other default is the class's attribute, so that an answer need not have it.
    """
    if kind not in _known:
        hints = fields_of(kind)
        empty = frozenset(name for name, hint in hints.items() if get_origin(hint) is MAPPING)
        _known[kind] = {name: _reader(hint) for name, hint in hints.items()}, empty
    return _known[kind]


def _reader(hint: object) -> Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _reader(arguments[0])
    if origin in (Union, UnionType):
        within = _reader(_not_none(arguments))
        return lambda value: None if value is None else within(value)
    if origin is tuple:
        each = _reader(arguments[0])
        return lambda value: tuple([each(one) for one in _list(value)])
    if isinstance(hint, type) and issubclass(hint, Answer):
        return partial(_record, hint)
    types, words, _ = LEAVES[_leaf(hint)]
    return lambda value: value if isinstance(value, types) else _refuse(words, value)


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise Unexpected(f"a list was expected, not {_shown(value)}")
    return value


def _refuse(words: str, value: object) -> NoReturn:
    raise Unexpected(f"{words} was expected, not {_shown(value)}")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _not_none(arguments: tuple[object, ...]) -> object:
    """X of ``X | None``, which is the only union that answers use."""
    (found,) = (each for each in arguments if each is not NoneType)
    return found


def _leaf(hint: object) -> object:
    """The key into LEAVES: a mapping's values are not looked at, and another word than those of a Literal may come."""
    origin = get_origin(hint)
    return str if origin is Literal else Mapping if origin is MAPPING else hint


# -- as JSON Schema


def schema(hint: object) -> Schema:
    """The schema of a type that answers use. An answer is a reference, see ``components``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return {**schema(arguments[0]), **_annotations(arguments[1:])}
    if origin in (Union, UnionType):
        return {"anyOf": [schema(_not_none(arguments)), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": schema(arguments[0])}
    if origin is Literal:
        return {"const": arguments[0]}
    if origin is MAPPING:
        return {"type": "object", **({} if arguments[1] is object else {"additionalProperties": schema(arguments[1])})}
    if isinstance(hint, type) and issubclass(hint, Answer):
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    return LEAVES[hint][2]


def components(kinds: Iterable[type[Answer]]) -> dict[str, Schema]:
    """The schemas of these answers and of all that stands in them, by name."""
    found: dict[str, Schema] = {}
    todo = list(kinds)
    while todo:
        kind = todo.pop()
        if kind.__name__ not in found:
            fields = fields_of(kind)
            properties = {name: schema(hint) for name, hint in fields.items()}
            required = [name for name in fields if name not in kind.sparse]
            found[kind.__name__] = {"type": "object", "properties": properties, "required": required}
            todo += [each for hint in fields.values() for each in _answers_in(hint)]
    return dict(sorted(found.items()))


def _answers_in(hint: object) -> Iterator[type[Answer]]:
    if isinstance(hint, type) and issubclass(hint, Answer):
        yield hint
    for each in get_args(hint):
        yield from _answers_in(each)


def _annotations(given: tuple[object, ...]) -> Schema:
    """A text describes; an object has further keywords."""
    found: Schema = {}
    for each in given:
        found |= each if isinstance(each, dict) else {"description": each}
    return found
