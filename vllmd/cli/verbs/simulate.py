"""Replay a trace of requests, or the daemon's own traffic, under a virtual clock, and compare policies."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator

TAKES_ALL = True  # the simulator reads its arguments itself


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs="*", metavar="argument", help="the simulator's own: vllmctl simulate --help")


def run(arguments: argparse.Namespace) -> int:
    from vllmd.cli.terminal import Working
    from vllmd.simulate import run_cli

    return int(run_cli(arguments.rest, Working, recorded))


@contextlib.contextmanager
def recorded(options: argparse.Namespace) -> Iterator[str]:
    """The daemon's own traffic as a file. Raises Failure."""
    from vllmd.cli.admin import Admin
    from vllmd.cli.failures import EX_NOINPUT, Failure

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="vllmd-trace-") as file:
        for line in Admin(options).lines("GET", "/admin/trace", "application/x-ndjson", since=options.recorded):
            file.write(line + "\n")
        file.flush()
        if not file.tell():
            raise Failure("nothing was recorded in that time", EX_NOINPUT)
        yield file.name
