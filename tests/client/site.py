"""A real vllmd for the library to talk to, with stand-ins in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.api.answers import ModelLine
from vllmd.client import Client

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BOOT = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http:admin")
os.execv(sys.executable, [sys.executable, "-m", "vllmd", "--config", sys.argv[3]])
"""
# vLLM's place is taken by the stand-in: what it does follows from the model's name.
VLLM = f"""#!/bin/sh
echo "$@" >> {{record}}
case "$2" in
*broken*) echo "OSError: no such model"; exit 1 ;;
*echo*) exec {sys.executable} {HERE}/recording_engine.py "$@" ;;
*slow*) set -- "$@" --load-time 60 ;;
*large*) set -- "$@" --memory 48GiB ;;
esac
exec {sys.executable} -m vllmd.simengine "$@"
"""


@dataclass(frozen=True)
class Stub:
    """A program called vllm, first in PATH, and what it was called with."""

    folder: Path

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def calls(self) -> list[list[str]]:
        record = self.folder / "argv"
        return [line.split() for line in record.read_text().splitlines()] if record.exists() else []


def make_stub(folder: Path) -> Stub:
    program = folder / "vllm"
    program.write_text(VLLM.format(record=folder / "argv"))
    program.chmod(0o755)
    return Stub(folder)


@dataclass(frozen=True)
class Vllmd:
    """A running daemon."""

    url: str
    socket: str
    pid: int

    def client(self) -> Client:
        return Client(f"unix:{self.socket}")

    def line(self, model: str) -> ModelLine:
        """The model's line of the status."""
        with self.client() as client:
            return next(line for line in client.status().models if line.name == model)

    def state(self, model: str) -> str:
        return self.line(model).state


@contextmanager
def running(folder: Path, config: dict[str, Any], env: dict[str, str] | None = None, port: int = 0) -> Iterator[Vllmd]:
    """``vllmd`` with both its sockets given, as systemd gives them."""
    file, admin = folder / "vllmd.yaml", folder / "admin.sock"
    file.write_text(json.dumps({"server": {"idle_exit": "never"}, **config}))
    with (
        socket.create_server(("127.0.0.1", port)) as http,
        socket.create_server(str(admin), family=socket.AF_UNIX) as control,
        (folder / "daemon.log").open("w") as log,
    ):
        fds = (http.fileno(), control.fileno())
        address = f"http://127.0.0.1:{http.getsockname()[1]}"
        command = [sys.executable, "-c", BOOT, *map(str, fds), str(file)]
        daemon = subprocess.Popen(command, pass_fds=fds, stdout=log, stderr=log, env={**os.environ, **(env or {})})
    try:
        yield Vllmd(address, str(admin), daemon.pid)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(120)


def wait_until(condition: Callable[[], bool], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.05)


def exists(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def script(code: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """A user's program."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
