"""Show the decisions about a model, with their numbers, and the reason why it waits."""

from __future__ import annotations

import argparse

from vllmd.api.answers import Decisions
from vllmd.api.verbs import verb
from vllmd.cli import models, show, standing
from vllmd.cli.admin import Admin
from vllmd.cli.verbs.events import in_words


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="the last N decisions (default: 20)")
    parser.add_argument("--numbers", action="store_true", help="with all the numbers")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    line = models.find(admin.status(), arguments.model)
    made = admin.perform(verb("decisions"), Decisions, {"model": line.name}).decisions[-max(0, arguments.lines) :]
    if arguments.json:
        print(show.as_json({"model": line, "decisions": made}))
        return 0
    for decision in made:
        items = decision.numbers.items() if arguments.numbers else ()
        numbers = " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in items)  # fmt: skip
        show.say(in_words(decision) + (f" [{numbers}]" if numbers else ""))
    show.say(standing.now(line, bool(made)))
    return 0
