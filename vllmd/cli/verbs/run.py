"""Talk with a model; one that is not here is fetched and added first.

With PROMPT, or something on the standard input, it prints the answer and ends;
else each line is a message, as in chat. MODEL is the name of a configured
model, or what pull takes.
"""

from __future__ import annotations

import argparse
import sys

from vllmd.api.answers import ModelLine, Status
from vllmd.cli import downloads, models, show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import Failure
from vllmd.cli.verbs import chat

INSTALLED = ("llama.cpp", "vllm")  # kinds of engine that a model which is fetched may need


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2, ORG/NAME[:QUANT], or a configured one")
    parser.add_argument("message", nargs="*", metavar="PROMPT", help="ask this, print the answer, and end")
    chat.options(parser)


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    arguments.model = here(admin, arguments)
    talk = chat.Conversation(admin, arguments)
    prompt = " ".join(arguments.message)
    if not sys.stdin.isatty():
        prompt = "\n\n".join(filter(None, (prompt, sys.stdin.read().strip() if not prompt else piped())))
    if prompt:
        talk.ask(prompt)
    elif sys.stdin.isatty():
        chat.converse(talk)
    return 0


def here(admin: Admin, arguments: argparse.Namespace) -> str:
    """The configured name of the model, after fetching and adding it, and installing its engine, if need be."""
    status = admin.status()
    line = _configured(status, arguments.model)
    if line is None:
        last = downloads.follow(admin, arguments.model, add=True, quiet=False)
        if last.added:
            show.say(f"{last.model} was fetched ({show.size(last.total)}) and added", sys.stderr)
        line = _configured(admin.status(), last.model) or ModelLine(last.model, "stopped")
    elif not line.failure:
        return line.name
    kind = line.config.engine or ""
    if not admin.url and kind in INSTALLED:
        from vllmd.cli import installing

        installing.ensure(arguments, kind)
    return line.name


def _configured(status: Status, name: str) -> ModelLine | None:
    try:
        return models.find(status, name)
    except Failure:
        return None


def piped() -> str:
    """The text of a pipe or a file on the standard input; "" at once where nothing writes there."""
    import select
    import stat
    from os import fstat

    mode = fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISREG(mode):
        return sys.stdin.read().strip()
    ready = stat.S_ISFIFO(mode) and select.select([sys.stdin], [], [], 0.2)[0]
    return sys.stdin.read().strip() if ready else ""
