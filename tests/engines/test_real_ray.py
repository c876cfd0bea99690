"""A real vLLM over two machines by a real Ray: two network namespaces with a cable between them, the daemon in one.

vLLM is the one for the CPU, which takes Ray by a plug-in (packaging/dev/vllm_cpu_ray.py). On a CPU the tensors of its
two ranks go through /dev/shm, which the two "machines" share, as they do all files; what starts, orders,
watches and ends them goes over the cable.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RealVllm
from tests.engines.installed import Site, daemon
from tests.vllm_on_cpu import FORKING, ONE_THREAD

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

LIMIT = 600.0  # seconds; a start takes 30 of them on two idle cores, and more than 300 where others are at work
PORT = 6389
HERE, THERE = "198.18.77.1", "198.18.77.2"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
SHARED = Path("/dev/shm")
AGAIN = 'while ! "$@"; do sleep 1; done'  # as the unit with its Restart=


class Lab:
    """Two machines: ``here`` and ``there`` are their network namespaces."""

    def __init__(self, vllm: RealVllm, ray: Path) -> None:
        self.vllm, self.ray = vllm, ray
        self.here, self.there = (f"vllmd-ray-{side}-{os.getpid()}" for side in "ab")
        self.temp = Path(f"/tmp/vllmd-ray-node-{os.getpid()}")  # short, for Ray's sockets
        self._node: subprocess.Popen[bytes] | None = None
        self._shared: set[Path] = set()

    def build(self) -> None:
        self._shared = set(SHARED.glob("*-cpushm_*"))
        for name in (self.here, self.there):
            _ip("netns", "add", name)
        _ip("link", "add", "ray0", "netns", self.here, "type", "veth", "peer", "name", "ray0", "netns", self.there)
        for name, address in ((self.here, HERE), (self.there, THERE)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "ray0")
            for device in ("lo", "ray0"):
                _ip("-n", name, "link", "set", device, "up")

    def destroy(self) -> None:
        self.lose_node()
        for left in set(SHARED.glob("*-cpushm_*")) - self._shared:  # by ranks that Ray killed
            left.unlink(missing_ok=True)
        for folder in (self.temp, Path(f"/tmp/vllmd-ray-{PORT}")):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (self.here, self.there):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def add_node(self, log: Path) -> None:
        """The other machine comes up and offers its device, as the unit in the manual does."""
        env = {**os.environ, **TOKEN, "PYTHONPATH": str(self.ray), "VLLM_HOST_IP": THERE, "GLOO_SOCKET_IFNAME": "ray0",
               "RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_worker_niceness": "0",
               "HF_HUB_OFFLINE": "1", **ONE_THREAD}  # fmt: skip
        python = self.vllm.command.with_name("python3")
        node = [python, "-m", "ray.scripts.scripts", "start", "--block", f"--address={HERE}:{PORT}",
                f"--node-ip-address={THERE}", "--num-gpus=1", "--num-cpus=1", "--object-store-memory=100000000",
                "--disable-usage-stats", f"--temp-dir={self.temp}"]  # fmt: skip
        machine = ["ip", "netns", "exec", self.there, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
                   "sh", "-c", AGAIN, "node"]  # fmt: skip
        with log.open("wb") as output:
            self._node = subprocess.Popen([*machine, *node], env=env, stdout=output, stderr=output)

    def lose_node(self) -> None:
        """Its power fails."""
        if self._node:
            self._node.kill()
            self._node.wait()
        self._node = None

    def ranks(self, name: str) -> int:
        """How many of vLLM's ranks run on a machine."""
        return sum(line.startswith("ray::RayWorkerProc") for line in _processes(name))

    def ray_here(self) -> list[str]:
        """Processes of Ray's on the daemon's machine."""
        return [line for line in _processes(self.here) if "/ray/" in line or line.startswith("ray::")]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _processes(name: str) -> list[str]:
    found = []
    for pid in _ip("netns", "pids", name).split():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def answer(site: Site) -> str:
    """The model's most likely words."""
    body = {"model": "wide", "prompt": "hello you", "max_tokens": 8, "temperature": 0}
    reply = site.http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def lab(real_vllm: RealVllm, ray: Path) -> Iterator[Lab]:
    lab = Lab(real_vllm, ray)
    try:
        lab.build()
        yield lab
    finally:
        lab.destroy()


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Iterator[Site]:
    """The daemon, with two declared devices, of which the model takes one."""
    model = {
        "command": str(lab.vllm.command), "model": str(lab.vllm.model), "max_model_len": 512, "sleep_mode": True,
        "tensor_parallel_size": 2, "local_devices": 1, "gpu_memory": 0.1, "restart_backoff": "1s",
        "options": {"ray_head": f"{HERE}:{PORT}", "ray_wait": 200, "kv_cache_memory": "64MiB"},
        "extra_args": ["--enforce-eager", "--max-num-seqs", "8"],
        "env": {**TOKEN, **ONE_THREAD, "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "ray0",
                "PYTHONPATH": f"{FORKING}:{lab.ray}"},
    }  # fmt: skip
    small = {**model, "options": {**model["options"], "ray_wait": 0}, "max_restarts": 0}  # type: ignore[dict-item]
    config: dict[str, Any] = {
        "server": {"idle_exit": "never"},
        "devices": [{"memory": "24GiB"}] * 2,
        "models": {"wide": model, "impatient": small},
    }
    with daemon(tmp_path / "site", config, inside=("ip", "netns", "exec", lab.here)) as site:
        site.http.timeout = site.admin.timeout = LIMIT
        yield site


def test_a_model_over_two_machines(lab: Lab, site: Site, tmp_path: Path) -> None:
    """Missed, joined, asleep and awake, lost, started again with the machine's return, and gone without a trace."""
    assert f"Ray at {HERE}:{PORT} has 1 node with 1 GPU ({HERE}: 1); the model needs 2" in site.refusal("impatient")
    _until(lambda: not lab.ray_here())

    lab.add_node(tmp_path / "node.log")
    said = answer(site)
    assert (lab.ranks(lab.here), lab.ranks(lab.there)) == (1, 1)
    assert len(site.view("wide")["devices"]) == 1

    assert site.admin.post("/admin/models/wide/sleep?level=2&wait=true", json={}).status_code == 200
    assert answer(site) == said

    lab.lose_node()
    _until(lambda: site.view("wide")["state"] != "running")
    _until(lambda: not lab.ray_here())

    lab.add_node(tmp_path / "node2.log")
    assert answer(site) == said
    site.unload("wide")
    assert lab.ray_here() == []
    assert lab.ranks(lab.there) == 0
