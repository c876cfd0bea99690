"""``vllmctl simulate`` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllmd.simulate import run_cli

CONFIG = """\
devices: [{memory: 80GiB}]
host_memory: 200GiB
models:
  large: {model: org/large, gpu_memory: 60GiB, param_count: 24, precision: bf16, aliases: [l]}
  small: {model: org/small, gpu_memory: 30GiB, param_count: 8, precision: bf16}
"""
TRACE = "time,model,prompt_tokens,output_tokens,key\n0,l,100,50,me\n5,small,100,50,you\n200,large,10,10,\n"


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A configuration and a trace that fit each other."""
    (tmp_path / "v.yaml").write_text(CONFIG)
    (tmp_path / "t.csv").write_text(TRACE)
    return ["--config", str(tmp_path / "v.yaml"), "--trace", str(tmp_path / "t.csv")]


def test_policies_stand_side_by_side(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A column per policy, then each one's models; units in the headings."""
    assert run_cli([*given, "--policy", "adaptive,lru,llama-swap"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["policy", "adaptive", "lru", "llama-swap"]
    assert [line.split() for line in lines[1:3]] == [["requests", "3", "3", "3"], ["failed", "0", "0", "0"]]
    assert lines[5].startswith("wait, mean (s) ")
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("large ") for line in lines) == 3


def test_json_has_every_figure(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts and dashboards: aliases count for their model."""
    assert run_cli([*given, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["policy"] == "adaptive"
    assert report["models"]["large"]["requests"] == 2
    assert report["all"]["tokens"] == 110
    assert report["samples"][0]["promised"].keys() == {"0"}


def test_what_if_there_were_another_gpu(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """On two devices both models stay: two starts instead of three loads."""
    assert run_cli([*given, "--json", "--devices", "80GiB,80GiB"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["all"]["swaps"] == 2


def test_models_that_wait_for_a_free_device(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """There are no strangers in a simulation: they take the share of an empty device, and leave for each other."""
    file = Path(given[1])
    file.write_text(
        CONFIG.replace("gpu_memory: 60GiB", "when_free: true").replace("gpu_memory: 30GiB", "when_free: true")
    )
    assert run_cli([*given, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["all"]["requests"], report["all"]["swaps"]) == (3, 3)
    assert {sample["promised"]["0"] for sample in report["samples"]} >= {64 << 30}


@pytest.mark.parametrize(
    ("extra", "status", "told"),
    [
        (["--policy", "adaptve"], 78, "there is no policy 'adaptve'; did you mean 'adaptive'?"),
        (["--trace", "/nowhere/t.csv"], 65, "/nowhere/t.csv: cannot read the trace"),
        (
            ["--devices", "40GiB"],
            78,
            "it needs 60 GiB on 1 device; device 0 has 40 GiB less a reserve of 512 MiB: 39.5 GiB",
        ),
        (["--devices", "plenty"], 78, "'plenty' is not a size"),
        (["--warm", "lukewarm"], 64, "invalid choice: 'lukewarm'"),
    ],
)
def test_mistakes_are_told(
    given: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], status: int, told: str
) -> None:
    """A sentence and an exit status of sysexits(3), no traceback."""
    assert run_cli([*given, *extra]) == status
    assert told in capsys.readouterr().err


def test_a_picture_needs_matplotlib_and_says_how_to_get_it(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is optional; the tables are printed all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_cli([*given, "--plot", "out.png"]) == 69
    printed = capsys.readouterr()
    assert "adaptive" in printed.out
    assert "--plot needs matplotlib, which is not installed: apt install python3-matplotlib" in printed.err


def test_a_picture(given: list[str], tmp_path: Path) -> None:
    """Where matplotlib is there, a file that is one."""
    pytest.importorskip("matplotlib")
    assert run_cli([*given, "--policy", "adaptive,lru", "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
