"""One request over a connection that systemd has accepted: standard input and output are the connection.

The socket is open to the group vllmd-admin, in which the daemon's own user is, too. The daemon parses what the network
sends, so it is refused: an attacker who takes it over must not change what engines run.
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

REQUEST_SECONDS = 30.0  # in which the request must have come
DAEMON = "vllmd"  # the daemon's user, see units/vllmd.sysusers


def serve(root: Path = environments.SYSTEM) -> int:
    """Answer the request on standard input. Returns an exit status.

    Work ends when the client disconnects: the next line of progress cannot be sent, and nothing is installed that
    nobody would hear of.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # which tidies up what was begun

    os.umask(0o022)
    signal.signal(signal.SIGTERM, stop)
    # pip's settings are those of the unit and its drop-ins. Its cache would double the room that an engine takes.
    names = ("PIP_", *requests.PROXIES, *requests.CERTIFICATES)
    variables = {"PIP_NO_CACHE_DIR": "1", **{key: text for key, text in os.environ.items() if key.startswith(names)}}
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as connection:
        connection.settimeout(REQUEST_SECONDS)

        def send(**fields: Any) -> None:
            connection.sendall(json.dumps(fields).encode() + b"\n")

        try:
            try:
                peer = credentials(connection).uid
                refuse_daemon(peer)
                with connection.makefile("rb") as incoming:
                    request = requests.read(incoming.readline(requests.LONGEST))
                requests.check_allowed(request, trusted=peer in (0, os.geteuid()))
                done = requests.perform(request, root, lambda now: send(progress=asdict(now)), variables)
                send(done=asdict(done))
            except VllmdError as error:
                send(failed=error.message, status=error.status)
        except ConnectionError:
            print("the client has disconnected: nothing was changed", file=sys.stderr)
            return 1
        except OSError as error:
            send(failed=f"the installer failed: {error}", status=500)
            return 1
    return 0


def refuse_daemon(peer: int) -> None:
    """Raise Forbidden for the daemon's user."""
    try:
        daemon = pwd.getpwnam(DAEMON).pw_uid
    except KeyError:
        return
    if peer == daemon:
        raise Forbidden(f"the user {DAEMON} runs the daemon, which installs and removes no engines: use vllmctl engine "
                        "as a member of the group vllmd-admin, or with sudo")  # fmt: skip
