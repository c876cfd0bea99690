"""A real daemon with both its sockets and stand-in engines, and the few ways to talk to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Hands the sockets over as systemd does.
BOOT = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds): os.dup2(fd, 3 + number)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, "-m", "vllmd", "--config", sys.argv[3]])
"""


@dataclass(frozen=True)
class Answer:
    """One answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error(self) -> str:
        """An error's message."""
        return str(self.json["error"]["message"])


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Site:
    """A running daemon. Requests go to its TCP address with ``key``, or, as ``admin``, to its admin socket."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.folder / "vllmd.yaml"

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def connect(
        self, *, admin: bool = False, read: bool = False, source: str = "127.0.0.1"
    ) -> http.client.HTTPConnection:
        if admin or read:
            return _Unix(self.folder / ("read.sock" if read else "admin.sock"))
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30, source_address=(source, 0))

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str = "",
        admin: bool = False,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = self.connect(admin=admin)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, fields, answer.read())

    def operate(self, method: str, path: str, body: object = None) -> Any:
        """What the admin socket answers, which must not be an error."""
        answer = self.ask(method, path, body, admin=True)
        assert answer.status < 300, answer.text
        return answer.json

    def chat(self, model: str, key: str = "", **more: object) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return self.ask("POST", "/v1/chat/completions", body, key=key)

    def line(self, model: str) -> dict[str, Any]:
        """The model's line of the status."""
        lines = self.operate("GET", "/admin/status")["models"]
        return next(line for line in lines if line["name"] == model)

    def reconfigure(self, text: str) -> None:
        self.config.write_text(text)
        self.operate("POST", "/admin/reload")


@contextlib.contextmanager
def running(
    folder: Path, config: str, address: str = "127.0.0.1", names: str = "http:admin:read", limit: float = 60.0
) -> Iterator[Site]:
    """A daemon with this configuration and these sockets, ready, until the end of the block."""
    (folder / "vllmd.yaml").write_text(config)
    (folder / "vllmd.yaml").chmod(0o640)
    with (
        socket.create_server((address, 0)) as clients,
        socket.create_server(str(folder / "admin.sock"), family=socket.AF_UNIX) as operators,
        socket.create_server(str(folder / "read.sock"), family=socket.AF_UNIX) as onlookers,
        (folder / "daemon.log").open("w") as log,
    ):
        port, fds = clients.getsockname()[1], (clients.fileno(), operators.fileno(), onlookers.fileno())
        command = [sys.executable, "-c", BOOT, ",".join(map(str, fds)), names, str(folder / "vllmd.yaml")]
        environment = {**os.environ, "HOME": str(folder), "HF_HOME": str(folder / "hf")}
        process = subprocess.Popen(command, pass_fds=fds, stdout=log, stderr=log, cwd=REPOSITORY, env=environment)
    site = Site(folder, port, process)
    try:
        until(lambda: site.ask("GET", "/health/ready", admin=True).status in (200, 503) and opened(site), limit)
        yield site
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def opened(site: Site) -> bool:
    return bool(site.operate("GET", "/admin/status")["opened"])


def until(happened: Any, limit: float = 60.0) -> None:
    """Wait until ``happened()``, looked at again and again: another process decides when. Fails after ``limit`` s."""
    deadline = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < deadline, f"not within {limit} s"
        time.sleep(0.02)
