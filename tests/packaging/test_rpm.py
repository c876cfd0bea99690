"""The .rpm, as far as Debian's rpm can tell: it installs, listens, answers and goes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine.container import Machine

pytestmark = pytest.mark.machine

SOCKETS = ("vllmd.socket", "vllmd-admin.socket", "vllmd-read.socket", "vllmd-installer.socket")


def test_installs_answers_upgrades_and_goes(boot_machine: Callable[..., Machine], rpm_package: Path) -> None:
    """Its scriptlets are written by hand, so they are run here; dependencies are Debian's own packages."""
    machine = boot_machine(build=True)
    machine.copy_in(rpm_package, "/root/vllmd.rpm")
    machine.run("rpm --install --nodeps /root/vllmd.rpm", timeout=120)
    assert machine.out(f"systemctl is-enabled {' '.join(SOCKETS)}").split() == ["enabled"] * 4
    assert machine.run("systemctl is-active vllmd.service", check=False).stdout.strip() == "inactive"
    assert '"data"' in machine.out("curl -sSf --max-time 60 http://127.0.0.1:33258/v1/models")
    machine.run("man -w vllmd vllmctl vllmd.yaml vllmd-launcher")
    daemon = machine.show("vllmd.service", "MainPID")
    machine.run("rpm --upgrade --replacepkgs --nodeps /root/vllmd.rpm", timeout=120)
    assert machine.show("vllmd.service", "MainPID") != daemon
    machine.run("rpm --erase vllmd", timeout=120)
    assert machine.run("pgrep -u vllmd", check=False).stdout == ""
    assert machine.run("curl -s http://127.0.0.1:33258/", check=False).returncode == 7


def test_says_what_it_needs(boot_machine: Callable[..., Machine], rpm_package: Path) -> None:
    """Fedora's dnf installs from these; the names are those of the Python distributions."""
    machine = boot_machine(build=True)
    machine.copy_in(rpm_package, "/root/vllmd.rpm")
    needs = machine.out("rpm --query --requires --package /root/vllmd.rpm")
    for name in ("h11", "httpx", "prometheus-client", "pystemd", "pyyaml", "sdnotify"):
        assert f"python3dist({name})" in needs
