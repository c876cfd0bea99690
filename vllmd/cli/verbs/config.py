"""Check, show or describe the configuration, without the daemon.

check says everything that is wrong, each with file, line and what would be
right, and whether the engines' programs start. show prints what is in effect
and where each setting comes from. schema prints the JSON Schema for editors.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vllmd.cli import show
from vllmd.cli.arguments import common
from vllmd.cli.failures import EX_CONFIG


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(metavar="check|show|schema", dest="what", required=True)
    for name, about, run_ in (
        ("check", "say everything that is wrong", check),
        ("show", "print what is in effect, and from where", effective),
        ("schema", "print the JSON Schema", schema),
    ):
        sub = what.add_parser(name, help=about, description=about, parents=[common()])
        sub.set_defaults(act=run_)
        if name != "schema":
            sub.add_argument("file", nargs="?", type=Path, metavar="FILE", help="instead of the standard place")


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.act(arguments))


def check(arguments: argparse.Namespace) -> int:
    from vllmd.config.as_daemon import problems_of_daemon
    from vllmd.config.loader import read
    from vllmd.config.replicas import engines_of
    from vllmd.engines.programs import system_daemon_is_meant, troubles

    reading = read(arguments.file)
    config, problems = reading.config, reading.problems or problems_of_daemon(arguments.file, os.environ)
    absent = troubles(engines_of(config.models).values(), system=system_daemon_is_meant())
    warnings = [*config.warnings, *map(str, absent)]
    if arguments.json:
        places = [{"file": p.where.source, "line": p.where.line, "column": p.where.column, "key": p.path,
                   "problem": p.what, "accepted": p.accepted, "nearest": p.nearest} for p in problems]  # fmt: skip
        print(show.as_json({"valid": not problems, "problems": places, "warnings": warnings}))
        return EX_CONFIG if problems else 0
    for warning in warnings:
        show.say(f"warning: {warning}", sys.stderr)
    for problem in problems:
        show.say(str(problem), sys.stderr)
    if not problems:
        files = ", ".join(map(str, config.files)) or "no files (the defaults hold)"
        show.say(f"valid: {len(config.models)} models, read from {files}")
        print("vllmd --check looks at model files and devices as well")
    return EX_CONFIG if problems else 0


def effective(arguments: argparse.Namespace) -> int:
    from vllmd.config.loader import read
    from vllmd.config.present import as_data, as_yaml

    reading = read(arguments.file)
    for problem in reading.problems:
        show.say(str(problem), sys.stderr)
    if any(not problem.unfit for problem in reading.problems):
        return EX_CONFIG
    print(show.as_json(as_data(reading)) if arguments.json else as_yaml(reading).rstrip())
    return 0


def schema(arguments: argparse.Namespace) -> int:
    from vllmd.config.schema import json_schema

    print(show.as_json(json_schema()))
    return 0
