"""Replay a trace of requests under a virtual clock, and compare policies."""

from __future__ import annotations

import argparse

TAKES_ALL = True  # the simulator reads its arguments itself


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs="*", metavar="...", help="the simulator's own: vllmctl simulate --help")


def run(arguments: argparse.Namespace) -> int:
    from vllmd.cli.terminal import Working
    from vllmd.simulate import run_cli

    return int(run_cli(arguments.rest, Working))
