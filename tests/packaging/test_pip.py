"""sdist and wheel: built from the sources, installed in a virtual environment, run without systemd."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine.container import REPOSITORY, Machine

pytestmark = pytest.mark.machine

ASK = (
    "curl -sSf --max-time 60 http://127.0.0.1:8099/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "m", "prompt": "out of a wheel"}'"""
)


def sources(*more: str) -> bytes:
    """What an sdist is made of, and ``more``, as a tar archive."""
    wanted = ["vllmd", "pyproject.toml", "README.md", "LICENSE", *more]
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *wanted],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout
    there = b"\0".join(name for name in names.split(b"\0") if name and (REPOSITORY / name.decode()).exists())
    return subprocess.run(
        ["tar", "--null", "--files-from=-", "--create"], cwd=REPOSITORY, input=there, capture_output=True, check=True
    ).stdout


def test_a_wheel_made_from_the_sdist_serves(boot_machine: Callable[..., Machine], tmp_path: Path) -> None:
    """As PyPI would ship it: nothing that the program needs is left out, and its three commands are there."""
    machine = boot_machine(build=True)
    archive = tmp_path / "sources.tar"
    archive.write_bytes(sources())
    machine.copy_in(archive, "/root/sources.tar")
    machine.run("mkdir /root/vllmd && tar -xf /root/sources.tar -C /root/vllmd")
    machine.run("cd /root/vllmd && python3 -m build --no-isolation", timeout=120)
    made = machine.out("ls /root/vllmd/dist").replace("vllmd-server", "vllmd_server").split()  # older setuptools
    assert sorted(made) == ["vllmd_server-0.1.0-py3-none-any.whl", "vllmd_server-0.1.0.tar.gz"]
    machine.run("python3 -m venv --system-site-packages --without-pip /opt/venv")
    machine.run("/opt/venv/bin/python -m installer /root/vllmd/dist/*.whl")
    assert machine.out("ls /opt/venv/bin | grep vllm").split() == ["vllmctl", "vllmd", "vllmd-launcher"]
    machine.run("rm -r /root/vllmd; useradd --create-home ada")
    machine.write("/home/ada/.config/vllmd/vllmd.yaml", "devices: []\nmodels: {m: {engine: sim}}\n")
    served = machine.popen("exec /opt/venv/bin/vllmd serve --port 8099", user="ada", env={"XDG_RUNTIME_DIR": "/tmp"})
    machine.wait_until("curl -sf http://127.0.0.1:8099/health")
    assert "out of a wheel" in machine.out(ASK)
    assert "running" in machine.out("/opt/venv/bin/vllmctl ps", user="ada", env={"XDG_RUNTIME_DIR": "/tmp"})
    machine.run("pkill -TERM -u ada -x vllmd")
    assert served.wait(120) == 0
