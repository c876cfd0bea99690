"""The table of settings as JSON Schema, for editors (``# yaml-language-server: $schema=...``)."""

from __future__ import annotations

from typing import Any

from vllmd.config.engine_kinds import ALSO, ENGINE_KINDS
from vllmd.config.settings import DEFAULTS_OF_KIND, LEGACY, ROOT, Group, Leaf, Setting


def json_schema() -> dict[str, Any]:
    """The schema of vllmd.yaml (draft 2020-12)."""
    root, reference = group_schema(ROOT), {"$ref": "#/$defs/of_kind"}
    # ``defaults`` has a mapping for each kind of engine, plug-ins' included, beside the settings of all models.
    defaults = root["properties"]["defaults"]["anyOf"][0]
    for kind in (*ENGINE_KINDS, *ALSO):
        own = defaults["properties"].get(kind)
        defaults["properties"][kind] = {"anyOf": [own, reference]} if own else reference
    defaults["additionalProperties"] = reference
    for legacy in LEGACY:
        if legacy.key:
            section, key = legacy.key.split(".")
            empty = {"type": "object", "additionalProperties": False, "properties": {}, "deprecated": True}
            about = {"description": f"Another system's name of {legacy.path}."}
            root["properties"].setdefault(section, empty)["properties"][key] = about
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllmd.yaml(5)",
        "description": ROOT.doc,
        **root,
        "$defs": {"of_kind": {"description": DEFAULTS_OF_KIND.doc, **group_schema(DEFAULTS_OF_KIND)}},
    }


def group_schema(group: Group) -> dict[str, Any]:
    """The schema of a mapping with exactly the group's keys, in every spelling."""
    properties = {name: row_schema(group, row) for row in group.rows for name in (row.name, *row.also)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def row_schema(group: Group, row: Setting) -> dict[str, Any]:
    """The schema of one setting's value, short forms included."""
    kind = row.kind
    if not isinstance(kind, Group):
        text = Leaf(row.name, group, row).default_text()
        about = f"{row.doc} Accepted: {kind.accepts}." + (f" Default: {text}." if text else "")
        return {"description": about, **kind.schema}
    schema, null = group_schema(kind), {"type": "null"}
    if row.many == "list":
        return {"description": kind.doc, "type": ["array", "null"], "items": schema}
    if row.many == "map":
        entry = {"anyOf": [schema, *kind.forms, null]}
        return {"description": kind.doc, "type": ["object", "null"], "additionalProperties": entry}
    word = [{"enum": ["never", "off"]}] if "never" in kind.accepts else []
    switch = [{"type": "boolean"}] if kind.optional else []
    return {"description": kind.doc, "anyOf": [schema, *word, *switch, *kind.forms, null]}
