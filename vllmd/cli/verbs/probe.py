"""Measure how soon the engines of models answer, all at the same time; the fastest comes first.

Without --all none is waited for once another engine of the model has answered.
"""

from __future__ import annotations

import argparse

from vllmd.api.answers import Probed, ProbedReplica
from vllmd.api.verbs import verb
from vllmd.cli import models, show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_UNAVAILABLE
from vllmd.cli.values import duration

HEAD = ("REPLICA", "ANSWER", "NOTE")
RIGHT = ("ANSWER",)


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, optional=True)
    parser.add_argument("-a", "--all", action="store_true", help="wait for every engine, not only for the fastest")
    parser.add_argument(
        "--limit", type=duration, metavar="TIME", help="how long at most (default: replicas.probe_limit)"
    )


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    named = arguments.models or [line.name for line in admin.status().models if line.serving]
    given = {"all": arguments.all, "limit": arguments.limit}
    answers = [admin.perform(verb("probe"), Probed, {**given, "model": model}) for model in named]
    rows = [row(line) for answer in answers for line in answer.replicas]
    if arguments.json:
        print(show.as_json(answers))
    else:
        print(show.table(HEAD, rows, RIGHT, names=("REPLICA",)) if rows else "no model serves, and a probe loads none")
    return EX_UNAVAILABLE if any(answer.fastest is None for answer in answers) else 0


def row(line: ProbedReplica) -> tuple[str, ...]:
    """An engine, the time until its answer, and why there is none."""
    time = show.EMPTY if line.seconds is None else f"{line.seconds * 1000:.0f}ms"
    return line.name, time, line.message
