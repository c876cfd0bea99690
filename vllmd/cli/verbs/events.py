"""Show decisions as they are made, until interrupted."""

from __future__ import annotations

import argparse
import json
import time

from vllmd.api.answers import Decision
from vllmd.api.codec import plain
from vllmd.cli import show
from vllmd.cli.admin import Admin, decoded, understood


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="of this model only, or of this replica")


def run(arguments: argparse.Namespace) -> int:
    for line in Admin(arguments).lines("GET", "/admin/events", "text/event-stream"):
        if not line.startswith("data: "):
            continue
        event = understood(Decision, decoded(line.removeprefix("data: ")))
        if not arguments.model or concerns(event, arguments.model):
            if arguments.json:
                print(json.dumps(event, default=plain), flush=True)
            else:
                show.say(in_words(event))
    return 0


def concerns(event: Decision, model: str) -> bool:
    """Whether the decision is about the model, or about a replica of it."""
    name = event.model
    return name == model or name.startswith(f"{model}@")


def in_words(decision: Decision) -> str:
    """``19:31:02 evict qwen: because ...``; of a failure its sentence, without the engine's log below it.

    A decision about devices names no model.
    """
    at = moment(decision.at, time.time())
    what, why = show.paint(decision.what, "bold"), show.first_line(decision.why)
    return f"{show.paint(at, 'grey')} {what}{decision.model and f' {decision.model}'}: {why}"


def moment(at: float, now: float) -> str:
    """A moment as ``19:31:02``, with the date if it is on another day than ``now``. Both in Unix time."""
    then = time.localtime(at)
    today = then[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
