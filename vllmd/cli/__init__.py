"""vllmctl: one file per verb in ``verbs/``, found by its name and imported only when it is asked for.

    arguments  the argument parser, built from the verbs
    admin      the admin API over its Unix socket or a URL
    failures   what goes wrong, in words, with an exit status of sysexits(3)
    show       sizes, times, states: how each is written
    terminal   tables and prose that fit a terminal, a line that shows that something is under way
    completion shell completion, generated from the parser

No httpx, no asyncio: ``vllmctl ps`` is for people who wait for it.
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
        _forget_stdout()
        return EX_PIPE
    except OSError as error:
        say(f"vllmctl: {error}", sys.stderr)
        return EX_SOFTWARE


def _forget_stdout() -> None:
    """Keep the interpreter from complaining, as it ends, of a reader that has gone."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
