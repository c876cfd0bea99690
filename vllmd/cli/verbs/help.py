"""Show what vllmctl can do, or what a verb does."""

from __future__ import annotations

import argparse

from vllmd.cli.arguments import build, verbs


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("about", nargs="?", metavar="VERB", help="which one (default: all of them)")


def run(arguments: argparse.Namespace) -> int:
    parser = build(verbs())
    if arguments.about:
        parser.parse_args([arguments.about, "--help"])
    parser.print_help()
    return 0
