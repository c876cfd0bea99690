"""Kill the engine that has a process, as a whole: for one that nothing else ends.

Models end properly with vllmctl stop. A process that is no engine's, but holds a
GPU, is killed with --force, as far as the daemon's user may.
"""

from __future__ import annotations

import argparse

from vllmd.cli import show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pid", type=process, metavar="PID", help="a process, as ps and nvidia-smi number them")
    parser.add_argument("-f", "--force", action="store_true", help="also one that is no engine's but is on a GPU")


def process(text: str) -> int:
    """A process id. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    answer = Admin(arguments).post(f"/admin/processes/{arguments.pid}/kill", None, force=arguments.force)
    if arguments.json:
        print(show.as_json(answer))
    else:
        show.say(answer["message"])
    return 0
