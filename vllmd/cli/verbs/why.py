"""Show the decisions about a model, with their numbers, and the reason why it waits."""

from __future__ import annotations

import argparse

from vllmd.api.answers import Decisions, ModelLine
from vllmd.api.verbs import verb
from vllmd.cli import models, show, standing
from vllmd.cli.admin import Admin
from vllmd.cli.verbs import ps
from vllmd.cli.verbs.events import in_words


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="the last N decisions (default: 20)")
    parser.add_argument("--numbers", action="store_true", help="with all the numbers")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    line = models.find(admin.status(), arguments.model)
    made = admin.told(verb("decisions"), Decisions, {"model": line.name}).decisions[-max(0, arguments.lines) :]
    if arguments.json:
        print(show.as_json({"model": line, "decisions": made}))
        return 0
    for decision in made:
        items = decision.numbers.items() if arguments.numbers else ()
        numbers = " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in items)  # fmt: skip
        show.say(in_words(decision) + (f" [{numbers}]" if numbers else ""))
    show.say(now(line, bool(made)))
    return 0


def now(line: ModelLine, made: bool) -> str:
    """The state of a model in a sentence. ``made``: whether any decision about it is known."""
    name, ago = line.name, "" if line.since is None else show.age(line.since)
    if line.state == "error":
        text = f"{name} has failed{f' {ago} ago' if ago else ''}: {line.failure}"
    else:
        text = f"{name} is {show.state(line.state)}{f' since {ago}' if ago else ''}"
    if line.replicas or line.standing:
        text += f" ({ps.replicas_of(line)})"
    if line.state != "error" and line.failure:
        text += f"; it failed: {line.failure}"
    if "\n" in line.failure:
        text += f"\nvllmctl logs {name} shows all of its output"
    if line.disabled:
        text += f"; an operator has disabled it: {line.disabled}"
    if line.waiting_for:
        queued = line.queued
        waiting = f"{show.counted(queued, 'request')} wait{'s' * (queued == 1)} for" if queued else "it waits for"
        text += f"; {waiting} {line.waiting_for}"
    return text if made or line.waiting_for else f"{text}; nothing has been decided about it yet"
