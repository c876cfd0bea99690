"""Several machines in one: a front and its nodes, each in a network namespace, a cable from the front to each node.

Whatever happens to a test, its namespaces go at the end, and all that runs in them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

PORT = 33258
KEY = "front-secret-key-1"
LIMIT = 60.0  # seconds
_numbers = itertools.count()


class Node:
    """A machine with a daemon that listens on the cable and wants a key. It serves one model, with a stand-in."""

    def __init__(self, lab: Lab, name: str, address: str, folder: Path) -> None:
        self.lab, self.name, self.address, self.folder = lab, name, address, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **model: object) -> None:
        """Power on; returns once it listens."""
        self.folder.mkdir(exist_ok=True)
        config = {
            "server": {"listen": [f"{self.address}:{PORT}"], "idle_exit": "never"},
            "devices": [{"memory": "80GiB"}],
            "auth": {"keys": [{"name": "front", "key": KEY}]},
            "models": {"sim/m": {"engine": "sim", "gpu_memory": "20GiB", **model}},
        }
        settings, control = self.folder / "vllmd.yaml", self.folder / "run" / "admin.sock"
        settings.write_text(json.dumps(config))
        settings.chmod(0o600)
        own = {"VLLMD_ADMIN_SOCKET": str(control), "XDG_RUNTIME_DIR": str(self.folder)}
        command = [*self.lab.inside(self.name), sys.executable, "-m", "vllmd", "--config", str(settings)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
        self.admin = httpx.Client(transport=httpx.HTTPTransport(uds=str(control)), base_url="http://x", timeout=LIMIT)
        until(self._listens, f"{self.name} to listen")

    @property
    def alive(self) -> bool:
        """Whether its daemon runs."""
        return self.process is not None and self.process.poll() is None

    def _listens(self) -> bool:
        assert self.alive, (self.folder / "log").read_text()
        try:
            return self.admin.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """Its daemon dies, and says goodbye to nobody."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Shut down."""
        if self.process and self.alive:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(LIMIT)

    def cut_off(self) -> None:
        """Somebody pulls its cable: what is sent to it is lost without a word."""
        _ip("-n", self.lab.namespace(self.name), "link", "set", "cable", "down")

    def plug_in(self) -> None:
        """The cable is back."""
        _ip("-n", self.lab.namespace(self.name), "link", "set", "cable", "up")

    @property
    def answered(self) -> int:
        """Model requests that it has answered since its start."""
        lines = self.admin.get("/metrics").text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllmd_model_requests_total{"))


class Lab:
    """The front and its nodes, with nothing running yet."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.tag = f"vllmd-{os.getpid()}-{next(_numbers)}"
        self.nodes = {name: Node(self, name, f"198.18.{n}.2", folder / name) for n, name in enumerate(names)}

    def namespace(self, machine: str) -> str:
        """Its name among all namespaces of this computer."""
        return f"{self.tag}-{machine}"

    def inside(self, machine: str) -> tuple[str, ...]:
        """What makes the rest of a command run on that machine."""
        return ("nsenter", f"--net=/run/netns/{self.namespace(machine)}")

    def build(self) -> None:
        """Machines and cables."""
        for machine in ("front", *self.nodes):
            _ip("netns", "add", self.namespace(machine))
            _ip("-n", self.namespace(machine), "link", "set", "lo", "up")
        for name, node in self.nodes.items():
            front, far = self.namespace("front"), self.namespace(name)
            ends = (f"to-{name}", "netns", front, "type", "veth", "peer", "name", "cable", "netns", far)
            _ip("link", "add", "name", *ends)
            _ip("-n", front, "addr", "add", f"{node.address.removesuffix('2')}1/30", "dev", f"to-{name}")
            _ip("-n", far, "addr", "add", f"{node.address}/30", "dev", "cable")
            _ip("-n", front, "link", "set", f"to-{name}", "up")
            _ip("-n", far, "link", "set", "cable", "up")

    def destroy(self) -> None:
        """Nothing of it is left."""
        for node in self.nodes.values():
            node.stop()
        for machine in ("front", *self.nodes):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", self.namespace(machine)).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", self.namespace(machine))


@contextlib.contextmanager
def machines(folder: Path, *names: str) -> Iterator[Lab]:
    """A front and nodes of these names. Skips the test where that cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (packaging/dev/setup host)")
    lab = Lab(folder, names)
    try:
        try:
            lab.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield lab
    finally:
        lab.destroy()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
