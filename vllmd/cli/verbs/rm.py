"""Serve models no more, and with --files remove what they were loaded from.

Files that another model needs stay, and so does what lies outside the engines'
cache. A model that a file of the administrator's configures is taken out there.
MODEL may also be a repository of the cache.
"""

from __future__ import annotations

import argparse
import sys
from urllib.parse import quote

from vllmd.cli import show
from vllmd.cli.admin import Admin
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
        told = admin.delete(path, files=arguments.files)
        answers.append(told)
        if not arguments.json:
            show.say(f"{model}: " + "; ".join(filter(None, _said(told))))
    if arguments.json:
        print(show.as_json(answers))
    return 0


def _said(told: dict[str, object]) -> list[str]:
    freed = told.get("freed")
    return [
        "is served no more" if told.get("file") else "",
        f"{show.size(float(str(freed)))} freed" if freed else "",
        str(told.get("kept") or ""),
    ]


def confirm(told: dict[str, object]) -> None:
    """Ask whether what would go may go. Raises Failure if not."""
    removed = told.get("removed")
    if not isinstance(removed, list) or not removed:
        return
    if not sys.stdin.isatty():
        raise Failure("--files removes files; say --yes as well where nobody can be asked", EX_USAGE)
    for path in removed:
        show.say(str(path))
    if input(f"Remove {show.size(float(str(told.get('bytes') or 0)))}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Failure("nothing was removed", EX_USAGE)
