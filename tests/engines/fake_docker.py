"""In the place of docker and dockerd: ``run --name NAME -p 127.0.0.1:PORT:PORT IMAGE ARGUMENT...``, ``stop NAME``.

As with the real one a container is dockerd's child, not the client's: killing the client leaves it
running, and only ``stop`` ends it. The image is a kind of ``standins.py``.
"""

from __future__ import annotations

import json
import socket
import socketserver
import subprocess
import sys
from pathlib import Path

SOCKET = Path(sys.argv[1])
STAND_INS = Path(__file__).with_name("standins.py")


class Dockerd(socketserver.ThreadingUnixStreamServer):
    """Its containers by name; every request is noted beside its socket."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(str(SOCKET), Request)
        self.containers: dict[str, subprocess.Popen[bytes]] = {}
        self.notes = SOCKET.with_name("asked").open("a", buffering=1)


class Request(socketserver.StreamRequestHandler):
    """Answered with the exit status when the container has ended."""

    server: Dockerd

    def handle(self) -> None:
        verb, name, *argv = json.loads(self.rfile.readline())
        if verb == "run":
            self.server.containers[name] = subprocess.Popen([sys.executable, str(STAND_INS), *argv])
        container = self.server.containers[name]
        print(verb, name, container.pid, file=self.server.notes)
        if verb == "stop":
            container.terminate()
        self.wfile.write(b"%d\n" % container.wait())


def ask(*words: str) -> int:
    with socket.socket(socket.AF_UNIX) as dockerd:
        dockerd.connect(str(SOCKET))
        dockerd.sendall(json.dumps(words).encode() + b"\n")
        return int(dockerd.makefile().readline())


if __name__ == "__main__":
    verb, *words = sys.argv[2:]
    if verb == "daemon":
        Dockerd().serve_forever()
    elif verb == "run":
        name, _, _, *argv = words[words.index("--name") + 1 :]
        sys.exit(ask("run", name, *argv))
    else:
        ask("stop", words[-1])
