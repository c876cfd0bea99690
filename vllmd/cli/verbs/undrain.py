"""Give drained GPUs back."""

from __future__ import annotations

import argparse

from vllmd.cli.verbs import drain
from vllmd.cli.verbs.drain import set_drained


def arguments(parser: argparse.ArgumentParser) -> None:
    drain.arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return set_drained(arguments, False)
