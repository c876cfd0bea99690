"""A machine with vllmd's units and this working tree, and clients of its launcher."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import container
from tests.machine.container import REPOSITORY, CannotBoot, Machine

WRAPPER = '#!/bin/sh\nPYTHONPATH=/opt/vllmd exec /usr/bin/python3 -m {module} "$@"\n'
# Stands in for the daemon: says READY, drains for a while on SIGTERM (as long as /run/hold is there, too), notes when
# it did what.
DAEMON = """
import os, signal, time
import sdnotify
def note(what):
    with open("/run/notes", "a") as file:
        file.write(f"{time.time():.3f} {what}\\n")
def stop(*_):
    note("daemon drains")
    time.sleep(0.5)
    while os.path.exists("/run/hold"):
        time.sleep(0.02)
    note("daemon exits")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
sdnotify.SystemdNotifier().notify("READY=1")
note("daemon ready")
while True:
    signal.pause()
"""
STAND_IN = """[Unit]
StartLimitIntervalSec=60
StartLimitBurst=5
[Service]
User=root
ExecStart=
ExecStart=/usr/bin/python3 /usr/lib/stand-in-daemon.py
WatchdogSec=0
ProtectSystem=no
RestartSec=100ms
"""


# The unit's own command, and root may connect as well: that is whom tests are, seen from the machine.
_UNIT = (REPOSITORY / "units/vllmd-launcher.service").read_text().replace("\\\n", "")
COMMAND = next(line for line in _UNIT.splitlines() if line.startswith("ExecStart=/"))
LAUNCHER = f"[Service]\nExecStart=\n{COMMAND} --client-user root {{more}}\n"


@pytest.fixture(scope="module")
def site() -> Iterator[Machine]:
    """A booted Debian 12 with the units installed and started; the daemon is a stand-in."""
    try:
        with container.booted(binds={REPOSITORY: "/opt/vllmd"}) as machine:
            install(machine)
            yield machine
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")


def install(machine: Machine) -> None:
    """The units, users and folders of this working tree, as the package would install them."""
    for source in (REPOSITORY / "units").iterdir():
        if source.suffix in (".socket", ".service", ".slice"):
            machine.copy_in(source, f"/usr/lib/systemd/system/{source.name}")
    for source in (REPOSITORY / "units/user").iterdir():
        machine.copy_in(source, f"/usr/lib/systemd/user/{source.name}")
    machine.copy_in(REPOSITORY / "units/vllmd.sysusers", "/usr/lib/sysusers.d/vllmd.conf")
    machine.copy_in(REPOSITORY / "units/vllmd.tmpfiles", "/usr/lib/tmpfiles.d/vllmd.conf")
    machine.write("/usr/bin/vllmd-launcher", WRAPPER.format(module="vllmd.launcher"), mode="755")
    machine.write("/usr/lib/stand-in-daemon.py", DAEMON)
    machine.write("/etc/systemd/system/vllmd.service.d/stand-in.conf", STAND_IN)
    machine.write("/etc/systemd/system/vllmd-launcher.service.d/10-tests.conf", LAUNCHER.format(more=""))
    machine.run("systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload")
    machine.run("systemctl start vllmd.socket vllmd-launcher.socket")


def launcher_socket(machine: Machine) -> Path:
    """The launcher's socket as seen from here; the peer is root, whom these tests' launcher accepts."""
    return Path(f"/proc/{machine.leader}/root/run/vllmd/launcher.sock")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run coroutine tests, each in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True
