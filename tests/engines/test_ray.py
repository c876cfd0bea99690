"""vLLM over several machines: what is run, what is booked here, and what is said of a wrong cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import ray_start
from vllmd.engines.base import Launch, Place
from vllmd.engines.ray_cluster import cluster_of
from vllmd.engines.vllm import Vllm
from vllmd.errors import ConfigError
from vllmd.sizes import GiB

VLLM = Vllm(accelerator=lambda: True)
TWO_HERE = Place(Path("/run/x"), ("GPU-a", "GPU-b"), 20 * GiB, 80 * GiB)
HEAD, THERE = {"ray_head": "10.0.0.1:6379"}, {"ray_address": "head.lab:6379"}


def model(options: dict[str, object], **settings: Any) -> ModelConfig:
    """Four devices, two of them here."""
    split = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "local_devices": 2}
    return ModelConfig("m", options=options, where="a.yaml:3", **{**split, **settings})


def launch(options: dict[str, object], **settings: Any) -> Launch:
    return VLLM.launch(model(options, **settings), TWO_HERE)


def told(order: Launch) -> dict[str, Any]:
    """What the script is told of the cluster."""
    assert order.argv[:2] == (sys.executable, "-P")
    assert Path(order.argv[2]) == Path(ray_start.__file__)
    return dict(json.loads(order.argv[3]))


def test_a_head_of_its_own_has_the_devices_of_the_ledger() -> None:
    """Ray sees them as vLLM would, by CUDA_VISIBLE_DEVICES, and how many; both have one address."""
    order = launch({**HEAD, "ray_wait": 30})
    assert told(order) == {"host": "10.0.0.1", "port": 6379, "head": True, "here": 2, "needed": 4, "wait": 30}
    assert order.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert order.env["VLLM_HOST_IP"] == "10.0.0.1"


def test_then_comes_vllm_with_the_ray_executor() -> None:
    """Otherwise as on one machine."""
    alone = VLLM.launch(model({}), TWO_HERE)
    assert launch(HEAD).argv[4:] == (*alone.argv, "--distributed-executor-backend", "ray")
    args = ("--distributed-executor-backend", "ray")
    assert launch(THERE, extra_args=args).argv[4:] == (*alone.argv, *args)


def test_a_cluster_that_is_there_is_joined() -> None:
    """Its nodes know their own addresses."""
    order = launch(THERE)
    assert told(order) == {"host": "head.lab", "port": 6379, "head": False, "here": 2, "needed": 4, "wait": 120}
    assert "VLLM_HOST_IP" not in order.env


def test_only_the_devices_of_this_machine_are_booked() -> None:
    """The others are in nobody's ledger here; none at all if it only has the front."""
    assert VLLM.device_count(model(HEAD)) == 2
    assert VLLM.device_count(model(THERE, local_devices=0)) == 0


def test_it_sleeps_like_any_other() -> None:
    """Sleep and wake reach all ranks."""
    assert VLLM.sleep_levels(model(HEAD)) == {1, 2}


