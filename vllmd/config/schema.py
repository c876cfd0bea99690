"""The table of settings as JSON Schema, for editors (``# yaml-language-server: $schema=...``)."""

from __future__ import annotations

from typing import Any

from vllmd.config.engine_kinds import ALSO, ENGINE_KINDS
from vllmd.config.settings import DEFAULTS_OF_KIND, LEGACY, ROOT, Group, Leaf, Setting


def json_schema() -> dict[str, Any]:
    """The schema of vllmd.yaml (draft 2020-12)."""
    root = group_schema(ROOT)
    _of_kinds(root["properties"]["defaults"]["anyOf"][0])
    root["properties"].update(_legacy())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllmd.yaml(5)",
        "description": ROOT.doc,
        **root,
        "$defs": {"of_kind": {"description": DEFAULTS_OF_KIND.doc, **group_schema(DEFAULTS_OF_KIND)}},
    }


def group_schema(group: Group) -> dict[str, Any]:
    """A mapping with exactly the group's keys, in every spelling."""
    properties = {name: _row(group, row) for row in group.rows for name in (row.name, *row.also)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _of_kinds(defaults: dict[str, Any]) -> None:
    """``defaults`` has a mapping for each kind of engine, plug-ins' included."""
    reference = {"$ref": "#/$defs/of_kind"}
    rows = defaults["properties"]
    for kind in (*ENGINE_KINDS, *ALSO):
        rows[kind] = {"anyOf": [rows[kind], reference]} if kind in rows else reference
    defaults["additionalProperties"] = reference


def _row(group: Group, row: Setting) -> dict[str, Any]:
    kind = row.kind
    if isinstance(kind, Group):
        return {"description": kind.doc, **_nested(row, kind)}
    text = Leaf(row.name, group, row).default_text()
    about = f"{row.doc} Accepted: {kind.accepts}." + (f" Default: {text}." if text else "")
    return {"description": about, **kind.schema}


def _nested(row: Setting, group: Group) -> dict[str, Any]:
    schema = group_schema(group)
    if row.many == "list":
        return {"type": ["array", "null"], "items": schema}
    if row.many == "map":
        entry = {"anyOf": [schema, *group.forms, {"type": "null"}]}
        return {"type": ["object", "null"], "additionalProperties": entry}
    word = [{"enum": ["never", "off"]}] if "never" in group.accepts else []
    switch = [{"type": "boolean"}] if group.optional else []
    return {"anyOf": [schema, *word, *switch, *group.forms, {"type": "null"}]}


def _legacy() -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for row in LEGACY:
        if row.key:
            section, key = row.key.split(".")
            empty = {"type": "object", "additionalProperties": False, "properties": {}, "deprecated": True}
            about = {"description": f"Another system's name of {row.path}."}
            sections.setdefault(section, empty)["properties"][key] = about
    return sections
