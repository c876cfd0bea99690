"""Stop models after their requests, and forget failures."""

from __future__ import annotations

import argparse

from vllmd.cli import models

ALIASES = ("unload",)


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)
    parser.add_argument("-f", "--force", action="store_true", help="break off running requests")
    parser.add_argument("--no-wait", action="store_true", help="ask for it and return")


def run(arguments: argparse.Namespace) -> int:
    return models.follow(arguments, "unload", {"force": arguments.force})
