"""Show what a model's engine wrote, of this run and of earlier ones.

The journal keeps it: this runs journalctl. Where no journal is, or none that you
may read, or with --url, the daemon is asked for the lines it still has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllmd.cli import models
from vllmd.cli.admin import Admin, user_socket
from vllmd.text import printable

ALIASES = ("log",)


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what it writes, until interrupted")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="the last N lines (default: 50)")
    parser.add_argument("--since", metavar="TIME", help="from then on, as journalctl understands it, such as -1h")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status = admin.status()
    line = models.find(status, arguments.model)
    backend = str(status.get("backend", ""))
    user = backend == "systemd-user" or admin.path == user_socket()
    readable = shutil.which("journalctl") and (user or journal_is_readable())
    if admin.url or not backend.startswith("systemd") or not readable:
        return _from_daemon(admin, line["name"], arguments)
    return subprocess.call(journalctl(engines(status, line), arguments, user=user))


def journal_is_readable(folders: Sequence[str] = ("/var/log/journal", "/run/log/journal")) -> bool:
    """Whether journalctl would show the system's journal to this user; if not, the daemon has the last lines."""
    return any(os.access(file, os.R_OK) for folder in folders for file in Path(folder).glob("*/system.journal"))


def engines(status: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """Whose lines are meant. The first of several replicas may have been started when the model had one engine."""
    firsts = {model["replicas"][0]["name"]: model["name"] for model in status["models"] if model.get("replicas")}
    names = [each["name"] for each in line.get("replicas") or [line]]
    return [*(firsts[name] for name in names if name in firsts), *names]


def journalctl(names: list[str], arguments: Any, user: bool) -> list[str]:
    """The command that shows the engines' lines."""
    from vllmd.config.names import unit_pattern

    units = [f"--{'user-' * user}unit={unit_pattern(name)}" for name in names]
    command = ["journalctl", "--no-pager", "--output=short-iso", *units, f"--lines={max(0, arguments.lines)}"]
    if arguments.json:
        command.append("--output=json")
    if arguments.since:
        command.append(f"--since={arguments.since}")
    return [*command, "--follow"] if arguments.follow else command


def _from_daemon(admin: Admin, name: str, arguments: argparse.Namespace) -> int:
    from urllib.parse import quote

    path, lines = f"/admin/logs/{quote(name, safe='')}", min(10_000, max(0, arguments.lines))
    for line in admin.lines("GET", path, "text/plain", lines=lines, follow=arguments.follow):
        print(printable(line), flush=True)
    return 0
