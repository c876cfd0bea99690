"""Start or wake models, and wait until they serve."""

from __future__ import annotations

import argparse

from vllmd.cli import models

ALIASES = ("load",)


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="ask for it and return")


def run(arguments: argparse.Namespace) -> int:
    return models.follow(arguments, "load", {}, "; its output: vllmctl logs {model}")
