"""The words to say in a route's row what it takes and gives; ``openapi`` puts them together.

The schemas themselves are drawn from the dataclasses of ``vllmd.api.answers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllmd.api import codec
from vllmd.api.answers import Answer, Error
from vllmd.api.codec import Schema

ERROR: Schema = {"description": "what was wrong", "content": {"application/json": {"schema": codec.schema(Error)}}}
TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "string", "enum": ["true", "false", "1", "0", "yes", "no", "on", "off"]}


def many(schema: Mapping[str, object]) -> Schema:
    """The schema of a list of such values."""
    return {"type": "array", "items": schema}


def maybe(schema: Mapping[str, object]) -> Schema:
    """The schema of such a value, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(
    required: Mapping[str, object], optional: Mapping[str, object] | None = None, *, closed: bool = False
) -> Schema:
    """An object with these properties; ``closed``: and no others."""
    schema: Schema = {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}
    return {**schema, "additionalProperties": False} if closed else schema


def answers(shape: object, status: int = 200, also: Mapping[int, type[Answer]] | None = None) -> Schema:
    """A JSON answer: a dataclass, a tuple of them, or a schema; ``also``: other statuses with their answers."""
    found = {str(status): _json("as asked", shape if isinstance(shape, dict) else codec.schema(shape))}
    for other, which in (also or {}).items():
        found[str(other)] = _json("as asked" if other < 300 else "not as asked", codec.schema(which))
    return {"responses": {**found, "default": ERROR}}


def streams(content_type: str, about: str, other: Mapping[str, object] | None = None) -> Schema:
    """An answer that comes piece by piece."""
    content = {content_type: {"schema": TEXT}, **(other or {})}
    return {"responses": {"200": {"description": about, "content": content}, "default": ERROR}}


def asks(**parameters: tuple[Mapping[str, object], str]) -> Schema:
    """Query parameters, none of which need be given, and what each is."""
    return placed([{"name": name, "in": "query", "description": about, "schema": schema}
                   for name, (schema, about) in parameters.items()])  # fmt: skip


def takes(schema: Mapping[str, object], *, required: bool = True) -> Schema:
    """OpenAPI's request body: JSON of this schema."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def doc(*parts: Mapping[str, object], about: str = "") -> Schema:
    """The parts of an operation joined into one; their parameters add up."""
    whole: Schema = {}
    for part in parts:
        whole |= part
    return {**whole, "description": about} if about else whole


def placed(parameters: Sequence[Schema]) -> Schema:
    """Parameters in the path and the query."""
    return {"parameters": list(parameters)} if parameters else {}


def _json(about: str, schema: Mapping[str, object]) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}
