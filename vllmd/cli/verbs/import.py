"""Turn another system's configuration into a file for models.d.

vllama: its models.yaml. vllm-proxy: its config.yaml. llama-swap: its
config.yaml. What has no counterpart here is said, and left as a comment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllmd.cli import files, show
from vllmd.cli.failures import EX_CANTCREAT, EX_DATAERR, Failure

SYSTEMS = ("vllama", "vllm-proxy", "llama-swap")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", choices=SYSTEMS, help="whose configuration it is")
    parser.add_argument("file", type=Path, metavar="FILE", help="its file; - is the standard input")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="such as /etc/vllmd/models.d/old.yaml")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite the output")


def run(arguments: argparse.Namespace) -> int:
    from vllmd.config.conversion import convert

    try:
        text, dropped = convert(arguments.system, files.existing(arguments.file), str(arguments.file))
    except ValueError as error:
        raise Failure(f"{arguments.file}: {error}", EX_DATAERR) from None
    for line in dropped:
        show.say(f"warning: {line}", sys.stderr)
    if arguments.output is None:
        print(text, end="")
        return 0
    if arguments.output.exists() and not arguments.force:
        raise Failure(f"{arguments.output} exists; --force overwrites it", EX_CANTCREAT)
    files.replace(arguments.output, text)
    show.say(f"written to {arguments.output}; vllmctl config check, then vllmctl reload")
    return 0
