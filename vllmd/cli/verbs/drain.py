"""Take GPUs out of use for maintenance: what runs there ends with its requests, and nothing new comes."""

from __future__ import annotations

import argparse

from vllmd.cli import show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("devices", nargs="+", type=int, metavar="GPU", help="its number in vllmctl gpus")


def run(arguments: argparse.Namespace) -> int:
    return set_drained(arguments, True)


def set_drained(arguments: argparse.Namespace, drained: bool) -> int:
    """Drain or give back every device that was named."""
    admin, answers = Admin(arguments), []
    for device in arguments.devices:
        answers.append(admin.post(f"/admin/devices/{device}/drain", {"drained": drained}))
        if not arguments.json:
            show.say(f"device {device} is {_told(drained)}")
    if arguments.json:
        print(show.as_json(answers))
    return 0


def _told(drained: bool) -> str:
    if not drained:
        return "in use again"
    return "drained until vllmctl undrain, or until the daemon restarts; vllmctl gpus shows what still runs there"
