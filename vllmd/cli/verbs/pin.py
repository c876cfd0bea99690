"""Keep models loaded: they are never evicted and never sleep."""

from __future__ import annotations

import argparse
from typing import Any

from vllmd.cli import models, show
from vllmd.cli.admin import Admin, model_path


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser)


def run(arguments: argparse.Namespace) -> int:
    return set_pin(arguments, True)


def set_pin(arguments: argparse.Namespace, pinned: bool) -> int:
    """Pin or unpin every model that was named."""

    def act(admin: Admin, model: str) -> Any:
        line = admin.post(model_path(model, "pin"), {"pinned": pinned})
        if not arguments.json:
            show.say(f"{model} is {'pinned' if pinned else 'pinned no more'}, until the daemon restarts or reloads")
        return line

    return models.each(arguments, act)
