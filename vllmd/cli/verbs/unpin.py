"""Let models be evicted and sleep again."""

from __future__ import annotations

import argparse

from vllmd.cli import models
from vllmd.cli.verbs.pin import set_pin


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)


def run(arguments: argparse.Namespace) -> int:
    return set_pin(arguments, False)
