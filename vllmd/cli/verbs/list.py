"""List all models: the configured ones with their states, and what else the engines' cache holds, with sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllmd.api.answers import Cached, CachedModel, ModelLine
from vllmd.api.verbs import verb
from vllmd.cli import downloads, nothing, show
from vllmd.cli.admin import Admin

ALIASES = ("ls",)
HEAD = ("MODEL", "STATE", "SIZE", "ENGINE", "SOURCE")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status, cached = admin.status(), admin.perform(verb("cached"), Cached, {}).cached
    rows: list[tuple[str, ...]] = []
    for line in status.models:
        source = line.config.model or line.name
        state = "disabled" if line.disabled else show.state(line.state)
        size = size_of(line, cached) or (own_size(source) if not admin.url else 0)
        shown = "(its name)" if source == line.name else source
        rows.append((line.name, state, show.size(size), line.config.engine or show.EMPTY, shown))
    for one in cached:
        if not one.models:
            advice = f"(vllmctl add {one.name} serves it)"
            rows.append((one.name, "cached", show.size(one.size), one.engine or show.EMPTY, advice))
    if arguments.json:
        keys = [name.lower() for name in HEAD]
        print(show.as_json([dict(zip(keys, row, strict=True)) for row in rows]))
        return 0
    if rows:
        print(show.table(HEAD, rows, ("SIZE",), names=("MODEL",), beneath=("SOURCE",)))
    for text in [*downloads.under_way(status), *([] if status.models else nothing.advice(status, cached))]:
        show.say(text)
    return 0


def size_of(line: ModelLine, cached: Sequence[CachedModel]) -> int:
    """Bytes of a model's files in the cache, as far as they are there."""
    return sum(one.size for one in cached if line.name in one.models)


def own_size(source: str) -> int:
    """Bytes of a model's file outside the caches; 0 where it is no file, or may not be read."""
    try:
        return Path(source).stat().st_size if source.startswith("/") and Path(source).is_file() else 0
    except OSError:
        return 0
