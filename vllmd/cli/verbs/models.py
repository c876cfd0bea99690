"""List the configured models: engine, source, aliases."""

from __future__ import annotations

import argparse

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
        rows = []
        for line in models:
            engine, source = line.config.engine or show.EMPTY, line.config.model or line.name
            aliases = ", ".join(line.config.aliases or ()) or show.EMPTY
            shown = "(its name)" if source == line.name else source
            rows.append((line.name, show.state(line.state), engine, shown, aliases))
        print(show.table(HEAD, rows, names=("MODEL",), beneath=("SOURCE", "ALIASES")))
    else:
        print(nothing.FIRST_LINE)
    return 0
