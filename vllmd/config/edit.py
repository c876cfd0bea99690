"""Changing a model's settings in a YAML text: nothing else of it is touched, comments stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vllmd.config.present import key as quoted
from vllmd.config.settings import MODEL


class CannotEdit(ValueError):
    """The text is written in a way that only a person should change; the message says which."""


def assign(text: str, model: str, settings: Mapping[str, str], flat: bool = False) -> str:
    """``text`` with the model's ``settings`` (key -> YAML) set; a model that is not there is added.

    ``flat``: the file has no ``models:``, its models stand at the top, as other systems write them.
    """
    for name, value in settings.items():
        text = _assign_one(text, model, name, value, flat)
    return text


def _assign_one(text: str, model: str, name: str, value: str, flat: bool) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = root if flat else _child(root, "models")[1]
    model_key, node = _child(models, model)
    if model_key is None:
        return _add_model(text, root, models, model, f"{name}: {value}", flat)
    if node.start_mark.index < model_key.end_mark.index:
        raise CannotEdit(f"{model} is written as an alias (*); change it by hand")
    if not isinstance(node, yaml.MappingNode):
        return _insert(text, model_key.end_mark.index + 1, f"\n{_indent(model_key, 2)}{name}: {value}", node)
    for spelling in _spellings(name):
        found, old = _child(node, spelling)
        if found is not None:
            return _replace(text, found, old, value)
    return _add_setting(text, node, f"{name}: {value}")


def has_model(text: str, model: str, flat: bool = False) -> bool:
    """Whether the text configures the model."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return _child(root if flat else _child(root, "models")[1], model)[0] is not None


def document(model: str, settings: Mapping[str, Any]) -> str:
    """The text of a file of models.d with this one model; the settings are plain data."""
    inner = (
        yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, default_flow_style=False)
        if settings
        else "{}"
    )
    lines = "".join(f"    {line}\n" for line in inner.splitlines())
    return f"models:\n  {quoted(model)}:\n{lines}"


def models_of(text: str) -> list[str]:
    """The names of the models in a text that has them under ``models:``; none where it is no such text."""
    try:
        models = _child(yaml.compose(text, Loader=yaml.SafeLoader), "models")[1]
    except yaml.YAMLError:
        return []
    return [str(name.value) for name, _ in models.value] if isinstance(models, yaml.MappingNode) else []


def is_flat(text: str) -> bool:
    """Whether a file of models.d has its models at the top."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return isinstance(root, yaml.MappingNode) and _child(root, "models")[0] is None


def _spellings(name: str) -> tuple[str, ...]:
    row = MODEL.row(name)
    return (row.name, *row.also) if row else (name,)


def _child(node: Any, name: str) -> tuple[Any, Any]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next(((key, value) for key, value in pairs if key.value == name), (None, None))


def _replace(text: str, key: Any, old: Any, value: str) -> str:
    if old.start_mark.index < key.end_mark.index:
        raise CannotEdit(f"{key.value} is written as an alias (*); change it by hand")
    start, end = old.start_mark.index, _end(old)
    if start == end:  # an empty value
        return text[: key.end_mark.index + 1] + f" {value}" + text[key.end_mark.index + 1 :]
    if old.start_mark.line != key.end_mark.line:  # a block beneath its key
        return text[: key.end_mark.index + 1] + f" {value}" + text[end:]
    return text[:start] + value + text[end:]


def _end(node: Any) -> int:
    """Where a node's own text ends: a block's mark lies behind the comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return int(node.end_mark.index)
    last = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return _end(last)


def _add_setting(text: str, node: Any, line: str) -> str:
    if not node.flow_style:
        mark = node.value[0][0].start_mark
        at: int = mark.index
        return text[:at] + line + "\n" + " " * int(mark.column) + text[at:]
    at = node.start_mark.index + 1
    return text[:at] + line + (", " if node.value else "") + text[at:]


def _add_model(text: str, root: Any, models: Any, model: str, line: str, flat: bool) -> str:
    entry = f"{quoted(model)}:\n"
    if isinstance(models, yaml.MappingNode) and models.value:
        if models.flow_style:
            raise CannotEdit("the models are written in braces; change it by hand")
        first = models.value[0][0]
        indent = " " * first.start_mark.column
        at = first.start_mark.index - first.start_mark.column
        return text[:at] + f"{indent}{entry}{indent}  {line}\n" + text[at:]
    if flat or (root is not None and _child(root, "models")[0] is not None):
        raise CannotEdit("models: is empty; write the model there by hand")
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}models:\n  {entry}    {line}\n"


def _insert(text: str, at: int, addition: str, node: Any) -> str:
    if node.value not in ("", "null", "~"):
        raise CannotEdit("the model is not a mapping; change it by hand")
    end: int = max(at, node.end_mark.index)
    return text[:at] + addition + text[end:]


def _indent(key: Any, more: int) -> str:
    return " " * int(key.start_mark.column + more)
