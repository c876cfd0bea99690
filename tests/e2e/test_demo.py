"""``make demo``'s program: here through systemd-socket-activate, in a session of a booted machine through systemd."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RealLlama
from tests.machine import container
from tests.machine.container import CannotBoot, Machine


def run_demo(*arguments: str) -> str:
    """What it shows on a machine where no systemd runs; it leaves no file behind."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:  # short: a socket's path has 107 characters
        environment = {**os.environ, "TMPDIR": folder, "XDG_RUNTIME_DIR": ""}
        argv = [sys.executable, REPOSITORY / "packaging/demo", *arguments]
        demo = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
        assert list(Path(folder).iterdir()) == []
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "systemd-socket-activate" in demo.stdout
    return demo.stdout


def test_without_systemd_it_shows_everything_and_leaves_nothing() -> None:
    """With the stand-in: answered, asleep, stopped, gone."""
    told_in_order(run_demo("--model", "sim"))


@pytest.mark.llama
def test_two_real_models_take_turns(llama: RealLlama) -> None:
    """The README's first command: true answers, and nothing wider than a terminal."""
    shown = run_demo()
    steps = (
        "> The capital of France is Paris.",
        "the model 'sums'",
        "4.",
        "> The capital of France is Paris.",
        "nobody asks any more",
        "france: stop: to make room for sums",
        "sums: stop: to make room for france",
        "nothing is loaded and nobody is connected",
        "left behind: no process",
    )
    at = 0
    for step in steps:
        assert (at := shown.find(step, at)) >= 0, f"{step}\n{shown}"
    assert max(map(len, shown.splitlines())) <= 80


@pytest.fixture(scope="module")
def session() -> Iterator[Machine]:
    """A machine on which ada has a session and can read this working tree."""
    try:
        with container.booted(binds={REPOSITORY: "/srv/vllmd"}) as machine:
            machine.add_user("ada")
            yield machine
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")


@pytest.mark.machine
def test_in_a_session_it_uses_the_users_systemd(session: Machine) -> None:
    """Where systemd runs, the engine is in a scope of the user's manager; no unit stays behind."""
    demo = session.run("cd /srv/vllmd && packaging/demo --model sim", user="ada", check=False, timeout=120)
    assert demo.returncode == 0, demo.stdout + demo.stderr + session.journal()[-3000:]
    assert "systemd (user manager)" in demo.stdout
    assert "vllmd-model-demo-" in demo.stdout
    told_in_order(demo.stdout)
    assert session.out("systemctl --user list-units --all --no-legend 'vllmd-*'", user="ada") == ""
    assert session.out("ls /run/user/*/systemd/user | grep vllmd || true") == ""


def told_in_order(text: str) -> None:
    """Answered, asleep, stopped, exited, nothing left."""
    steps = (
        "What does a machine at rest pay?",
        "demo: start:",
        "demo: sleep:",
        "demo: stop:",
        "left behind: no process",
    )
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
