"""Show decisions as they are made, until interrupted."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from vllmd.cli import show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="of this model only")


def run(arguments: argparse.Namespace) -> int:
    for line in Admin(arguments).lines("GET", "/admin/events", "text/event-stream"):
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if not arguments.model or event.get("model") == arguments.model:
            print(json.dumps(event) if arguments.json else told(event), flush=True)
    return 0


def told(decision: dict[str, Any]) -> str:
    """``19:31:02 evict qwen: because ...``; of a failure what led to it, not the log below it."""
    at = time.strftime("%H:%M:%S", time.localtime(decision["at"]))
    what, why = show.paint(decision["what"], "bold"), show.first_line(decision["why"])
    return f"{show.paint(at, 'grey')} {what} {decision['model']}: {why}"