@pytest.mark.parametrize(
    ("options", "settings", "what"),
    [
        (HEAD, {"local_devices": None}, "models.m.local_devices: say how many of its 4 devices are this machine's"),
        ({**HEAD, **THERE}, {}, "models.m.options.ray_address: either ray_head, .*, or this"),
        ({"ray_head": "10.0.0.1"}, {}, "models.m.options.ray_head: it must be an address with a port such as"),
        ({"ray_address": "a:0"}, {}, "models.m.options.ray_address: it must be an address with a port"),
        (
            {"ray_head": "lab:6379"},
            {},
            "models.m.options.ray_head: its address must be an IP address of this machine at which",
        ),
        ({"ray_head": "127.0.0.1:6379"}, {}, "its address must be an IP address of this machine at which other"),
        ({**HEAD, "ray_wait": "long"}, {}, "models.m.options.ray_wait: it must be a whole number"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, object], settings: dict[str, Any], what: str) -> None:
    """Told before anything is started, with what would be right."""
    with pytest.raises(ConfigError, match=rf"a\.yaml:3: .*{what}"):
        launch(options, **settings)


def test_an_ipv6_address_keeps_its_brackets() -> None:
    """As Ray wants it."""
    cluster = cluster_of(model({"ray_head": "[fd00::1]:6379"}))
    assert cluster is not None
    assert ray_start.address_of({"host": cluster.host, "port": cluster.port}) == "[fd00::1]:6379"


# --- the script, with a Ray that says what the test wants ---

FAKE_RAY = """
import atexit, json, os, time
said = json.load(open(os.environ["FAKE_RAY"]))
def init(**how):
    time.sleep(said.get("silent", 0))
    print("Ray begins", flush=True)
    atexit.register(print, "Ray ends")
def node(host, gpus): return {"NodeManagerAddress": host, "Alive": True, "Resources": {"GPU": gpus}}
def nodes(): return [node(*one) for one in said["nodes"].items()]
def available_resources(): return {"GPU": said["free"]}
"""
FAKE_HEAD = """
import json, os, socket, sys, time
if os.environ.get("FAKE_HEAD"):
    sys.exit(os.environ["FAKE_HEAD"])
port = int(sys.argv[sys.argv.index("--port") + 1])
server = socket.create_server(("127.0.0.1", port))
json.dump([os.environ.get("RAY_worker_niceness"), *sys.argv[1:]], open(os.environ["FAKE_RAY"] + ".head", "w"))
if os.fork() == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
    time.sleep(60)
"""
VLLM_SAYS = [sys.executable, "-c", "import os; print('vllm', os.getpid(), os.environ['RAY_ADDRESS'])"]


class Rehearsal:
    """The script with a fake Ray in its Python."""

    def __init__(self, folder: Path, port: int) -> None:
        self.told = {"host": "127.0.0.1", "port": port, "head": False, "here": 1, "needed": 2, "wait": 0}
        self.said = folder / "said.json"
        self.env = {**os.environ, "PYTHONPATH": str(folder), "FAKE_RAY": str(self.said)}
        (folder / "ray/scripts").mkdir(parents=True)
        (folder / "ray/__init__.py").write_text(FAKE_RAY)
        (folder / "ray/scripts/scripts.py").write_text(FAKE_HEAD)
        self.say({"127.0.0.1": 1, "10.0.0.2": 1}, free=2)

    def say(self, nodes: dict[str, int], free: int, **more: float) -> None:
        self.said.write_text(json.dumps({"nodes": nodes, "free": free, **more}))

    def run(self, *argv: str, **told: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", ray_start.__file__, json.dumps({**self.told, **told}), *(argv or VLLM_SAYS)]
        return subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def refusal(self, *argv: str, **told: object) -> str:
        """The reason of a start that fails, as vllmd reads it from the log."""
        with self.run(*argv, **told) as script:
            out, err = script.communicate(timeout=120)
        assert script.returncode == 1
        return VLLM.failure([*out.splitlines(), *err.splitlines()]).reason


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Rehearsal]:
    """A cluster whose head listens, at a port that nobody else has."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield Rehearsal(tmp_path, head.getsockname()[1])


def test_it_becomes_vllm_when_the_devices_are_there(rehearsal: Rehearsal) -> None:
    """The same process, so that signals reach vLLM, which finds the cluster by RAY_ADDRESS."""
    with rehearsal.run() as script:
        assert script.communicate(timeout=120)[0] == f"vllm {script.pid} 127.0.0.1:{rehearsal.told['port']}\n"


def test_a_cluster_that_is_too_small_is_described(rehearsal: Rehearsal) -> None:
    """vLLM itself would wait for half an hour."""
    rehearsal.say({"127.0.0.1": 1}, free=1)
    assert rehearsal.refusal() == (
        "RayError: Ray at 127.0.0.1:{port} has 1 node with 1 GPU (127.0.0.1: 1); the model needs 2. Another machine "
        "joins by: ray start --address=127.0.0.1:{port} (waited 0 s)".format(**rehearsal.told)
    )


def test_devices_that_others_have_are_told_apart(rehearsal: Rehearsal) -> None:
    """The cluster is large enough, but not now."""
    rehearsal.say({"127.0.0.1": 1, "10.0.0.2": 2}, free=1)
    what = "has 2 nodes with 3 GPUs (10.0.0.2: 2, 127.0.0.1: 1), 1 of them free; the model needs 2"
    assert what in rehearsal.refusal()


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    """Ray's client would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    what = f"RayError: nothing answers at 127.0.0.1:{port} (Connection refused); there should be a Ray head"
    assert Rehearsal(tmp_path, port).refusal() == f"{what} (waited 0 s)"


def test_a_cluster_that_accepts_and_says_nothing(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look has a limit."""
    monkeypatch.setattr(ray_start, "LOOK_LIMIT", 0.5)
    monkeypatch.setenv("PYTHONPATH", rehearsal.env["PYTHONPATH"])
    monkeypatch.setenv("FAKE_RAY", rehearsal.env["FAKE_RAY"])
    rehearsal.say({}, free=0, silent=60)
    assert "does not answer within 0.5 s" in ray_start.what_is_missing(sys.executable, rehearsal.told)


def test_a_python_without_ray_is_named_with_what_to_do(rehearsal: Rehearsal) -> None:
    """No retry helps."""
    (Path(rehearsal.env["PYTHONPATH"]) / "ray").rename(Path(rehearsal.env["PYTHONPATH"]) / "away")
    reason = rehearsal.refusal()
    assert reason == f"ModuleNotFoundError: No module named 'ray' in {sys.executable}"
    failure = VLLM.failure([reason])
    assert (failure.permanent, failure.hint) == (
        True, "install it where vLLM is, on every machine in the same version: pip install ray",
    )  # fmt: skip


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens at, and Ray's folder for it removed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port
    shutil.rmtree(f"/tmp/vllmd-ray-{port}", ignore_errors=True)


def test_the_head_is_started_first(tmp_path: Path) -> None:
    """With this machine's devices only, and a folder of its own."""
    with free_port() as port:
        rehearsal = Rehearsal(tmp_path, port)
        with rehearsal.run(head=True, wait=30) as script:
            assert script.communicate(timeout=120)[0] == f"vllm {script.pid} 127.0.0.1:{port}\n"
        os.killpg(script.pid, signal.SIGKILL)  # the head goes as with its scope
        niceness, *flags = json.loads((tmp_path / "said.json.head").read_text())
    assert niceness == "0"  # or the ranks would starve beside anything else
    assert flags[:2] == ["start", "--head"]
    values = dict(itertools.pairwise(flags))
    assert (values["--num-gpus"], values["--node-ip-address"]) == ("1", "127.0.0.1")
    assert values["--temp-dir"] == f"/tmp/vllmd-ray-{port}"


def test_a_head_that_cannot_start_says_why_itself(tmp_path: Path) -> None:
    """Ray's words are the reason, not ours about them."""
    with free_port() as port:
        rehearsal = Rehearsal(tmp_path, port)
        rehearsal.env["FAKE_HEAD"] = "ConnectionError: Ray is already running"
        assert rehearsal.refusal(head=True, wait=30) == "ConnectionError: Ray is already running"


def test_ray_is_looked_for_beside_vllm(tmp_path: Path) -> None:
    """Through the link that pipx and uv make."""
    for name in ("vllm", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin/vllm"
    link.symlink_to(tmp_path / "vllm")
    assert ray_start.python_of([str(link), "serve"]) == str(tmp_path / "python3")
    assert ray_start.python_of(["nice", sys.executable, "-m", "vllm.x"]) == sys.executable
    (tmp_path / "python3").unlink()
    with pytest.raises(ray_start.RayError, match=rf"there is no {tmp_path}/python3 to find Ray with"):
        ray_start.python_of([str(link)])
    with pytest.raises(ray_start.RayError, match="names neither vllm nor its Python"):
        ray_start.python_of(["podman", "run", "image"])


def test_the_wait_is_a_phase_of_the_start() -> None:
    """Who looks sees what it waits for."""
    progress = VLLM.progress("Waiting for Ray: nothing answers at 10.0.0.1:6379")
    assert progress is not None
    assert progress.phase == "nodes"
