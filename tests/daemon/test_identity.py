"""Root that starts vllmd by hand is told what that means, and may have it be somebody else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.machine import container
from tests.machine.container import REPOSITORY, CannotBoot

CONFIG = "devices: [{memory: 8GiB}]\nmodels: {m: {engine: sim, options: {load_time: 0}}}\n"
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def serve(folder: Path, *options: str) -> subprocess.Popen[str]:
    """``vllmd serve`` with a stand-in model, at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "vllmd.yaml"
    config.write_text(CONFIG)
    environment = {**os.environ, "VLLMD_ADMIN_SOCKET": str(folder / "run/admin.sock"), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("VLLMD_LAUNCHER", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "vllmd", "serve", "--config", str(config), "--port", str(port), *options],
        stderr=subprocess.PIPE, text=True, env=environment, cwd="/",
    )  # fmt: skip
    process.port = port  # type: ignore[attr-defined]
    return process


def ask(process: subprocess.Popen[str]) -> None:
    """A completion of the model, however long vllmd takes to be there."""
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{process.port}/v1/completions",
        body,
        {"Content-Type": "application/json"},  # type: ignore[attr-defined]
    )
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 200
                return
        except urllib.error.URLError:
            assert process.poll() is None and time.monotonic() < end


@ROOT
def test_root_is_told_that_engines_are_root_too(tmp_path: Path) -> None:
    """They run whatever code a model brings along."""
    process = serve(tmp_path)
    try:
        ask(process)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert "running as root: engines, and whatever code comes with their models, run as root as well" in said


@pytest.mark.machine
def test_nothing_stays_root_where_a_user_is_given() -> None:
    """vllmd, its launcher and its engines; it still listens where only root may, and vllmctl reaches it."""
    try:
        with container.booted(binds={REPOSITORY: "/opt/vllmd"}) as machine:
            machine.add_user("ann")
            machine.write("/etc/vllmd/vllmd.yaml", CONFIG)
            command = "cd /; PYTHONPATH=/opt/vllmd python3 -m vllmd serve --port 81 --user ann"
            machine.run(f"systemd-run --unit=byhand --setenv=HOME=/root sh -c '{command}'")
            machine.wait_until(ASK, timeout=60)
            users = machine.out("ps -o user:20= -C python3").split()
            assert len(users) == 3  # vllmd, its launcher, the engine
            assert set(users) == {"ann"}
            assert machine.out("stat -c %U /run/vllmd /run/vllmd/admin.sock") == "ann\nann"
            said = machine.journal("byhand.service")
            machine.run("systemctl stop byhand")
            assert "running as ann, and engines as well" in said
            assert "running as root" not in said
            assert machine.out("ls /run/vllmd") == ""
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")


ASK = """curl -sf -H 'Content-Type: application/json' -d '{"model": "m", "prompt": "x"}' http://127.0.0.1:81/v1/completions"""


@pytest.mark.parametrize(("user", "why"), [("no-such-user", "there is no such user")])
def test_a_user_that_is_not_there(tmp_path: Path, user: str, why: str) -> None:
    """An error at once, not as root after all."""
    process = serve(tmp_path, "--user", user)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 78
    assert why in said
