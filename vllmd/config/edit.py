"""Changing a model's settings in a YAML text: nothing else of it is touched, comments stay.

PyYAML cannot write a text with its comments back. So the text is composed only to learn where things stand, and
changed as text between these marks; what has no place that could be named so (aliases, models in braces) is left to a
person. The caller reads the result with the loader before it replaces the file.
"""

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
        text = assign_one(text, model, name, value, flat)
    return text


def assign_one(text: str, model: str, name: str, value: str, flat: bool) -> str:
    """``text`` with one setting of the model set. Raises CannotEdit."""
    line = f"{name}: {value}"
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = root if flat else _child(root, "models")[1]
    model_key, node = _child(models, model)
    # 1. A model that is not there is added.
    if model_key is None:
        return add_model(text, root, models, model, line, flat)
    if node.start_mark.index < model_key.end_mark.index:
        raise CannotEdit(f"{model} is written as an alias (*); change it by hand")
    # 2. Of one without settings this is the first: below its key, in place of the null that stands there.
    if not isinstance(node, yaml.MappingNode):
        if node.value not in ("", "null", "~"):
            raise CannotEdit("the model is not a mapping; change it by hand")
        at = model_key.end_mark.index + 1
        return f"{text[:at]}\n{' ' * (model_key.start_mark.column + 2)}{line}{text[max(at, node.end_mark.index) :]}"
    # 3. A setting that is there, under whichever spelling, gets another value.
    row = MODEL.row(name)
    for spelling in (row.name, *row.also) if row else (name,):
        setting_key, old = _child(node, spelling)
        if setting_key is not None:
            return replace_value(text, setting_key, old, value)
    # 4. Any other comes before the model's first one, with the same indentation.
    if node.flow_style:
        at = node.start_mark.index + 1
        return text[:at] + line + (", " if node.value else "") + text[at:]
    first = node.value[0][0].start_mark
    index, column = int(first.index), int(first.column)
    return text[:index] + line + "\n" + " " * column + text[index:]


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


def _child(node: Any, name: str) -> tuple[Any, Any]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next(((key, value) for key, value in pairs if key.value == name), (None, None))


def replace_value(text: str, key: Any, old: Any, value: str) -> str:
    """``text`` with ``value`` in place of the node ``old``, which stands behind ``key``. Raises CannotEdit."""
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


def add_model(text: str, root: Any, models: Any, model: str, line: str, flat: bool) -> str:
    """``text`` with a new model, before the first one, whose only setting is ``line``. Raises CannotEdit."""
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
