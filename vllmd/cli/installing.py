"""What ``vllmctl engine`` asks to be done, by whom, and how it is shown while it lasts.

On a machine with vllmd's units it is the installer's service that does it, for all users' engines; otherwise, and with
``--user``, it is done here and now, in the folder in which the user's own daemon looks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from vllmd.cli import show
from vllmd.cli.admin import decoded
from vllmd.cli.failures import EX_NOPERM, EX_SOFTWARE, EX_UNAVAILABLE, EX_USAGE, STATUSES, Failure
from vllmd.engines import environments
from vllmd.errors import VllmdError
from vllmd.installer import requests
from vllmd.installer.install import Installed
from vllmd.installer.pip import Progress
from vllmd.installer.requests import Chosen, Removed

SOCKET = "/run/vllmd/installer.sock"
SILENCE = 60.0  # seconds after which a service that says nothing is given up; it says something twice a second
WORTH_A_LINE = 10**7  # bytes of a download that is told where no terminal is
Done = TypeVar("Done", Installed, Chosen, Removed)
CALLED = {"cpu": "for the CPU", "cuda": "for CUDA"}


def by_service(arguments: Namespace) -> bool:
    """Whether it is the machine's engines that are meant, and the service that changes them."""
    if arguments.url:
        raise Failure("an engine is installed on its own machine: run vllmctl there", EX_USAGE)
    return not arguments.user and not os.environ.get("VLLMD_ENGINES") and os.path.exists(SOCKET)


def own_root(arguments: Namespace) -> Path:
    """The folder that we change ourselves: root's is the machine's, where there is no service."""
    first, *_ = environments.roots()
    told = os.environ.get("VLLMD_ENGINES")
    return environments.SYSTEM if os.geteuid() == 0 and not arguments.user and not told else first


def perform(arguments: Namespace, request: Mapping[str, object], answer: type[Done]) -> Done:
    """Have a request of ``installer.requests`` done, and show how far it is. Raises Failure.

    ``answer``: the class of its verb's answer.
    """
    line = show.StatusLine(quiet=arguments.json)

    def told(progress: Progress) -> None:
        if (
            line.live
            or progress.total >= WORTH_A_LINE
            or progress.phase not in ("resolving", "downloading", "unpacking")
        ):
            line.say(lambda _: sentence(progress), f"{progress.phase} {progress.what}")

    try:
        if by_service(arguments):
            return _by_service(request, answer, told)
        logging.getLogger("vllmd.installer").setLevel(logging.ERROR)  # pip's many lines, of which a sentence is made
        own = {key: value for key, value in os.environ.items() if not key.startswith("VLLMD_")}
        done = requests.perform(request, own_root(arguments), told, own)
        assert isinstance(done, answer)
        return done
    except VllmdError as error:
        raise Failure(error.message, STATUSES.get(error.status, EX_UNAVAILABLE)) from None
    finally:
        line.clear()


def sentence(progress: Progress) -> str:
    """How far it is, in a line: ``downloading torch-2.13.0.whl, 45.2 of 200.1 MB (1.2 GB before)``."""
    text = f"{progress.phase} {progress.what}".rstrip()
    if progress.total:
        text += f", {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
    if progress.fetched and progress.phase == "downloading":
        text += f" ({progress.fetched / 1e6:.0f} MB before)"
    return text


def _by_service(request: Mapping[str, object], answer: type[Done], told: Callable[[Progress], None]) -> Done:
    """Ask the installer's service. Returns its last answer; raises Failure."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SILENCE)
        try:
            connection.connect(SOCKET)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    told_now = decoded(line)
                    if "done" in told_now:
                        return answer(**told_now["done"])
                    if "failed" in told_now:
                        status = STATUSES.get(told_now.get("status", 0), EX_UNAVAILABLE)
                        raise Failure(str(told_now["failed"]), status)
                    told(Progress(**told_now["progress"]))
        except PermissionError:
            raise Failure(f"you may not use {SOCKET}, which is open to the group vllmd-admin: with sudo it works, and "
                          "vllmctl --user engine installs for yourself", EX_NOPERM) from None  # fmt: skip
        except (OSError, KeyError, TypeError) as error:
            raise Failure(f"the installer broke off ({error}); journalctl -u 'vllmd-installer@*' says why",
                          EX_SOFTWARE) from None  # fmt: skip
    raise Failure("the installer broke off; journalctl -u 'vllmd-installer@*' says why", EX_SOFTWARE)


def environment() -> dict[str, str]:
    """The variables of our own that say how the network is reached; they are root's to hand on."""
    names = (*requests.PROXIES, *requests.CERTIFICATES)
    return {name: os.environ[name] for name in names if os.environ.get(name)} if os.geteuid() == 0 else {}


def install(arguments: Namespace, kind: str, **more: str | bool) -> Installed:
    """Install an engine and use it. ``more``: version, build, index_url, offline, python, use."""
    request = {"verb": "install", "kind": kind, "env": environment(), **{k: v for k, v in more.items() if v != ""}}
    return perform(arguments, request, Installed)


def ensure(arguments: Namespace, kind: str) -> None:
    """See that a kind of engine is there, for a verb that needs one: install it where it is not. Raises Failure."""
    if environments.in_use(kind) or (program := environments.PROGRAMS.get(kind)) is None or _in_path(program):
        return
    show.say(f"there is no {kind} here yet: installing it", sys.stderr)
    done = install(arguments, kind)
    show.say(f"{kind} {done.version}, {CALLED.get(done.build, '')}, is installed", sys.stderr)


def _in_path(program: str) -> bool:
    import shutil

    return bool(program and shutil.which(program))
