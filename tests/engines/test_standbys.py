"""Standbys: for which engines there can be one; and through the daemon, with the stand-in as vLLM."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.installed import Site, daemon, ports
from tests.launcher.test_sessions import alive
from vllmd.config.types import ModelConfig
from vllmd.core import commands
from vllmd.core.types import Device, Placement
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.homes import Homes
from vllmd.daemon.launch_planner import LaunchPlanner, Paths
from vllmd.daemon.ports import PortPool
from vllmd.engines import transformers, vllm_standby
from vllmd.engines.base import Place
from vllmd.engines.standby import Standby
from vllmd.engines.transformers_standby import CHECK
from vllmd.sizes import GiB

SCRIPT = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
# Takes of vLLM's flags what the stand-in needs.
MAIN = """
import os, sys
BORN = os.getpid()
def main():
    words = sys.argv[1:]
    value = lambda flag: words[words.index(flag) + 1]
    print("imported by", BORN, "served by", os.getpid(), flush=True)
    flags = ["--model", words[1], "--uds", value("--uds"), "--served-model-name", value("--served-model-name")]
    from vllmd.simengine.options import main_options
    from vllmd.simengine.server import run
    sys.argv[1:] = flags
    return run(main_options())
"""
REPOSITORY = Path(__file__).resolve().parents[2]


def program(folder: Path, name: str = "vllm") -> Path:
    """vLLM's script, whose package is a stand-in in ``folder/lib``."""
    package = folder / "lib/vllm/entrypoints/cli"
    package.mkdir(parents=True, exist_ok=True)
    (package / "main.py").write_text(MAIN)
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return path


class Machine:
    """What a planner asks of the memory: these devices."""

    def __init__(self, *names: str) -> None:
        self.inventory = tuple(Device(index, name, 80 * GiB, name=name) for index, name in enumerate(names))

    def devices_of(self, placement: Placement) -> tuple[Device, ...]:
        return tuple(self.inventory[index] for index in placement.devices)

    def files_of(self, placement: Placement) -> tuple[str, ...]:
        return ()


def planner(folder: Path, *devices: str) -> LaunchPlanner:
    paths = Paths(Path("/run/vllmd-engine"), Homes(folder / "home"))
    memory: Any = Machine(*devices)
    return LaunchPlanner(memory, paths, EngineResolver(), PortPool(33300, 33310))


def of(folder: Path, *devices: str, **settings: Any) -> Standby | None:
    """The standby of a model with these settings."""
    told = {"engine": "vllm", "command": (str(program(folder)),), "model": "org/m", **settings}
    return planner(folder, *devices).standby_of(ModelConfig("m", **told))


