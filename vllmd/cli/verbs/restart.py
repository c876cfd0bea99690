"""Stop models after their requests, and start them again."""

from __future__ import annotations

import argparse
from typing import Any

from vllmd.api.verbs import verb
from vllmd.cli import models
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)
    parser.add_argument("-f", "--force", action="store_true", help="break off running requests")


def run(arguments: argparse.Namespace) -> int:
    def act(admin: Admin, model: str) -> Any:
        models.change(admin, model, verb("unload"), {"force": arguments.force}, quiet=arguments.json)
        return models.change(admin, model, verb("load"), {}, quiet=arguments.json)

    return models.each(arguments, act)
