"""packaging/dev/setup: what it says when it cannot, and that it does nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.container import REPOSITORY

NOBODY = 65534


def setup(
    *verbs: str, cache: Path | None = None, user: int | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"VLLMD_DEV_CACHE": str(cache)} if cache else {}), **settings}
    argv = [(cache if user and cache else REPOSITORY) / "packaging/dev/setup", *verbs]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, user=user, group=user)


@pytest.fixture
def nobodys_cache() -> Iterator[Path]:
    """A folder that everybody can reach and write into, with the script; tmp_path and a clone may be root's alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become nobody")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        shutil.copytree(REPOSITORY / "packaging/dev", Path(folder, "packaging/dev"))
        yield Path(folder)


def test_an_unknown_verb_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """A typing error is answered with what would be right."""
    done = setup("tres", cache=tmp_path)
    assert done.returncode == 1
    assert "unknown verb 'tres' (host venv " in done.stderr


def test_help_lists_the_verbs() -> None:
    """The script's own head is its manual."""
    assert "usage: packaging/dev/setup" in setup("--help").stdout


def test_without_root_it_says_what_needs_root(nobodys_cache: Path) -> None:
    """The rest works for everybody; a container tree is made by root only."""
    done = setup("tree", cache=nobodys_cache, user=NOBODY)
    assert done.returncode == 1
    assert done.stderr.strip() == "setup: 'tree' needs root (chroot)"


def test_all_ends_with_what_failed(nobodys_cache: Path) -> None:
    """Its steps run side by side, so the reasons stand somewhere above; without the venv it has failed as a whole."""
    done = setup("all", cache=nobodys_cache, user=NOBODY, PYTHON="/bin/false", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 1
    *reasons, last = done.stderr.splitlines()
    steps = "[venv bytecode wheels] [llama axe] [tree build old] [trixie] [vllm model engines ray]"
    assert last == f"setup: failed, for the reasons above: {steps}"
    assert reasons.count("setup: 'tree' needs root (chroot)") == 2
    assert "setup: /bin/false is older than 3.11" in reasons
    assert any(reason.startswith("setup: pip found no CPU build of torch") for reason in reasons)


def test_what_is_there_is_not_made_again() -> None:
    """`make check` calls it every time."""
    assert setup("venv").returncode == 0
    again = setup("venv")
    assert (again.returncode, again.stderr) == (0, "")
