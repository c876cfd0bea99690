"""What the endpoints take and give, as JSON Schema 2020-12, and the words to attach it to a route.

``DOC`` of a route is the rest of OpenAPI's operation object; ``openapi`` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
STATES = (
    *("stopped", "starting", "running", "draining", "falling_asleep"),
    *("sleeping_l1", "sleeping_l2", "waking", "stopping", "error"),
)
STANDINGS = ("new", "serving", "resting", "slow", "ejected")


def many(schema: Schema) -> Schema:
    """A list of it."""
    return {"type": "array", "items": schema}


def maybe(schema: Schema) -> Schema:
    """It, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(required: Schema, optional: Schema | None = None, *, closed: bool = False) -> Schema:
    """An object with these properties; ``closed``: and no others."""
    properties = {**required, **(optional or {})}
    schema: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return {**schema, "additionalProperties": False} if closed else schema


def ref(name: str) -> Schema:
    """A schema of the table below."""
    return {"$ref": f"#/components/schemas/{name}"}


STATE: Schema = {"type": "string", "enum": list(STATES)}
MODEL_LINE = {
    "name": TEXT,
    "state": STATE,
    "level": COUNT,
    "devices": many(COUNT),
    "memory": COUNT,
    "in_flight": COUNT,
    "queued": COUNT,
    "oldest_wait": maybe(NUMBER),
    "idle": maybe(NUMBER),
    "since": maybe({**NUMBER, "description": "seconds in that state, where that is known"}),
    "pinned": BOOL,
    "leases": many(TEXT),
    "waiting_for": TEXT,
    "failure": TEXT,
    "pid": maybe(COUNT),
    "unit": TEXT,
    "socket": TEXT,
    "instance": TEXT,
    "phase": TEXT,
    "detail": TEXT,
    "last_start_seconds": maybe(NUMBER),
    "power": maybe({**NUMBER, "description": "watts, its share of its devices"}),
    "started_at": maybe({**NUMBER, "description": "Unix time"}),
    "config": record({}, {"engine": TEXT, "model": TEXT, "aliases": many(TEXT)}),
    "replica_of": {**TEXT, "description": "the model of which it is one of several engines"},
    "standing": {"type": "string", "enum": ["", *STANDINGS]},
    "latency": maybe({**NUMBER, "description": "of a replica: seconds to the first byte of its answers"}),
    "replicas": many(ref("ModelLine")),
    "serving": {**COUNT, "description": "how many of its engines serve"},
    "degraded": {**BOOL, "description": "a replica is down that ought to serve"},
    "rests_in": maybe({**NUMBER, "description": "seconds until it would sleep, sleep deeper or stop for its age"}),
}
DEVICE = {
    "index": COUNT,
    "memory": COUNT,
    "reserve": COUNT,
    "promised": COUNT,
    "external": COUNT,
    "wedged": {**TEXT, "description": "why nothing is put there"},
    "drained": {**BOOL, "description": "by an operator"},
}
DEVICE_NOW = {
    "name": TEXT,
    "id": TEXT,
    "links": {**many(COUNT), "description": "devices that NVLink joins it with"},
    "node": maybe({**COUNT, "description": "its NUMA node"}),
    "power": maybe({**NUMBER, "description": "watts"}),
    "temperature": maybe({**NUMBER, "description": "degrees Celsius"}),
    "throttled": {**TEXT, "description": "why it is slowed down against its will"},
}
DECISION = {"at": NUMBER, "what": TEXT, "model": TEXT, "why": TEXT, "numbers": {"type": "object"}}

