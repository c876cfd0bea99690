"""Put models to sleep after their requests.

Level 1 keeps the weights in host memory, level 2 discards them, level 3 stops
the engine.
"""

from __future__ import annotations

import argparse

from vllmd.cli import models


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)
    parser.add_argument("-l", "--level", type=int, choices=(1, 2, 3), default=1, help="how deep (default: 1)")
    parser.add_argument("--no-wait", action="store_true", help="ask for it and return")


def run(arguments: argparse.Namespace) -> int:
    return models.follow(arguments, "sleep", {"level": arguments.level})
