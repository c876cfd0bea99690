"""Export the arrivals that were recorded, as simulate reads them: JSON lines.

When each request came, for which model, with whose key, and how many tokens it
took; no prompts and no answers. --anonymous numbers models and keys, and counts
time from the first arrival on.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_CANTCREAT, Failure


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", choices=["export"], metavar="export", help="what to do")
    parser.add_argument("--since", default="7d", metavar="TIME", help="12h, 30d or Unix time (default: 7d)")
    parser.add_argument("--anonymous", action="store_true", help="without names and dates")
    parser.add_argument("-o", "--output", metavar="FILE", help="instead of the standard output")


def run(arguments: argparse.Namespace) -> int:
    query = {"since": arguments.since, "anonymised": arguments.anonymous}
    lines = Admin(arguments).lines("GET", "/admin/trace", "application/x-ndjson", **query)
    number, path = 0, arguments.output

    def private(name: str, flags: int) -> int:  # for its owner alone: a trace tells which key used which model when
        return os.open(name, flags, 0o600)

    try:
        with nullcontext(sys.stdout) if not path else open(path, "w", opener=private) as file:
            for line in lines:
                file.write(line + "\n")
                number += 1
    except OSError as error:
        raise Failure(f"{path or 'the standard output'}: {error.strerror}", EX_CANTCREAT) from None
    if path or not number:
        show.say(f"{show.counted(number, 'arrival')} since {arguments.since}", sys.stderr)
    return 0
