"""Answers as JSON, from JSON, and as JSON Schema 2020-12, all drawn from the dataclasses of ``answers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

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
    """An answer as a dictionary, its parts as they are; for ``json.dumps(default=...)``."""
    return fields(value) if isinstance(value, Answer) else str(value)


def fields(answer: Answer) -> dict[str, object]:
    """The fields that are sent: all but sparse ones that are None."""
    every, sparse = vars(answer), type(answer).sparse
    return {n: each for n, each in every.items() if each is not None or n not in sparse} if sparse else every


# -- from JSON


def parse(kind: type[T], data: object) -> T:
    """An answer from decoded JSON. A missing field has its default; an unknown one is kept as it is.

    Raises Unexpected for a value of another type, and where a field is missing that has no default.
    """
    if not isinstance(data, dict):
        raise Unexpected(f"an object was expected, not {_shown(data)}")
    if kind not in _known:  # worked out once for each class
        hints = fields_of(kind)
        empty = frozenset(name for name, hint in hints.items() if get_origin(hint) is MAPPING)
        _known[kind] = {name: _reader(hint) for name, hint in hints.items()}, empty
    readers, empty_objects = _known[kind]
    values = {**{name: {} for name in empty_objects}, **data}
    for name, reader in readers.items():
        if name in data:
            try:
                values[name] = reader(data[name])
            except Unexpected as error:
                raise Unexpected(f"{name}: {error}") from None
        elif name not in values and not hasattr(kind, name):  # any other default is an attribute of the class
            raise Unexpected(f"{name} is missing")
    answer = object.__new__(kind)
    vars(answer).update(values)
    return answer


def fields_of(kind: type[Answer]) -> Mapping[str, object]:
    """The fields of an answer with their types, those of its bases first."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


# Of each class: how each field is read, and the fields whose default is an empty object.
_known: dict[type[Answer], tuple[Mapping[str, Reader], frozenset[str]]] = {}


def _reader(hint: object) -> Reader:
    """A function that checks a decoded value of this type, and makes answers of the objects in it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _reader(arguments[0])
    if origin in (Union, UnionType):
        within = _reader(_not_none(arguments))
        return lambda value: None if value is None else within(value)
    if origin is tuple:
        each, every = _reader(arguments[0]), _leaf_reader((list,), "a list")
        return lambda value: tuple([each(one) for one in cast(list[object], every(value))])
    if isinstance(hint, type) and issubclass(hint, Answer):
        return partial(parse, hint)
    # A mapping's values are not checked, and another word than those of a Literal may come.
    leaf = str if origin is Literal else Mapping if origin is MAPPING else hint
    types, words, _ = LEAVES[leaf]
    return _leaf_reader(types, words)


def _leaf_reader(types: tuple[type, ...], words: str) -> Reader:
    def read(value: object) -> object:
        if not isinstance(value, types):
            raise Unexpected(f"{words} was expected, not {_shown(value)}")
        return value

    return read


def _shown(value: object) -> str:
    """A value as it is quoted in an error."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _not_none(arguments: tuple[object, ...]) -> object:
    """X of ``X | None``, which is the only union that answers use."""
    (kind,) = (each for each in arguments if each is not NoneType)
    return kind


# -- as JSON Schema


def schema(hint: object) -> Schema:
    """The schema of a type that answers use. An answer is a reference, see ``components``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        described = schema(arguments[0])
        for each in arguments[1:]:  # a text is the description, an object has further keywords
            described = described | (each if isinstance(each, dict) else {"description": each})
        return described
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
    """The schemas of these answers and of all that stand in them, by name."""
    schemas: dict[str, Schema] = {}
    todo = list(kinds)
    while todo:
        kind = todo.pop()
        if kind.__name__ not in schemas:
            fields = fields_of(kind)
            properties = {name: schema(hint) for name, hint in fields.items()}
            required = [name for name in fields if name not in kind.sparse]
            schemas[kind.__name__] = {"type": "object", "properties": properties, "required": required}
            todo += [each for hint in fields.values() for each in _answers_in(hint)]
    return dict(sorted(schemas.items()))


def _answers_in(hint: object) -> Iterator[type[Answer]]:
    if isinstance(hint, type) and issubclass(hint, Answer):
        yield hint
    for each in get_args(hint):
        yield from _answers_in(each)
