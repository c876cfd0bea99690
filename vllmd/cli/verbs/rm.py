"""Remove added models, and with --files the files they were loaded from.

Files that another model needs stay, and so do files outside the engines' cache.
A model of the administrator's own configuration has to be removed there. MODEL
may also be a repository of the cache.
"""

from __future__ import annotations

import argparse
import sys
from urllib.parse import quote

from vllmd.api.answers import Removed
from vllmd.cli import show
from vllmd.cli.admin import Admin, understood
from vllmd.cli.failures import EX_USAGE, Failure

ALIASES = ("remove",)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name of an added model, or ORG/NAME in the cache")
    parser.add_argument("-f", "--files", action="store_true", help="remove its files in the engines' cache as well")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask before files are removed")


def run(arguments: argparse.Namespace) -> int:
    admin, answers = Admin(arguments), []
    for model in arguments.models:
        path = f"/admin/store/models/{quote(model, safe='')}"
        if arguments.files and not arguments.yes:
            confirm(admin.delete(path, files=True, dry=True))
        answer = understood(Removed, admin.delete(path, files=arguments.files))
        answers.append(answer)
        if not arguments.json:
            served = "is not served any more" if answer.file else ""
            freed = f"{show.size(answer.freed)} freed" if answer.freed else ""
            show.say(f"{model}: " + "; ".join(filter(None, (served, freed, answer.kept))))
    if arguments.json:
        print(show.as_json(answers))
    return 0


def confirm(planned: dict[str, object]) -> None:
    """Ask whether the files of a dry run may be removed. Raises Failure if not."""
    removed = planned.get("removed")
    if not isinstance(removed, list) or not removed:
        return
    if not sys.stdin.isatty():
        raise Failure("--files removes files; say --yes as well where nobody can be asked", EX_USAGE)
    for path in removed:
        show.say(str(path))
    if input(f"Remove {show.size(float(str(planned.get('bytes') or 0)))}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Failure("nothing was removed", EX_USAGE)
