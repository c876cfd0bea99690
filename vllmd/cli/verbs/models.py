"""List the configured models: engine, source, aliases."""

from __future__ import annotations

import argparse
from typing import Any

from vllmd.cli import nothing, show
from vllmd.cli.admin import Admin

HEAD = ("MODEL", "STATE", "ENGINE", "SOURCE", "ALIASES")


def arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    models = Admin(arguments).status()["models"]
    if arguments.json:
        print(show.as_json([{"name": line["name"], "state": line["state"], **line["config"]} for line in models]))
    elif models:
        print(show.table(HEAD, [_row(line) for line in models], names=("MODEL",), beneath=("SOURCE", "ALIASES")))
    else:
        print(nothing.FIRST_LINE)
    return 0


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    config = line["config"]
    source = config.get("model") or line["name"]
    return (
        line["name"],
        show.state(line["state"]),
        config.get("engine", show.EMPTY),
        "(its name)" if source == line["name"] else source,
        ", ".join(config.get("aliases", ())) or show.EMPTY,
    )
