"""A private daemon for programs on machines without one: a child process that ends with the program."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.client.address import Address
from vllmd.client.errors import Unreachable

ROOT = Path(__file__).resolve().parents[2]
END_LIMIT = 30.0  # seconds for the daemon to stop its engines
SETTINGS: Mapping[str, Any] = {"idle_exit": "never", "drain_timeout": 5}


class PrivateDaemon:
    """One running ``vllmd serve``. ``address`` is its admin socket."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="vllmd-private-"))
        self._owner = os.getpid()
        config = {**settings, "server": {**SETTINGS, **settings.get("server", {})}}
        (self._folder / "vllmd.yaml").write_text(json.dumps(config))
        path = self._folder / "admin.sock"
        with socket.create_server(("127.0.0.1", 0)) as http, socket.socket(socket.AF_UNIX) as admin:
            admin.bind(str(path))
            admin.listen(128)
            self._process = self._start([http.fileno(), admin.fileno()])  # open before the daemon runs: none is refused
        self.address = Address.of(f"unix:{path}")
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """The process id of the daemon."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the daemon's process runs."""
        return self._process.poll() is None

    def last_lines(self) -> str:
        """The last lines of the daemon's log."""
        text = (self._folder / "log").read_text(errors="replace") if (self._folder / "log").exists() else ""
        return "\n".join(text.splitlines()[-15:])

    def check(self, within: float = 0.0) -> None:
        """Raise Unreachable if the daemon has ended, or ends ``within`` so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within)
        if not self.running:
            raise Unreachable(f"the private vllmd ended with status {self._process.returncode}:\n{self.last_lines()}")

    def stop(self) -> None:
        """End the daemon with its engines; harmless if it has ended."""
        if os.getpid() != self._owner:  # a fork of the program: not its to end
            return
        atexit.unregister(self.stop)
        self._process.terminate()
        try:
            self._process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, fds: list[int]) -> subprocess.Popen[bytes]:
        script, handed_on = str(Path(__file__).with_name("parent_watch.py")), ",".join(map(str, fds))
        parent_watch = [script, str(os.getpid()), str(self._folder), handed_on]
        serve = ["vllmd", "--config", str(self._folder / "vllmd.yaml")]
        with (self._folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", *parent_watch, *serve],
                env=environment(len(fds)),
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at the terminal is for the program, which then ends us in order
            )


def environment(sockets: int) -> dict[str, str]:
    """The program's variables, less those about other daemons; the vLLM of its Python comes first in PATH."""
    ours = ("VLLMD_", "LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_", "PROXY_PORT")
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(ours) or name.startswith("VLLMD_SIM_")
    }
    env.update(LISTEN_FDS=str(sockets), LISTEN_FDNAMES="http:admin")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    beside = Path(sys.executable).parent
    if (beside / "vllm").exists():
        env["PATH"] = f"{beside}{os.pathsep}{env.get('PATH', os.defpath)}"
    return env


class PrivateDaemons:
    """The one private daemon of this process, for as long as it has users."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._daemon: PrivateDaemon | None = None
        self._users: set[object] = set()

    def join(self, user: object, settings: Mapping[str, Any]) -> PrivateDaemon:
        """Use the running daemon, or a new one with ``settings``."""
        with self._lock:
            if self._daemon is None or not self._daemon.running:
                self._daemon = PrivateDaemon(settings)
            self._users.add(user)
            return self._daemon

    def leave(self, user: object) -> None:
        """Use the daemon no longer; it ends with its last user."""
        with self._lock:
            self._users.discard(user)
            if self._daemon and not self._users:
                daemon, self._daemon = self._daemon, None
                with contextlib.suppress(OSError):
                    daemon.stop()


PRIVATE_DAEMONS = PrivateDaemons()
