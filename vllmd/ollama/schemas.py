"""What ``/openapi.json`` says of these routes: what of a body is looked at, and that errors are Ollama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]


def maybe(kind: str, **more: Any) -> Schema:
    """A value of this type, or null, which says nothing."""
    return {"type": [kind, "null"], **more}


MODEL: Schema = {"model": {"type": "string", "minLength": 1, "maxLength": 256}}
KEEP_ALIVE: Schema = {"type": ["number", "string", "null"], "description": 'seconds, or a duration such as "5m"'}
TEXTS: Schema = {"type": ["string", "array", "null"], "items": {"type": "string"}}
COMMON: Schema = {**MODEL, "options": maybe("object"), "keep_alive": KEEP_ALIVE}
GENERATES: Schema = {
    **COMMON,
    "stream": maybe("boolean", default=True),
    "format": {"type": ["string", "object", "null"]},
    "think": {"type": ["boolean", "string", "null"]},
    "logprobs": maybe("boolean"),
    "top_logprobs": maybe("integer", minimum=0, maximum=20),
}
MESSAGE: Schema = {"type": "object", "required": ["role"], "properties": {"role": {"type": "string", "minLength": 1}}}
CHAT: Schema = {
    **GENERATES,
    "messages": maybe("array", items=MESSAGE),
    "tools": maybe("array", items={"type": "object"}),
}
GENERATE: Schema = {
    **GENERATES,
    **{name: maybe("string") for name in ("prompt", "suffix", "system", "template")},
    "raw": maybe("boolean"),
    "images": TEXTS,
    "context": maybe("array", items={"type": "integer"}),
}
EMBED: Schema = {**COMMON, "input": TEXTS, "truncate": maybe("boolean"), "dimensions": maybe("integer")}
EMBEDDINGS: Schema = {**COMMON, "prompt": maybe("string")}
COPY: Schema = {"source": MODEL["model"], "destination": MODEL["model"]}
CREATE: Schema = {**MODEL, "from": maybe("string")}
PULL: Schema = {**MODEL, "stream": maybe("boolean", default=True)}

OBJECT: Schema = {"application/json": {"schema": {"type": "object"}}}
LINES: Schema = {"application/x-ndjson": {"schema": {"type": "string"}}}
TEXT: Schema = {"text/plain": {"schema": {"type": "string"}}}
ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def described(takes: Schema | None = None, gives: Schema = OBJECT) -> Schema:
    """A row's description: the members of the body, if it takes one, and the types of its answer."""
    failed = {"description": "what was wrong", "content": {"application/json": {"schema": ERROR}}}
    responses = {"responses": {"200": {"description": "as asked", "content": gives}, "default": failed}}
    if takes is None:
        return responses
    body = {"type": "object", "required": [name for name in MODEL if name in takes], "properties": takes}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}, **responses}
