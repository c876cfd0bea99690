"""vllmctl: one file per verb in ``verbs/``, found by its name and imported only when that verb is called.

    arguments  the argument parser, built from the verbs
    admin      the admin API over its Unix socket or a URL
    failures   error messages, each with an exit status of sysexits(3)
    show       how sizes, times and states are written
    terminal   tables and prose that fit a terminal, a line that shows that something is under way
    completion shell completion, generated from the parser

No httpx, no asyncio: their imports would take longer than ``vllmctl ps`` itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns an exit status of sysexits(3)."""
    from vllmd.cli.arguments import parse
    from vllmd.cli.failures import EX_INTERRUPTED, EX_PIPE, EX_SOFTWARE, Failure
    from vllmd.cli.terminal import say
    from vllmd.text import make_legible

    make_legible(sys.stdin, sys.stdout, sys.stderr)
    try:
        arguments = parse(list(sys.argv[1:] if argv is None else argv))
        return int(arguments.run(arguments) or 0)
    except Failure as failure:
        say(f"vllmctl: {failure.message}", sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    except BrokenPipeError:
        import os

        # What is still buffered goes nowhere: the interpreter would write it as it ends, and complain of the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_PIPE
    except OSError as error:
        say(f"vllmctl: {error}", sys.stderr)
        return EX_SOFTWARE