def test_models_share_standbys_where_what_is_read_at_import_is_equal(tmp_path: Path) -> None:
    """Flags, device and token may differ; another variable, or another version, is another standby."""
    one = of(tmp_path)
    assert one is not None
    assert one == of(tmp_path, model="org/n", max_model_len=9, hf_token="x")
    assert one != of(tmp_path, env={"VLLM_LOGGING_LEVEL": "DEBUG"})
    assert one == of(tmp_path, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert one != of(tmp_path, command=(str(program(tmp_path, "vllm2")),))
    assert (one.python, one.program) == (sys.executable, str(tmp_path / "bin/vllm"))
    assert one.variables()["HOME"] == str(tmp_path / "home")


@pytest.mark.parametrize(
    "settings",
    [
        {"user": "own"},
        {"engine": "llama.cpp", "command": ()},
        {"command": (sys.executable, "-m", "vllm.entrypoints.openai.api_server")},
        {"command": ("/bin/sh", "-c", "vllm serve")},
        {"command": ("/no/such/vllm",)},
        {"model": "openai/Whisper-large-v3"},
        {"extra_args": ("--mm-tensor-ipc", "torch_shm")},
    ],
)
def test_what_is_special_is_started_as_ever(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Another user, another kind, somebody's own command, and what vLLM says cannot be forked."""
    assert of(tmp_path, **settings) is None


def test_a_script_of_somebodys_own_is_started_as_ever(tmp_path: Path) -> None:
    """It may do things before it imports vLLM that cannot be done afterwards."""
    path = program(tmp_path)
    text = path.read_text()
    for wrong in (text.replace("import sys", "import sys, os; os.nice(1)\n") + "x = 1\n" * 1000, "#!/bin/sh\nvllm", ""):
        path.write_text(wrong)
        told = {"engine": "vllm", "command": (str(path),)}
        assert planner(tmp_path).standby_of(ModelConfig("m", **told)) is None


def test_unequal_devices_have_no_standbys(tmp_path: Path) -> None:
    """What the first device can do is asked at import."""
    assert of(tmp_path, "H100", "H100") is not None
    assert of(tmp_path, "H100", "RTX 3090") is None


def test_a_start_looks_for_what_is_kept(tmp_path: Path) -> None:
    """What is found for a model before its start is what its start asks for, on whatever device."""
    planning = planner(tmp_path, "H100", "H100")
    model = ModelConfig("m", engine="vllm", command=(str(program(tmp_path)),), model="org/m")
    planning.configure({"m": model}, {})
    process, order = planning.prepare(commands.StartEngine("m", Placement((1,)), GiB))
    assert order is not None
    assert process.standby == planning.standby_of(model) is not None
    late = vllm_standby.LATE
    assert {name for name in order.env if name not in late} == dict(process.standby.env).keys()
    assert order.env["CUDA_VISIBLE_DEVICES"] == "H100"


def test_rocm_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its devices are read at import."""
    model = ModelConfig("m", engine="vllm", command=(str(program(tmp_path)),))
    launch = EngineResolver()(model).launch(model, Place(Path("/run/vllmd-engine")))
    monkeypatch.setattr(vllm_standby, "has_nvidia", lambda: False)
    assert vllm_standby.standby(model, launch, accelerator=True) is None
    monkeypatch.setattr(vllm_standby, "has_nvidia", lambda: True)
    found = vllm_standby.standby(model, launch, accelerator=True)
    assert found is not None
    assert (dict(found.adds), found.ours, found.then) == ({vllm_standby.METHOD: "fork"}, (), "")


def test_transformers_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whose imports ask NVML for GPUs; none on other makers' GPUs, nor for a script of somebody's own."""
    path = program(tmp_path, "transformers")
    told = {"engine": "transformers", "command": (str(path),), "model": "org/m"}
    assert of(tmp_path, **told) is None
    path.write_text(path.read_text().replace("vllm.entrypoints.cli.main", "transformers.cli.transformers"))
    found = of(tmp_path, **told)
    assert found is not None
    assert (found.program, found.ours, found.adds, found.then) == (str(path), ((CHECK, "1"),), (), "")
    assert found == of(tmp_path, **{**told, "model": "org/n", "options": {"cpu": True}})
    given = of(tmp_path, **told, env={CHECK: "0"})
    assert given is not None
    assert given.ours == ()
    monkeypatch.setattr(transformers, "has_accelerator", lambda: True)
    monkeypatch.setattr(transformers, "has_nvidia", lambda: False)
    assert of(tmp_path, **told) is None


# ---- through the daemon


def until(found: Callable[[], Any], limit: float = 40.0) -> Any:
    """What it is once it is true."""
    deadline = time.monotonic() + limit
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def waiting(site: Site) -> str:
    """The instance of the standby that waits, when there is one."""
    kept = site.admin.get("/admin/status").json().get("standbys") or []
    return next((one["instance"] for one in kept if one["state"] == "waiting"), "")


def pid_of(site: Site, instance: str) -> int:
    """The process whose marker says so."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"VLLMD_INSTANCE={instance}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    return 0


def test_the_next_model_is_made_of_a_standby(tmp_path: Path) -> None:
    """The second start needs no imports, and shows them to be done; one that was killed costs an ordinary start.

    What it holds is shown. No idle exit waits for it, and with the daemon it ends.
    """
    path = os.pathsep.join([str(tmp_path / "lib"), str(REPOSITORY)])
    model = {"engine": "vllm", "command": [str(program(tmp_path))], "env": {"PYTHONPATH": path}, "gpu_memory": "8GiB"}
    config = {
        "engines": {**ports(), "standby": 1},
        "devices": [{"memory": "80GiB"}],
        "server": {"idle_exit": "1s"},
        "models": {name: {**model, "model": f"org/{name}"} for name in ("a", "b", "c", "d")},
    }
    with daemon(tmp_path / "site", config, ends=True) as site:
        site.answer("a")
        instance = until(lambda: waiting(site))
        shown = site.admin.get("/admin/status").json()
        (kept,) = shown["standbys"]
        assert (kept["program"], shown["host_memory"]["standbys"]) == (str(tmp_path / "bin/vllm"), kept["memory"])
        pid = pid_of(site, instance)
        site.answer("b")
        (line,) = (line for line in site.log.read_text().splitlines() if "b: started as pid" in line)
        assert f"started as pid {pid} " in line
        assert line.partition("  [")[0].endswith(f"made of {instance}")
        instance = until(lambda: waiting(site))
        pid = pid_of(site, instance)
        os.kill(pid, signal.SIGKILL)
        site.answer("c")
        instance = until(lambda: waiting(site))
        pid = pid_of(site, instance)
        for name in ("a", "b", "c"):
            site.unload(name)
        site.http.close()
        site.admin.close()
        assert site.process.wait(30) == 0
        assert not alive(pid)
