"""The metrics of several engines as one exposition, each sample with the label ``model``.

Works on Prometheus' text format line by line, and knows no metric by name. A family may come from several engines, but
its HELP and TYPE may stand only once, before all of its samples; so families are collected before they are written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?(?P<rest>\s+\S+.*)")
ABOUT = re.compile(r"# (?P<what>HELP|TYPE) (?P<name>\S+)(?P<rest>.*)")
MODEL_LABEL = re.compile(r'(^|,)\s*model\s*=\s*"')
SUFFIXES = ("_total", "_created", "_bucket", "_sum", "_count", "_info")


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """``(model, text)`` pairs as one text: each family once with its HELP and TYPE, then the samples of all models."""
    families: dict[str, Family] = defaultdict(Family)
    for model, text in texts:
        value = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for line in text.splitlines():
            if about := ABOUT.fullmatch(line):
                families[about["name"]].about.setdefault(about["what"], line + "\n")
            elif sample := SAMPLE.fullmatch(line):
                # A sample's family has its name, or the name without a suffix such as _bucket.
                names = [sample["name"], *(sample["name"].removesuffix(suffix) for suffix in SUFFIXES)]
                family = families[next((name for name in names if name in families), sample["name"])]
                # A label "model" that the engine has set becomes "exported_model", as in Prometheus.
                own = MODEL_LABEL.sub(r'\1exported_model="', sample["labels"] or "")
                labels = f'model="{value}"{"," if own else ""}{own}'
                family.samples.append(f"{sample['name']}{{{labels}}}{sample['rest']}\n")
    known = [family for family in families.values() if family.samples]
    return "".join(line for family in known for line in (*family.about.values(), *family.samples))


class Family:
    """A family of metrics: its HELP and TYPE lines, and its samples."""

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.samples: list[str] = []
