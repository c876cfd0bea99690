"""Print the completion of vllmctl for a shell.

For bash: source <(vllmctl completion bash). Packages install it where shells
find it by themselves.
"""

from __future__ import annotations

import argparse

from vllmd.cli.failures import Failure


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "models"), help="models prints the models' names")


def run(arguments: argparse.Namespace) -> int:
    if arguments.shell == "models":
        return names(arguments)
    from vllmd.cli.completion import script

    print(script(arguments.shell), end="")
    return 0


def names(arguments: argparse.Namespace) -> int:
    """What completes MODEL: a name a line; silence where the daemon cannot be asked."""
    from vllmd.cli import models
    from vllmd.cli.admin import Admin

    try:
        status = Admin(arguments).status()
    except Failure:
        return 0
    for _, known_as in models.every(status):
        print("\n".join(known_as))
    return 0
