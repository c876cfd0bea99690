"""Engines' own metrics with a label that says whose they are, several engines' as one exposition.

Works on Prometheus' text format line by line, so it knows no metric by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?(?P<rest>\s+\S+.*)")
ABOUT = re.compile(r"# (?P<what>HELP|TYPE) (?P<name>\S+)(?P<rest>.*)")
OURS = re.compile(r'(^|,)\s*model\s*=\s*"')
SUFFIXES = ("_total", "_created", "_bucket", "_sum", "_count", "_info")


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """``(model, text)`` pairs as one text: each family once with its HELP and TYPE, then everybody's samples."""
    families: dict[str, _Family] = {}
    for model, text in texts:
        _add(families, model, text)
    return "".join(line for family in families.values() for line in family.lines())


class _Family:
    """A family of metrics: its HELP and TYPE lines, and its samples."""

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.samples: list[str] = []

    def lines(self) -> Iterable[str]:
        return (*self.about.values(), *self.samples) if self.samples else ()


def _add(families: dict[str, _Family], model: str, text: str) -> None:
    label = f'model="{_escaped(model)}"'
    for line in text.splitlines():
        if found := ABOUT.fullmatch(line):
            family = families.setdefault(found["name"], _Family())
            family.about.setdefault(found["what"], line + "\n")
        elif found := SAMPLE.fullmatch(line):
            families.setdefault(_family(families, found["name"]), _Family()).samples.append(_labelled(found, label))


def _family(families: dict[str, _Family], name: str) -> str:
    """The family of a sample: its own name, or that without a suffix such as ``_bucket``."""
    for suffix in SUFFIXES:
        if name not in families and name.removesuffix(suffix) in families:
            return name.removesuffix(suffix)
    return name


def _labelled(found: re.Match[str], label: str) -> str:
    """The sample with our label; one of that name which it has already becomes ``exported_model``."""
    own = OURS.sub(r'\1exported_model="', found["labels"] or "")
    return f"{found['name']}{{{label}{',' if own else ''}{own}}}{found['rest']}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
