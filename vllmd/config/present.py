"""The configuration as it is in effect, written as YAML with the origin of each setting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import yaml

from vllmd.config import secrets, value_types
from vllmd.config.loader import Reading
from vllmd.config.settings import ADAPTER, DEFAULTS, MODEL, POOL, ROOT, SHARES, VARIANT, Group, Setting, default
from vllmd.config.types import Config

HIDDEN = "(hidden)"
SPARSE = (MODEL, VARIANT, ADAPTER, POOL)  # groups by name, of which only what was set is shown
PLAIN = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_./+%-]*( [A-Za-z0-9_./+%-]+)*")


def as_yaml(reading: Reading) -> str:
    """The configuration as ``vllmctl config show`` prints it: valid YAML again, but for the secrets in it."""
    return "".join(_Writer(reading.origins, reading.config).group(ROOT, reading.config, "", 0))


def of_config(config: Config, model: str = "") -> Iterator[str]:
    """The lines of a configuration in force as YAML; ``model``: of that model only, none where it is unknown."""
    writer = _Writer(config.origins, config)
    if not model:
        yield from writer.group(ROOT, config, "", 0)
    elif (known := config.models.get(model)) is not None:
        yield from writer.group(MODEL, known, f"models.{model}.", 0)


def as_data(reading: Reading) -> Any:
    """What ``as_yaml`` writes, as plain data."""
    return yaml.safe_load(as_yaml(reading))


class _Writer:
    """Writes settings as YAML, a line each, with the origin of each as a comment."""

    def __init__(self, origins: Mapping[str, object], config: Config) -> None:
        self.origins = origins
        self.defaults = config.template if config.discover else None  # models yet to be found will need them

    def group(self, group: Group, values: Any, path: str, depth: int) -> Iterator[str]:
        """The group's settings, one a line, indented for ``depth``."""
        for row in group.rows:
            if row.name == "defaults" and self.defaults:
                yield "defaults:\n"
                yield from self.group(DEFAULTS, self.defaults, "defaults.", 1)
            if row.field is None:
                continue
            value, full = getattr(values, row.field or row.name), f"{path}{row.name}"
            if isinstance(row.kind, Group):
                yield from self.nested(row, row.kind, value, full, depth)
            elif value != default(group, row) or ((group not in SPARSE or self.defaults) and value not in (None, ())):
                yield self.line(row, value, full, depth)
            elif group not in SPARSE:
                yield f"{'  ' * depth}# {row.name}: {row.kind.none}\n"

    def nested(self, row: Setting, group: Group, value: Any, path: str, depth: int) -> Iterator[str]:
        if row.many == "map":
            yield from self.by_name(row, group, value, path, depth)
        elif row.many == "list":
            yield from self.listed(row, group, value, path, depth)
        elif value is None and self.defaults:
            yield f"{'  ' * depth}{row.name}: false\n"
        elif is_dataclass(value) and (depth == 0 or group.optional or value != group.target()):
            yield f"{'  ' * depth}{row.name}:\n"
            yield from self.group(group, value, f"{path}.", depth + 1)

    def listed(self, row: Setting, group: Group, values: Any, path: str, depth: int) -> Iterator[str]:
        if not values:
            yield f"{'  ' * depth}{row.name}: {'null  # ask NVML' if values is None else '[]'}\n"
            return
        yield f"{'  ' * depth}{row.name}:\n"
        for index, value in enumerate(values):
            text = "".join(self.group(group, value, f"{path}[{index}].", depth + 2))
            first = "  " * (depth + 2)
            yield "  " * (depth + 1) + "- " + text.removeprefix(first)

    def by_name(self, row: Setting, group: Group, values: Mapping[str, Any], path: str, depth: int) -> Iterator[str]:
        if not values and group is not MODEL:
            return
        yield f"{'  ' * depth}{row.name}:\n" if values else f"{row.name}: {{}}\n"
        for name, value in values.items():
            origin = value.where if group is MODEL else self.origins.get(f"{path}.{name}", "")
            yield f"{'  ' * (depth + 1)}{key(name)}:  # {origin}\n"
            yield from self.group(group, value, f"{path}.{name}.", depth + 2)

    def line(self, row: Setting, value: Any, path: str, depth: int) -> str:
        text, origin = written(row, concealed(row, value) if row.secret else value), self.origins.get(path)
        return f"{'  ' * depth}{row.name}: {text}{f'  # {origin}' if origin else ''}\n"


def written(row: Setting, value: Any) -> str:
    """A value as it would stand in the file."""
    kind = row.kind
    assert not isinstance(kind, Group)
    if kind is SHARES:  # numbers as keys, which JSON would quote
        return kind.show(value)
    if isinstance(value, tuple | Mapping):
        return json.dumps(list(value) if isinstance(value, tuple) else dict(value), ensure_ascii=False, default=str)
    if value is None:
        return kind.none
    if kind is value_types.SHARE:
        return value_types.show_size(value) if isinstance(value, int) else f"{value:g}"
    text = kind.show(value)
    return text if kind.show is not str or isinstance(value, int | float) else key(text)


def concealed(row: Setting, value: Any) -> Any:
    """A value that may hold a secret, less the secret: names, the program of a command, flags, but no values."""
    if row.name == "command":
        return (*value[:1], *(HIDDEN for _ in value[1:]))
    if row.name == "extra_args":
        return secrets.flags_without_secrets(value, HIDDEN)
    if row.kind is not value_types.MAPPINGS:
        return dict.fromkeys(value, HIDDEN) if isinstance(value, Mapping) else HIDDEN
    shown = []
    for settings in value:  # of replicas, as they stand in the file: in whichever form a setting may have there
        entry = dict(settings)
        for name, text in settings.items():
            inner = MODEL.row(name)
            if inner is not None and inner.secret:
                words = tuple(map(str, text)) if isinstance(text, list) else text
                plain = isinstance(words, tuple | Mapping) and inner.kind is not value_types.SECRET
                entry[name] = concealed(inner, words) if plain else HIDDEN
        shown.append(entry)
    return tuple(shown)


def key(text: str) -> str:
    """``text`` as a YAML scalar that is read as that text, quoted where it would be something else."""
    word = text.lower() not in ("null", "true", "false", "yes", "no", "on", "off") and not text[:1].isdigit()
    return text if word and PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
