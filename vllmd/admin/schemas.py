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


def asks(**parameters: str) -> Schema:
    """Query parameters that are texts, none of which need be given, and what each is."""
    return {"parameters": [{"name": name, "in": "query", "description": about, "schema": TEXT}
                           for name, about in parameters.items()]}  # fmt: skip


def takes(schema: Schema, *, required: bool = True) -> Schema:
    """A JSON body."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def doc(*parts: Schema, about: str = "") -> Schema:
    """The parts as one."""
    whole: Schema = {}
    for part in parts:
        whole |= part
    return {**whole, "description": about} if about else whole


def placed(parameters: Sequence[Schema]) -> Schema:
    """Parameters in the path and the query."""
    return {"parameters": list(parameters)} if parameters else {}


def _json(about: str, schema: Schema) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}
