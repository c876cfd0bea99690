"""Show the version of vllmctl, and of the daemon if it runs."""

from __future__ import annotations

import argparse

import vllmd
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import Failure
from vllmd.cli.verbs.reload import runs


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    known = {"vllmctl": vllmd.__version__, "vllmd": daemon(arguments)}
    print(show.as_json(known) if arguments.json else show.pairs(known))
    return 0


def daemon(arguments: argparse.Namespace) -> str:
    """The daemon's version, without starting a daemon."""
    admin = Admin(arguments)
    try:
        running = bool(admin.url) or runs(admin.path)
        return admin.status(broken=True).version if running else "(does not run)"
    except Failure:
        return "(cannot be asked)"
