"""What a skipped test means, here and in CI."""

from __future__ import annotations

import os
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


def run(folder: Path, text: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    argv = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-rs", str(folder)]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("text", [SKIPS, SKIPS_WHOLE_FILE])
def test_a_skip_is_a_failure_in_ci(tmp_path: Path, text: str) -> None:
    """CI proves everything or says that it did not."""
    done = run(tmp_path, text, ci="true")
    assert done.returncode != 0
    assert "counts as a failure under CI=true" in done.stdout
    assert "no such" in done.stdout


def test_a_skip_is_a_skip_elsewhere(tmp_path: Path) -> None:
    """A contributor without root can still run what their computer can, and sees what was left out."""
    done = run(tmp_path, SKIPS, ci="")
    assert done.returncode == 0
    assert "no such thing here" in done.stdout
