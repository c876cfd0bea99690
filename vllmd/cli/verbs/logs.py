"""Show the log of a model's engine, of this run and of earlier ones.

It is in the journal, so this runs journalctl. Without a journal that you may
read, or with --url, the daemon shows the last run's lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllmd.api.answers import ModelLine, Status
from vllmd.cli import models
from vllmd.cli.admin import Admin, user_socket
from vllmd.text import printable

ALIASES = ("log",)
LINES = 50


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what it writes, until interrupted")
    about = f"the last N lines (default: {LINES}, or with --since all of them)"
    parser.add_argument("-n", "--lines", type=int, metavar="N", help=about)
    parser.add_argument("--since", metavar="TIME", help="from then on, as journalctl understands it, such as -1h")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status = admin.status()
    line = models.find(status, arguments.model)
    backend = status.backend
    user = backend == "systemd-user" or admin.path == user_socket()
    readable = shutil.which("journalctl") and (user or journal_is_readable())
    if admin.url or not backend.startswith("systemd") or not readable:
        return print_from_daemon(admin, line, arguments)
    names = engines(status, line)
    command = journalctl(matches(status, names, user=user), arguments)
    if arguments.since and arguments.lines is not None and not arguments.follow:
        return last_lines(command, max(0, arguments.lines))
    return subprocess.call(command)


def last_lines(command: list[str], lines: int) -> int:
    """Print the last of a command's lines: with --since journalctl of systemd 252 would print the first ones."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout
        for line in deque(process.stdout, lines):
            print(line, end="")
    return process.returncode


def journal_is_readable(folders: Sequence[str] = ("/var/log/journal", "/run/log/journal")) -> bool:
    """Whether this user may read the system's journal."""
    return any(os.access(file, os.R_OK) for folder in folders for file in Path(folder).glob("*/system.journal"))


def engines(status: Status, line: ModelLine) -> list[str]:
    """The engines whose lines are meant; a first replica may have been started when the model had one engine."""
    firsts = {model.replicas[0].name: model.name for model in status.models if model.replicas}
    names = [each.name for each in line.replicas or (line,)]
    return [*(firsts[name] for name in names if name in firsts), *names]


def matches(status: Status, names: Sequence[str], user: bool) -> list[str]:
    """journalctl's arguments for the engines' units: a pattern of names, or each unit where that matches too many."""
    from vllmd.config.names import unit_pattern

    others = {name for each, _ in models.every(status) for name in [each.name]} - {*names}
    shared = {unit_pattern(name) for name in names} & {unit_pattern(name) for name in others}
    units = known_units(names) if shared else []
    return [f"--{'user-' * user}unit={unit}" for unit in units or [unit_pattern(name) for name in names]]


def known_units(names: Sequence[str]) -> list[str]:
    """The units of the engines' runs, from the records that the daemon wrote when it started each."""
    models_of = dict.fromkeys(name.rpartition("@")[0] or name for name in names)
    fields = [f"MODEL={name}" for name in {**models_of, **dict.fromkeys(names)}]
    shape = ["--output=json", "--output-fields=MODEL,VLLMD_REPLICA,VLLMD_UNIT", "--quiet", "--no-pager"]
    command = ["journalctl", *shape, "SYSLOG_IDENTIFIER=vllmd", *fields]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    units = dict[str, None]()
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            unit, engine = record.get("VLLMD_UNIT"), record.get("VLLMD_REPLICA") or record.get("MODEL")
            if engine in names and isinstance(unit, str):
                units[unit] = None
    return list(units)


def journalctl(units: list[str], arguments: Any) -> list[str]:
    """The command that shows the engines' lines."""
    command = ["journalctl", "--no-pager", "--no-hostname", "--output=short-iso", *units]
    if not arguments.since:
        command.append(f"--lines={max(0, LINES if arguments.lines is None else arguments.lines)}")
    if arguments.json:
        command.append("--output=json")
    if arguments.since:
        command.append(f"--since={arguments.since}")
    return [*command, "--follow"] if arguments.follow else command


def print_from_daemon(admin: Admin, line: ModelLine, arguments: argparse.Namespace) -> int:
    """Print the lines that the daemon has, of each replica, or with --follow of the model."""
    from urllib.parse import quote

    lines = min(10_000, max(0, LINES if arguments.lines is None else arguments.lines))
    names = [each.name for each in line.replicas or (line,)]
    for name in names if not arguments.follow else [line.name]:
        if len(names) > 1 and not arguments.follow:
            print(f"== {name}")
        path = f"/admin/logs/{quote(name, safe='')}"
        for text in admin.lines("GET", path, "text/plain", lines=lines, follow=arguments.follow):
            print(printable(text), flush=True)
    return 0
