"""packaging/dev/setup: what it says when it cannot, and that it does nothing twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.machine.container import REPOSITORY


def setup(*verbs: str, cache: Path | None = None, **options: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"VLLMD_DEV_CACHE": str(cache)} if cache else {})}
    argv = [REPOSITORY / "packaging/dev/setup", *verbs]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_an_unknown_verb_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """A typing error is answered with what would be right."""
    done = setup("tres", cache=tmp_path)
    assert done.returncode == 1
    assert "unknown verb 'tres' (host venv tree" in done.stderr


def test_help_lists_the_verbs() -> None:
    """The script's own head is its manual."""
    assert "usage: packaging/dev/setup" in setup("--help").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody")
def test_without_root_it_says_what_needs_root(tmp_path: Path) -> None:
    """The rest works for everybody; a container tree is made by root only."""
    nobody = 65534
    os.chmod(tmp_path, 0o777)
    for parent in tmp_path.parents[:2]:
        os.chmod(parent, 0o755)
    done = setup("tree", cache=tmp_path, user=nobody, group=nobody)
    assert done.returncode == 1
    assert done.stderr.strip() == "setup: 'tree' needs root (debootstrap, chroot)"


def test_what_is_there_is_not_made_again() -> None:
    """`make check` calls it every time."""
    assert setup("venv").returncode == 0
    again = setup("venv")
    assert (again.returncode, again.stderr) == (0, "")
