"""Show the models and devices, again and again, until interrupted."""

from __future__ import annotations

import argparse
import sys
import time

from vllmd.api.answers import Status
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.values import duration
from vllmd.cli.verbs import gpus, ps

CLEAR = "\033[H\033[J"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--delay", type=duration, default=1.0, metavar="TIME", help="pause (default: 1s)")
    parser.add_argument("-n", "--times", type=int, default=0, metavar="N", help="end after N times")


def run(arguments: argparse.Namespace) -> int:
    admin, shown = Admin(arguments), 0
    while True:
        status = admin.status()
        text = show.as_json(status) if arguments.json else screen(status)
        print((CLEAR if sys.stdout.isatty() else "") + text, flush=True)
        shown += 1
        if shown == arguments.times:
            return 0
        time.sleep(max(0.1, arguments.delay))


def screen(status: Status) -> str:
    """What is shown at a time."""
    busy = sum(line.in_flight for line in status.models)
    waiting = sum(line.queued for line in status.models)
    head = f"vllmd {status.version}, up {show.age(status.uptime)}: {busy} requests run, {waiting} wait"
    parts = [show.paint(head, "bold")]
    if status.devices:
        parts.append(gpus.table(status))
    if status.models:
        parts.append(ps.table(status.models))
    return "\n\n".join(parts)