INSTANCE: Mapping[str, Schema] = {  # what M's document says of an instance, wherever it is shown
    "status": {"type": "string", "enum": [state.upper() for state in STATES]},
    "pid": maybe(COUNT),
    "port": maybe(COUNT),
    "created_at": maybe(TEXT),
    "updated_at": TEXT,
    "message": TEXT,
}
SCHEMAS: dict[str, Schema] = {
    "Error": record(
        {"error": record({"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)})},
    ),
    "Model": record(
        {
            "id": TEXT,
            "object": {"const": "model"},
            "type": {"const": "model"},
            "created": COUNT,
            "created_at": {**TEXT, "format": "date-time"},
            "owned_by": TEXT,
            "root": TEXT,
            "parent": {**maybe(TEXT), "description": "the model that an adapter or a variant belongs to"},
            "state": STATE,
            "display_name": TEXT,
            "description": TEXT,
            "hidden": {**BOOL, "description": "not in lists"},
            "aliases": many(TEXT),
            "engine": TEXT,
            "max_model_len": {**maybe(COUNT), "description": "the running engine's, else the configured one"},
            "capabilities": many(TEXT),
            "limits": record(
                {"concurrency": maybe(COUNT), "queue": COUNT, "queue_seconds": maybe(NUMBER)},
            ),
            "memory": {**COUNT, "description": "bytes on each of its devices"},
            "discovered": {**BOOL, "description": "found in the cache, not configured"},
        },
        {"members": {**many(TEXT), "description": "of a pool"}},
    ),
    "ModelList": record(
        {
            "object": {"const": "list"},
            "data": many(ref("Model")),
            "has_more": {"const": False},
            "first_id": maybe(TEXT),
            "last_id": maybe(TEXT),
        },
        {"models": {"type": "array", "description": "for Codex, which asks with client_version"}},
    ),
    "Health": record(
        {
            "status": {**TEXT, "description": "ok, or what is wrong"},
            "ready": BOOL,
            "gpu": many(record({**DEVICE, "free": COUNT})),
            "loaded_models": many(TEXT),
            "model_status": {"type": "object", "additionalProperties": STATE},
        }
    ),
    "Alive": record({"status": {"const": "ok"}}),
    "Version": record({"version": TEXT}),
    "ModelLine": record(MODEL_LINE),
    "Status": record(
        {
            "version": TEXT,
            "pid": COUNT,
            "uptime": NUMBER,
            "policy": TEXT,
            "opened": {**BOOL, "description": "devices and engines have been found"},
            "configuration": record({"files": many(TEXT), "error": TEXT}),
            "requests": COUNT,
            "connections": COUNT,
            "backend": TEXT,
            "source": TEXT,
            "trouble": {**TEXT, "description": "why the devices do not answer"},
            "devices": many(record({**DEVICE, **DEVICE_NOW})),
            "host_memory": record({"budget": COUNT, "promised": COUNT}),
            "models": many(ref("ModelLine")),
        }
    ),
    "Device": record(DEVICE),
    "Drain": record({}, {"drained": {**BOOL, "default": True}}, closed=True),
    "Pin": record({}, {"pinned": {**BOOL, "default": True}}, closed=True),
    "Lease": record(
        {"lease": {**TEXT, "minLength": 1, "maxLength": 200, "pattern": "^[^\\x00-\\x1f\\x7f]+$"}},
        {"deadline_seconds": maybe({**NUMBER, "minimum": 0, "maximum": 1e9})},
        closed=True,
    ),
    "Probed": record(
        {
            "model": TEXT,
            "fastest": maybe(TEXT),
            "replicas": many(
                record(
                    {
                        "name": TEXT,
                        "seconds": maybe({**NUMBER, "description": "until its answer; null if there was none"}),
                        "message": {**TEXT, "description": "why there are no seconds"},
                    }
                )
            ),
        }
    ),
    "Decision": record(DECISION),
    "Decisions": record({"decisions": many(ref("Decision"))}),
    "Reloaded": record(
        {name: many(TEXT) for name in ("added", "removed", "changed", "warnings")},
        {"models": COUNT},
    ),
    "Killed": record({"pid": COUNT, "status": {"const": "killed"}, "message": TEXT}),
    "GPUInfo": record(
        {
            "id": COUNT,
            "memory_usage": {**NUMBER, "description": "per cent"},
            "power_draw": maybe({**NUMBER, "description": "watts"}),
            "processes": many(
                record({"pid": COUNT, "name": TEXT, "gpu_memory_usage": maybe({**COUNT, "description": "MiB"})})
            ),
        }
    ),
    "KillProcessResponse": record({"pid": COUNT, "status": {"const": "killed"}, "message": TEXT}),
    "StartRequest": record(
        {"model_name": {**TEXT, "minLength": 1}},
        {"model_type": maybe(TEXT), "gpu_id": maybe(COUNT), "config": maybe({"type": "object"})},
        closed=True,
    ),
    "StopRequest": record(
        {"model_name": {**TEXT, "minLength": 1}},
        {"model_type": maybe(TEXT), "gpu_id": maybe(COUNT)},
        closed=True,
    ),
    "ModelInstanceInfo": record(
        {"model_name": TEXT, "model_type": TEXT, "active_gpu_ids": many(COUNT), "total_instances": COUNT, **INSTANCE}
    ),
    "ModelStatusItem": record({"model_name": TEXT, "model_type": TEXT, "gpu_id": maybe(COUNT), **INSTANCE}),
}

ERROR = {"description": "what was wrong", "content": {"application/json": {"schema": ref("Error")}}}
FLAG: Schema = {"type": "string", "enum": ["true", "false", "1", "0", "yes", "no", "on", "off"]}
WAIT = {"wait": (FLAG, "answer when it has settled, not at once")}


def answers(name: str | Schema, status: int = 200, also: dict[int, str] | None = None) -> Schema:
    """A JSON answer; ``also``: other statuses with the same schema's or another's name."""
    schema = ref(name) if isinstance(name, str) else name
    found = {str(status): _json("as asked", schema)}
    for other, which in (also or {}).items():
        found[str(other)] = _json("as asked" if other < 300 else "not as asked", ref(which))
    return {"responses": {**found, "default": ERROR}}


def streams(content_type: str, about: str, other: Schema | None = None) -> Schema:
    """An answer that comes piece by piece."""
    content = {content_type: {"schema": TEXT}, **(other or {})}
    return {"responses": {"200": {"description": about, "content": content}, "default": ERROR}}


def asks(**parameters: tuple[Schema, str]) -> Schema:
    """Query parameters, none of which need be given."""
    return {"parameters": [_parameter(name, *given) for name, given in parameters.items()]}


def requires(**parameters: tuple[Schema, str]) -> Schema:
    """Query parameters that must be given."""
    return {"parameters": [{**_parameter(name, *given), "required": True} for name, given in parameters.items()]}


def takes(name: str, *, required: bool = True) -> Schema:
    """A JSON body."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": ref(name)}}}}


def doc(*parts: Schema, about: str = "") -> Schema:
    """The parts as one; parameters of several add up."""
    whole: Schema = {}
    for part in parts:
        whole = {**whole, **part, "parameters": [*whole.get("parameters", ()), *part.get("parameters", ())]}
    if not whole.get("parameters"):
        whole.pop("parameters", None)
    return {**whole, "description": about} if about else whole


def _parameter(name: str, schema: Schema, about: str) -> Schema:
    return {"name": name, "in": "query", "description": about, "schema": schema}


def _json(about: str, schema: Schema) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}
