"""``make gpu-check`` itself: without a GPU it says so; its steps hold on a pretended one, and notice what does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import gpu_check
from tests.gpu.gpu_check import Check, GiB, MiB, report, table
from vllmd.config.types import Config, DeviceConfig
from vllmd.gpu import open_devices
from vllmd.simengine.device import make_device


def check(tmp_path: Path, *more: str) -> Check:
    """The same steps, with memory held on a pretended GPU instead of a CUDA device."""
    path = make_device(tmp_path / "gpu", 8 * GiB)
    devices = open_devices(Config(devices=(DeviceConfig(8 * GiB, file=path),)), {})
    return Check(devices, devices.inventory()[0], lambda size: ["--device-file", str(path), *more], {}, tmp_path)


def test_every_step_holds_on_a_sound_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start, attribute, sleep, wake, stop, kill: the table has a line for each, and the status is 0."""
    steps = check(tmp_path)
    assert report(steps, 2 * GiB) == 0
    text = capsys.readouterr().out
    for what in (
        "first engine's memory",
        "asleep it keeps",
        "awake it holds",
        "after SIGTERM",
        "after SIGKILL",
        "all held",
    ):
        assert what in text
    assert all(engine.process.poll() is not None for engine in steps.engines.values())


def test_memory_that_does_not_come_back_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 200 from /sleep proves nothing: the check must look at the device."""
    monkeypatch.setattr(gpu_check, "RETURN_LIMIT", 0.3)
    assert report(check(tmp_path, "--fail", "sleep-keeps-memory"), 512 * MiB) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert len(lines) == 2
    assert "asleep it keeps its context only" in lines[0]


def test_an_engine_that_does_not_start_ends_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the engine's own last words, and nothing left running."""
    steps = check(tmp_path)
    assert report(steps, 100 * GiB) == 1
    assert "the first engine did not start" in capsys.readouterr().out
    assert steps.engines["first"].process.poll() is not None


def test_the_table_lines_up() -> None:
    """It goes into reports as it is."""
    rows = [gpu_check.Row("a", "1", "2", True), gpu_check.Row("longer", "1", "2", False)]
    assert [line.index("1") for line in table(rows).splitlines()[1:]] == [12, 12]


def test_without_a_gpu_it_says_so_and_exits_with_its_own_status() -> None:
    """From a plain checkout, with no more than the standard library; 77 means skipped."""
    script = Path(gpu_check.__file__)
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-S", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 77, done.stderr
    assert "there is no NVIDIA GPU to check here" in done.stdout


@pytest.mark.gpu
def test_on_a_real_gpu() -> None:
    """The check on this machine's GPU, or a skip that says why there is none."""
    done = subprocess.run([sys.executable, Path(gpu_check.__file__)], capture_output=True, text=True, check=False)
    if done.returncode == gpu_check.NO_GPU:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
