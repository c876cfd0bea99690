"""The container that the end-to-end tests stand on."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import cgroups, container
from tests.machine.container import Machine, TimedOut

pytestmark = pytest.mark.machine


def test_boots_debian_12s_systemd(machine: Machine) -> None:
    """The end-to-end tests prove something only on the systemd that users have."""
    assert machine.out("systemctl is-system-running") == "running"
    assert machine.out("systemctl --version").startswith("systemd 252 ")
    assert machine.out("cat /proc/1/comm") == "systemd"


def test_has_the_packages_that_vllmd_depends_on(machine: Machine) -> None:
    """Installing the .deb later must not need the network."""
    machine.python("import h11, httpx, pystemd, yaml, sdnotify, prometheus_client")


def test_network_is_its_own(machine: Machine) -> None:
    """Ports opened inside cannot clash with, or be reached from, the computer that runs the tests."""
    assert [line.split()[1] for line in machine.out("ip -o link").splitlines()] == ["lo:"]
    assert "UP" in machine.out("ip -o link show lo")


def test_commands_run_inside_its_control_group(machine: Machine) -> None:
    """A process started by a test dies with the machine and cannot confuse its systemd."""
    assert machine.out("cat /proc/self/cgroup").endswith("0::/test.run")


def test_a_failing_command_shows_its_output(machine: Machine) -> None:
    """Whoever reads a failed run sees what the command said."""
    with pytest.raises(AssertionError, match="exited 3:\nout\nerr"):
        machine.run("echo out; echo err >&2; exit 3")


def test_a_hanging_command_is_ended(machine: Machine) -> None:
    """No test hangs the suite; the command is dead inside too."""
    with pytest.raises(TimedOut):
        machine.run("exec -a hang-of-the-test sleep 1000", timeout=0.5)
    machine.wait_until("! pgrep -f hang-of-the-tes[t]", timeout=5)


def test_writes_and_reads_files(machine: Machine) -> None:
    """Tests configure the machine with files."""
    machine.write("/etc/some/new/file", "text\n", mode="640")
    assert machine.read("/etc/some/new/file") == "text\n"
    assert machine.out("stat -c %a /etc/some/new/file") == "640"


def test_a_user_has_a_manager_of_its_own(machine: Machine) -> None:
    """vllmd also runs in systemctl --user."""
    machine.add_user("ada")
    machine.run("systemd-run --user --scope --unit=hers true", user="ada")
    assert machine.out("id -un", user="ada") == "ada"


def test_journal_tells_what_a_unit_logged(machine: Machine) -> None:
    """Tests read what vllmd told the administrator."""
    machine.run("systemd-run --wait --unit=talker echo hello")
    assert "hello" in machine.journal("talker.service")


def test_two_machines_do_not_share_a_control_group(machine: Machine, boot_machine: Callable[..., Machine]) -> None:
    """Two systemds in one control group would kill each other's services."""
    other = boot_machine()
    for each in (machine, other):
        each.run("systemd-run --unit=mine sleep 1000")
    other.run("systemctl stop mine")
    assert machine.out("systemctl is-active mine") == "active"
    assert other.cgroup_pids("mine.service") == []
    machine.run("systemctl stop mine")


def test_files_outlive_a_reboot(boot_machine: Callable[..., Machine]) -> None:
    """Some behaviour shows only after a boot: what is enabled, what was temporary."""
    machine = boot_machine()
    machine.write("/etc/kept", "yes")
    machine.write("/run/lost", "yes")
    machine.reboot()
    assert machine.read("/etc/kept") == "yes"
    assert machine.run("test -e /run/lost", check=False).returncode == 1


def traces(name: str) -> list[str]:
    """Everything of a machine that this computer would show."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    processes = subprocess.run(["pgrep", "-af", name], capture_output=True, text=True).stdout.splitlines()
    files = list(container.machines_folder().glob(name))
    groups = list((cgroups.hierarchy() or Path("/nowhere")).rglob(name))
    return [*mounts, *processes, *map(str, files), *map(str, groups)]


def test_leaves_nothing_behind() -> None:
    """The tests run on people's own computers."""
    with container.booted() as machine:
        machine.popen("sleep 1000")
        machine.run("setsid sleep 1000 >/dev/null 2>&1 </dev/null & disown", timeout=10)
        assert traces(machine.name) != []
    assert traces(machine.name) == []


BOOT_AND_WAIT = """
from tests.machine import container
with container.booted() as machine:
    print(machine.name, machine.leader, flush=True)
    input()
"""


def wait_for_end(pidfd: int, timeout: float = 10.0) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(timeout * 1000), "the container's PID 1 still runs"
    os.close(pidfd)


def test_dies_with_its_test_process() -> None:
    """A killed test run leaves no running machine, and the next run removes its files."""
    process = subprocess.Popen(
        [sys.executable, "-c", BOOT_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=container.REPOSITORY,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    name, leader = process.stdout.readline().split()
    death = os.pidfd_open(int(leader))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for_end(death)
    container.remove_leftovers()
    assert traces(name) == []
