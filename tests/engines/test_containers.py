"""M's Triton as M runs it, in a container: the kind ``command`` with a stop command, through the real daemon.

M is the start/stop API: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.installed import LIMIT, Site, daemon

DOCKER = Path(__file__).with_name("fake_docker.py")
BODY = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}]}
INFER = "/v2/models/boxed/infer"


class Docker:
    """The stand-in for docker, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [sys.executable, str(DOCKER), str(folder / "docker.sock")]
        self.process = subprocess.Popen([*self.command, "daemon"])
        wait_until((folder / "docker.sock").exists)

    def asked(self) -> list[list[str]]:
        """``run`` or ``stop``, the container's name, its server's pid; in order."""
        return [line.split() for line in (self.folder / "asked").read_text().splitlines()]

    def server(self) -> int:
        """The newest container's."""
        return int(self.asked()[-1][2])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """dockerd reaps its containers."""
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[Docker]:
    (tmp_path / "models" / "dense" / "1").mkdir(parents=True)
    docker = Docker(tmp_path)
    yield docker
    left = [pid for _, _, pid in docker.asked() if not gone(int(pid))]
    docker.process.kill()
    docker.process.wait()
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


@contextlib.contextmanager
def serving(docker: Docker) -> Iterator[Site]:
    """A model in a container, beside one that is not."""
    control = "/v2/repository/models/dense"
    boxed = {
        "engine": "command",
        "gpu_memory": "8GiB",
        "command": [*docker.command, "run", "--rm", "--name", "${INSTANCE}", "-p", "127.0.0.1:${PORT}:${PORT}",
                    "triton", f"--model-repository={docker.folder / 'models'}", "--model-control-mode=explicit",
                    "--load-model=dense", "--http-port=${PORT}"],
        "options": {
            "health": "/v2/models/dense/ready",
            "alive": "/v2/health/live",
            "routes": ["/v2/models/{model}/infer"],
            "served_name": "dense",
            "sleep": {2: {"path": f"{control}/unload", "json": {}}},
            "wake": {2: {"path": f"{control}/load", "json": {}}},
            "stop": [*docker.command, "stop", "--time", "5", "${INSTANCE}"],
        },
    }  # fmt: skip
    models = {"boxed": boxed, "good": {"engine": "sim", "gpu_memory": "8GiB"}}
    config = {"devices": [{"memory": "80GiB"}], "server": {"idle_exit": "never"}, "models": models}
    with daemon(docker.folder / "site", config) as site:
        yield site


def infer(site: Site) -> object:
    return site.http.post(INFER, json=BODY).json()["outputs"]


def test_M_triton_in_a_container_is_started_slept_and_stopped(docker: Docker) -> None:
    """features.md, M: Triton backend, fake docker. It ends by ``docker stop``."""
    with serving(docker) as site:
        assert infer(site) == BODY["inputs"]
        assert site.admin.post("/admin/models/boxed/sleep?level=2&wait=true", json={}).json()["state"] == "sleeping_l2"
        assert infer(site) == BODY["inputs"]
        site.unload("boxed")
        (run, *first), (stop, *second) = docker.asked()
        assert (run, stop, first) == ("run", "stop", second)
        assert gone(docker.server())


def test_M_a_container_whose_client_is_killed_is_stopped(docker: Docker) -> None:
    """Its server would go on with the GPU's memory; the next request has a new one, and the other model none of it."""
    with serving(docker) as site:
        assert infer(site) == BODY["inputs"]
        server = docker.server()
        os.kill(site.view("boxed")["pid"], signal.SIGKILL)
        wait_until(lambda: gone(server))
        assert site.answer("good") == "hi"
        assert infer(site) == BODY["inputs"]


def test_M_a_forced_stop_stops_the_container_too(docker: Docker) -> None:
    """Whoever is told that the model is stopped may count on its memory."""
    with serving(docker) as site:
        assert infer(site) == BODY["inputs"]
        assert site.admin.post("/admin/models/boxed/unload?force=true&wait=true", json={}).status_code == 200
        assert gone(docker.server())


def test_M_a_daemon_that_ends_stops_its_containers(docker: Docker) -> None:
    """They are not its processes, so nothing else would."""
    with serving(docker) as site:
        assert infer(site) == BODY["inputs"]
    assert gone(docker.server())
