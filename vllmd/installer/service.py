"""One request over a connection that systemd has accepted: standard input and output are the connection.

The socket is open to the group vllmd-admin, in which the daemon's own user is, too. The daemon reads what the network
sends, so it is refused: whoever takes it over changes no engine's environment.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from vllmd.credentials import credentials
from vllmd.engines import environments
from vllmd.errors import Forbidden, VllmdError
from vllmd.installer import requests

PATIENCE = 30.0  # seconds in which the request must be here
DAEMON = "vllmd"  # the daemon's user, see units/vllmd.sysusers


def serve(root: Path = environments.SYSTEM) -> int:
    """Answer the request on standard input; an exit status. Ends with the asker: what it would not hear is not done."""
    os.umask(0o022)
    signal.signal(signal.SIGTERM, _stop)  # so that what was begun is tidied up
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as connection:
        connection.settimeout(PATIENCE)

        def tell(**told: Any) -> None:
            connection.sendall(json.dumps(told).encode() + b"\n")

        try:
            try:
                peer = credentials(connection).uid
                _not_the_daemon(peer)
                with connection.makefile("rb") as incoming:
                    request = requests.read(incoming.readline(requests.LONGEST))
                requests.allowed(request, trusted=peer in (0, os.geteuid()))
                done = requests.perform(request, root, lambda now: tell(progress=asdict(now)), _variables())
                tell(done=asdict(done))
            except VllmdError as error:
                tell(failed=error.message, status=error.status)
        except ConnectionError:
            print("the asker has gone: nothing was changed", file=sys.stderr)
            return 1
        except OSError as error:
            tell(failed=f"the installer failed: {error}", status=500)
            return 1
    return 0


def _variables() -> dict[str, str]:
    """For pip: what the unit and its drop-ins say. Nothing is kept in a cache, which would double what it takes."""
    wanted = ("PIP_", *requests.PROXIES, *requests.CERTIFICATES)
    return {"PIP_NO_CACHE_DIR": "1", **{key: value for key, value in os.environ.items() if key.startswith(wanted)}}


def _not_the_daemon(peer: int) -> None:
    """Raises Forbidden for the daemon's user."""
    try:
        daemon = pwd.getpwnam(DAEMON).pw_uid
    except KeyError:
        return
    if peer == daemon:
        raise Forbidden(f"the user {DAEMON} runs the daemon, which installs and removes no engines: use vllmctl engine "
                        "as a member of the group vllmd-admin, or with sudo")  # fmt: skip


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
