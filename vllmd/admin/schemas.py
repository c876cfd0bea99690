"""Parts of OpenAPI operations, by which a route's row says what it takes and answers; ``openapi`` joins them.

The schemas of answers are drawn from the dataclasses of ``vllmd.api.answers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllmd.api import codec
from vllmd.api.answers import Answer, Error
from vllmd.api.json_types import Schema
from vllmd.api.verbs import REQUIRED, Param

ERROR: Schema = {"description": "what was wrong", "content": {"application/json": {"schema": codec.schema(Error)}}}
TEXT: Schema = {"type": "string"}


def answers(shape: object, status: int = 200, also: Mapping[int, type[Answer]] | None = None) -> Schema:
    """A JSON answer: a dataclass, a tuple of them, or a schema; ``also``: other statuses with their answers."""
    responses = {str(status): _json("as asked", shape if isinstance(shape, dict) else codec.schema(shape))}
    for other, kind in (also or {}).items():
        responses[str(other)] = _json("as asked" if other < 300 else "not as asked", codec.schema(kind))
    return {"responses": {**responses, "default": ERROR}}


def streams(content_type: str, about: str, other: Mapping[str, object] | None = None) -> Schema:
    """An answer that is a stream. ``other``: further content types with their schemas."""
    content = {content_type: {"schema": TEXT}, **(other or {})}
    return {"responses": {"200": {"description": about, "content": content}, "default": ERROR}}


def takes(params: Sequence[Param]) -> Schema:
    """The parameters of an operation: in the path and the query, and as fields of a JSON object in the body."""
    placed, properties = list[Schema](), dict[str, Schema]()
    for param in params:
        if param.place != "body":
            placed.append(_parameter(param))
            continue
        schema = param.kind.schema(text=False)
        schema = {"anyOf": [schema, {"type": "null"}]} if param.default is None else schema
        default = {} if param.default in (REQUIRED, None) else {"default": param.default}
        properties[param.key] = {**schema, **default, **({"description": param.about} if param.about else {})}
    taken: Schema = {"parameters": placed} if placed else {}
    if properties:
        required = [each.key for each in params if each.place == "body" and each.default is REQUIRED]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        taken["requestBody"] = {"required": bool(required), "content": {"application/json": {"schema": schema}}}
    return taken


def takes_object(schema: Mapping[str, object]) -> Schema:
    """A JSON object of this schema as the body, which may be left out."""
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


def doc(*parts: Mapping[str, object], about: str = "") -> Schema:
    """The parts of an operation joined into one."""
    whole: Schema = {}
    for part in parts:
        whole |= part
    return {**whole, "description": about} if about else whole


def _parameter(param: Param) -> Schema:
    """A parameter in the path or the query."""
    schema = param.kind.schema(text=True)
    if param.default == "":  # an empty one is none
        schema.pop("minLength", None)
        schema |= {"pattern": f"^$|{schema['pattern']}"} if "pattern" in schema else {}
    elif param.default not in (REQUIRED, None, False):
        schema["default"] = str(param.default) if schema["type"] == "string" else param.default
    required = {"required": True} if param.default is REQUIRED else {}
    return {"name": param.key, "in": param.place, "description": param.about, "schema": schema, **required}


def _json(about: str, schema: Mapping[str, object]) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}
