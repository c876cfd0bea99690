"""Names for JSON objects that are no dataclass of ``answers``, so that an annotation says whose form they have."""

from __future__ import annotations

from typing import Any

# A form that others decide: OpenAI's or an engine's API, the hub's answers, a file that an earlier version wrote.
# Whoever reads a member checks it there.
ForeignJson = dict[str, Any]

# A JSON Schema, or a part of an OpenAPI document.
Schema = dict[str, object]

# Settings of a model or a key by name, as in vllmd.yaml(5); the loader checks them.
Settings = dict[str, object]
