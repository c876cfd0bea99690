"""The .rpm, as far as Debian's rpm can tell: it installs, listens, answers and goes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine.container import Machine
from tests.packaging.test_pip import sources

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


def test_modules_are_where_the_targets_python_looks(boot_machine: Callable[..., Machine]) -> None:
    """Fedora's macros come with its build machines: with the value that they have there, the files are there."""
    machine = boot_machine(build=True)
    archive = machine.folder / "sources.tar"
    archive.write_bytes(sources("packaging", "units", "man"))
    machine.copy_in(archive, "/root/sources.tar")
    machine.run("mkdir -p /root/vllmd-0.1.0 /root/rpm/SOURCES && tar -xf /root/sources.tar -C /root/vllmd-0.1.0")
    machine.run("tar -C /root -czf /root/rpm/SOURCES/vllmd-0.1.0.tar.gz vllmd-0.1.0")
    fedora = "--define '_topdir /root/rpm' --define 'python3_sitelib /usr/lib/python3.14/site-packages'"
    machine.run(f"rpmbuild -bb --nodeps {fedora} /root/vllmd-0.1.0/packaging/rpm/vllmd.spec", timeout=300)
    files = machine.out("rpm --query --list --package /root/rpm/RPMS/noarch/*.rpm").splitlines()
    assert "/usr/lib/python3.14/site-packages/vllmd/cli/__init__.py" in files
    assert [name for name in files if "dist-packages" in name] == []
