"""List the configured models: engine, source, aliases."""

from __future__ import annotations

import argparse

from vllmd.api.answers import ModelLine
from vllmd.api.codec import fields
from vllmd.cli import nothing, show
from vllmd.cli.admin import Admin

HEAD = ("MODEL", "STATE", "ENGINE", "SOURCE", "ALIASES")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    models = Admin(arguments).status().models
    if arguments.json:
        print(show.as_json([{"name": line.name, "state": line.state, **fields(line.config)} for line in models]))
    elif models:
        print(show.table(HEAD, [_row(line) for line in models], names=("MODEL",), beneath=("SOURCE", "ALIASES")))
    else:
        print(nothing.FIRST_LINE)
    return 0


def _row(line: ModelLine) -> tuple[str, ...]:
    config = line.config
    source = config.model or line.name
    return (
        line.name,
        show.state(line.state),
        config.engine or show.EMPTY,
        "(its name)" if source == line.name else source,
        ", ".join(config.aliases or ()) or show.EMPTY,
    )
