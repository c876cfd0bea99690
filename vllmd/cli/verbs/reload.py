"""Read the configuration again; models that did not change keep running.

Prints which models changed, and which settings take effect only at the next
start of vllmd (exit status 3). Where vllmd does not run, the file that its next
start reads is checked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from vllmd.api.answers import Reloaded
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import READ_SOCKET, SYSTEM_SOCKET, Admin, user_socket
from vllmd.cli.failures import EX_CONFIG, EX_LATER, EX_NOPERM, Failure
from vllmd.cli.verbs import config

SYSTEMS = (SYSTEM_SOCKET, READ_SOCKET)
SYSTEM_FILE = Path("/etc/vllmd/vllmd.yaml")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing of what vllmd's log says, as for systemctl reload"
    )


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    if not admin.url and not runs(admin.path):
        return check(arguments, system=admin.path in SYSTEMS)
    try:
        answer = admin.perform(verb("reload"), Reloaded, {})
    except Failure as failure:
        if arguments.quiet and failure.status == EX_CONFIG:
            return EX_CONFIG
        raise
    later = answer.later
    if arguments.json:
        print(show.as_json(answer))
    elif not arguments.quiet:
        kinds = {"changed": answer.changed, "added": answer.added, "removed": answer.removed}
        told = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        print("the configuration is loaded" if told else "the configuration is loaded; no model changed")
        for line in (*told, *(f"{path} {what}" for path, what in later.items())):
            show.say(line)
        for warning in answer.warnings:
            show.say(f"warning: {warning}")
    from vllmd.config.reload import LATER

    return EX_LATER if LATER in later.values() else 0


def runs(path: str) -> bool:
    """Whether the daemon of that socket runs; systemd would start one for whoever connects."""
    if path not in (*SYSTEMS, user_socket()):
        return os.path.exists(path)
    try:
        command = ["systemctl", *([] if path in SYSTEMS else ["--user"]), "is-active", "vllmd.service"]
        state = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return True
    return state not in ("inactive", "failed")


def check(arguments: argparse.Namespace, *, system: bool) -> int:
    """Say whether the next start can use the file. Raises Failure where it cannot be read."""
    from vllmd.config.loader import default_file, read

    path = SYSTEM_FILE if system and SYSTEM_FILE.exists() else default_file(os.environ)
    if path.exists() and not os.access(path, os.R_OK):
        raise Failure(f"vllmd does not run; its next start reads {path}, which you may not read", EX_NOPERM)
    arguments.file = path if path.exists() else None
    status = config.check(arguments)
    if not arguments.json:
        fails = any(not problem.unfit for problem in read(arguments.file).problems)
        does = "fails on this" if fails else "serves all other models" if status == EX_CONFIG else "reads this"
        print(f"vllmd does not run: its next start {does}")
    return status
