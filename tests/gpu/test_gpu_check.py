"""``make gpu-check`` itself: without a GPU it says so; each part holds on a rehearsed one, and notices faults."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RealVllm
from tests.gpu import gpu_check
from tests.gpu.check import attribution, bench, copies, readings
from tests.gpu.check.bench import Bench, GiB, MiB, Table
from tests.vllm_on_cpu import ONE_THREAD
from vllmd.config.types import Config, DeviceConfig
from vllmd.gpu import open_devices
from vllmd.simengine.device import FakeGpu, make_device

SCRIPT = Path(gpu_check.__file__)
REHEARSAL = SCRIPT.parent / "rehearsal"
Rehearse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearse:
    """Runs the script on a pretended GPU, with stand-ins for pynvml and torch."""
    monkeypatch.setenv("GPU_CHECK_DEVICE", str(make_device(tmp_path / "gpu", 16 * GiB)))
    path = [str(REPOSITORY), str(REHEARSAL / "nvml"), str(REHEARSAL / "cuda")]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(SCRIPT), "--settle", "0.1", "--copy", "0.1", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_the_readings_the_forks_and_the_copies_hold(rehearse: Rehearse, tmp_path: Path) -> None:
    """The table has their lines, the file has it in Markdown, and the status is 0."""
    done = rehearse("--only", "readings", "forks", "copies", "--markdown", str(tmp_path / "t.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    for what in (
        "2 GiB held, by pid: 2.00 GiB + 0.09 GiB",
        "CUDA_VISIBLE_DEVICES as UUID: 1",
        "power, nothing loaded: 70.0 W",
        "fork after import torch: children: good",
        "Cannot re-initialize CUDA",
        "pinned: host to device",
        "all held",
    ):
        assert what in done.stdout
    assert "| readings | name | Rehearsed GPU | Rehearsed GPU | ok |" in (tmp_path / "t.md").read_text()


def test_two_models_take_turns_through_the_daemon(rehearse: Rehearse) -> None:
    """The daemon reads the rehearsed NVML, sleeps one, stops the other, dies, and is succeeded."""
    done = rehearse("--only", "turns", "--load", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("answers under load", "memory back after each sleep", "memory back after each stop", "adopted by"):
        assert f"ok  turns: {what}" in done.stdout


def test_what_time_does_not_allow_is_left_out_and_said(rehearse: Rehearse) -> None:
    """A lent machine is lent for minutes."""
    done = rehearse("--only", "turns", "copies", "--seconds", "0")
    assert "turns: the whole part: skipped: " in done.stdout
    assert done.returncode == 0


@pytest.mark.vllm
def test_transformers_serve_through_the_daemon(
    real_vllm: RealVllm, accelerate: Path, rehearse: Rehearse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real program on the CPU: all holds but that the device, which it does not use, has memory back."""
    python = str(real_vllm.command.with_name("python"))
    (tmp_path / "site").mkdir()
    found = importlib.util.find_spec("sdnotify")
    assert found and found.origin
    (tmp_path / "site/sdnotify").symlink_to(Path(found.origin).parent)  # the one thing that vLLM does not bring along
    path = [str(REPOSITORY), str(REHEARSAL / "nvml"), str(accelerate), str(tmp_path / "site")]
    for name, value in {"PYTHONPATH": ":".join(path), **ONE_THREAD}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPU_CHECK_TRANSFORMERS", f"{python} {real_vllm.command.with_name('transformers')}")
    done = subprocess.run([python, str(SCRIPT), "--only", "transformers"],
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    bad = [line for line in done.stdout.splitlines() if line.startswith("NO")]
    assert len(bad) == 1 and "asleep at level 2: sleeping_l2" in bad[0], done.stdout + done.stderr
    assert "ok  transformers: an answer after the sleep" in done.stdout


# -- what does not hold is noticed -------------------------------------------------------


def a_bench(tmp_path: Path) -> Bench:
    """On a pretended GPU that is read as a declared device."""
    path = make_device(tmp_path / "gpu", 8 * GiB)
    devices = open_devices(Config(devices=(DeviceConfig(8 * GiB, file=path),)), {})
    return Bench(devices, devices.inventory()[0], tmp_path, Table(), time.monotonic() + 120)


def memory(tmp_path: Path, *more: str) -> tuple[str, ...]:
    """Flags that make an engine hold its memory there."""
    return ("--device-file", str(tmp_path / "gpu"), *more)


def test_every_step_of_the_attribution_holds_on_a_sound_device(tmp_path: Path) -> None:
    """Start, attribute, sleep, wake, stop, kill: a line for each, and no engine is left."""
    here = a_bench(tmp_path)
    check = attribution.Check(here, memory(tmp_path))
    check.run(2 * GiB)
    assert here.table.good and len(here.table.rows) == 13
    assert all(engine.process.poll() is not None for engine in check.engines.values())


def test_memory_that_does_not_come_back_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 200 from /sleep proves nothing: the check must look at the device."""
    monkeypatch.setattr(attribution, "RETURN_LIMIT", 0.3)
    here = a_bench(tmp_path)
    attribution.Check(here, memory(tmp_path, "--fail", "sleep-keeps-memory")).run(512 * MiB)
    bad = [row.what for row in here.table.rows if row.held is False]
    assert bad == ["asleep it keeps its context only", "the device has the rest back"]


def test_a_part_that_cannot_run_is_a_line_and_the_next_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the engine's own last words, and nothing left running."""

    def run(bench: Bench) -> None:
        attribution.Check(bench, memory(tmp_path)).run(100 * GiB)

    monkeypatch.setattr(attribution, "run", run)
    here = a_bench(tmp_path)
    gpu_check.run_part(here, "attribution")
    first = here.table.rows[0]
    assert (first.what, first.held) == ("the whole part", False)
    assert "the first engine did not start" in first.seen


def test_a_device_that_is_not_what_torch_says_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name, another size, and a process that NVML does not list."""
    here = a_bench(tmp_path)
    told = {"pid": 1, "free": 1 * GiB, "total": 12 * GiB, "name": "Other", "uuid": "x", "nvml_free": 5 * GiB,
            "nvml_total": 8 * GiB, "mine": None, "processes": 0, "unsized": 0, "hides": True, "torch": "2",
            "cuda": "13", "import": 1.0, "init": 1.0}  # fmt: skip
    monkeypatch.setattr(Bench, "script", lambda self, code, *args, **env: told)
    readings._figures(here)
    assert [row.held for row in here.table.rows] == [None, False, False, False, False, False]


def test_a_copy_of_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is far slower than the core takes it to be."""
    here = a_bench(tmp_path)
    slow = {"same": False, "allocate": 1.0, "release": 1.0, "allocate_again": 1.0, "down": [99.0, 99.0],
            "up": [0.1, 0.1]}  # fmt: skip
    monkeypatch.setattr(Bench, "script", lambda self, code, *args, **env: slow)
    FakeGpu(tmp_path / "gpu").hold(0)
    copies.run(here)
    bad = [row.what for row in here.table.rows if row.held is False]
    assert bad == ["pinned: what was copied is what arrives", "pinned: device to host",
                   "pageable: what was copied is what arrives"]  # fmt: skip


def test_a_script_that_ends_without_a_word_says_its_error(tmp_path: Path) -> None:
    """Not a JSON error of ours."""
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*ZeroDivisionError"):
        a_bench(tmp_path).script("1 / 0")
    assert bench.mark(bench.Row("p", "w", "", "", False)) == "NO"


def test_without_a_gpu_it_says_so_and_exits_with_its_own_status() -> None:
    """From a plain checkout, with no more than the standard library; 77 means skipped."""
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-S", SCRIPT], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 77, done.stderr
    assert "there is no NVIDIA GPU to check here" in done.stdout


@pytest.mark.gpu
def test_on_a_real_gpu() -> None:
    """The check on this machine's GPU, or a skip that says why there is none."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    if done.returncode == gpu_check.NO_GPU:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
