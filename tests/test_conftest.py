"""What a skipped test means, here and in CI; and how tests are shared out when they run side by side."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

SKIPS = """
import pytest

def test_skips():
    pytest.skip("no such thing here")

@pytest.mark.xfail(reason="known")
def test_known_to_fail():
    assert False
"""
SKIPS_WHOLE_FILE = 'import pytest; pytest.skip("no such module", allow_module_level=True)'


FOUR = """
import pytest

pytestmark = [pytest.mark.{marks}]

@pytest.mark.parametrize("number", range(4))
def test_passes(number):
    pass
"""
DIES = """
import os

def test_before():
    pass

def test_dies():
    os.kill(os.getpid(), 9)

def test_after():
    pass
"""


def run(folder: Path, text: str, ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    plugins = ["-p", "xdist", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    argv = [sys.executable, "-m", "pytest", *plugins, "-rs", *options, folder]
    # The plugins of other packages take seconds to load, in every worker.
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "side by side"])
@pytest.mark.parametrize("text", [SKIPS, SKIPS_WHOLE_FILE], ids=["test", "file"])
def test_a_skip_is_a_failure_in_ci(tmp_path: Path, text: str, options: tuple[str, ...]) -> None:
    """CI proves everything or says that it did not."""
    done = run(tmp_path, text, "true", *options)
    assert done.returncode != 0
    assert "counts as a failure under CI=true" in done.stdout
    assert "no such" in done.stdout


def test_a_skip_is_a_skip_elsewhere(tmp_path: Path) -> None:
    """A contributor without root can still run what their computer can, and sees what was left out."""
    done = run(tmp_path, SKIPS, ci="")
    assert done.returncode == 0
    assert "no such thing here" in done.stdout


def test_a_worker_that_dies_fails_its_test_and_the_others_run(tmp_path: Path) -> None:
    """Once, whatever xdist does about it; and the last line counts it."""
    done = run(tmp_path, DIES, "true", "-n", "2")
    assert done.returncode == 1
    assert "crashed while running 'test_it.py::test_dies'" in done.stdout
    assert "1 failed, 2 passed" in done.stdout.splitlines()[-1]


def test_a_file_stays_together_and_all_with_a_real_vllm_too(tmp_path: Path) -> None:
    """What a file boots is booted once, no two vLLMs start in one place, and what takes longest begins first."""
    both = "vllm, pytest.mark.machine"
    for name, marks in (("a", "x"), ("b", "machine"), ("c", "vllm"), ("d", both), ("e", "vllm"), ("f", both)):
        (tmp_path / f"test_{name}.py").write_text(FOUR.format(marks=marks))
    done = run(tmp_path, "", "true", "-n", "2", "-v")
    ran: dict[str, str] = {}
    for worker, file in re.findall(r"\[(gw\d)\] .*PASSED test_(\w)\.py", done.stdout):
        ran[worker] = ran.get(worker, "") + file
    in_container, outside = sorted(ran.values(), key=lambda files: "d" not in files)
    assert in_container.startswith("ddddffff"), done.stdout
    assert outside.startswith("cccceeee"), done.stdout
    rest = in_container[8:] + outside[8:]
    assert sorted(rest) == sorted("aaaabbbb") and "bbbb" in (in_container[8:12], outside[8:12]), done.stdout
    assert all(len(list(same)) == 4 for files in ran.values() for _, same in itertools.groupby(files)), done.stdout
