"""The client side of the installer: requests of ``vllmctl engine``, and the progress shown meanwhile.

On a machine with vllmd's units the installer's service does the work, for the engines of the whole machine; otherwise,
and with ``--user``, this process does, in the folder in which the user's own daemon looks.
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
SILENCE_SECONDS = 60.0  # after which a silent service is given up; it reports progress twice a second
WORTH_A_LINE_BYTES = 10**7  # a larger download is reported where no terminal is
Done = TypeVar("Done", Installed, Chosen, Removed)
CALLED = {"cpu": "for the CPU", "cuda": "for CUDA"}


def by_service(arguments: Namespace) -> bool:
    """Whether the machine's engines are meant, which only the service changes. Raises Failure with --url."""
    if arguments.url:
        raise Failure("an engine is installed on its own machine: run vllmctl there", EX_USAGE)
    return not arguments.user and not os.environ.get("VLLMD_ENGINES") and os.path.exists(SOCKET)


def own_root(arguments: Namespace) -> Path:
    """The folder that this process changes itself: root's is the machine's, where there is no service."""
    first, *_ = environments.roots()
    is_named = bool(os.environ.get("VLLMD_ENGINES"))
    return environments.SYSTEM if os.geteuid() == 0 and not arguments.user and not is_named else first


def perform(arguments: Namespace, request: Mapping[str, object], answer: type[Done]) -> Done:
    """Do a request of ``installer.requests``, here or by the service, and show the progress. Raises Failure.

    ``answer``: the class of its verb's answer.
    """
    line = show.StatusLine(quiet=arguments.json)

    def say(progress: Progress) -> None:
        is_short = progress.phase in ("resolving", "downloading", "unpacking") and progress.total < WORTH_A_LINE_BYTES
        if line.live or not is_short:
            line.say(lambda _: sentence(progress), f"{progress.phase} {progress.what}")

    try:
        if by_service(arguments):
            return ask_service(request, answer, say)
        logging.getLogger("vllmd.installer").setLevel(logging.ERROR)  # pip's many lines, of which a sentence is made
        own = {key: value for key, value in os.environ.items() if not key.startswith("VLLMD_")}
        done = requests.perform(request, own_root(arguments), say, own)
        assert isinstance(done, answer)
        return done
    except VllmdError as error:
        raise Failure(error.message, STATUSES.get(error.status, EX_UNAVAILABLE)) from None
    finally:
        line.clear()


def sentence(progress: Progress) -> str:
    """The progress in a line: ``downloading torch-2.13.0.whl, 45.2 of 200.1 MB (1.2 GB before)``."""
    text = f"{progress.phase} {progress.what}".rstrip()
    if progress.total:
        text += f", {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
    if progress.fetched and progress.phase == "downloading":
        text += f" ({progress.fetched / 1e6:.0f} MB before)"
    return text


def ask_service(request: Mapping[str, object], answer: type[Done], say: Callable[[Progress], None]) -> Done:
    """Send a request to the installer's service. Returns its last answer; raises Failure."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SILENCE_SECONDS)
        try:
            connection.connect(SOCKET)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = decoded(line)
                    if "done" in message:
                        return answer(**message["done"])
                    if "failed" in message:
                        status = STATUSES.get(message.get("status", 0), EX_UNAVAILABLE)
                        raise Failure(str(message["failed"]), status)
                    say(Progress(**message["progress"]))
        except PermissionError:
            raise Failure(f"you may not use {SOCKET}, which is open to the group vllmd-admin: with sudo it works, and "
                          "vllmctl --user engine installs for yourself", EX_NOPERM) from None  # fmt: skip
        except (OSError, KeyError, TypeError) as error:
            raise Failure(f"the installer broke off ({error}); journalctl -u 'vllmd-installer@*' says why",
                          EX_SOFTWARE) from None  # fmt: skip
    raise Failure("the installer broke off; journalctl -u 'vllmd-installer@*' says why", EX_SOFTWARE)


def environment() -> dict[str, str]:
    """Our variables for proxies and certificates, which only root may hand on to the service."""
    names = (*requests.PROXIES, *requests.CERTIFICATES)
    return {name: os.environ[name] for name in names if os.environ.get(name)} if os.geteuid() == 0 else {}


def install(arguments: Namespace, kind: str, **more: str | bool) -> Installed:
    """Install an engine and use it. ``more``: version, build, index_url, offline, python, use."""
    request = {"verb": "install", "kind": kind, "env": environment(), **{k: v for k, v in more.items() if v != ""}}
    return perform(arguments, request, Installed)


def ensure(arguments: Namespace, kind: str) -> None:
    """Install a kind of engine if it is neither installed nor in PATH, for a verb that needs it. Raises Failure."""
    import shutil

    program = environments.PROGRAMS.get(kind)
    if environments.in_use(kind) or program is None or (program and shutil.which(program)):
        return
    show.say(f"there is no {kind} here yet: installing it", sys.stderr)
    done = install(arguments, kind)
    show.say(f"{kind} {done.version}, {CALLED.get(done.build, '')}, is installed", sys.stderr)
