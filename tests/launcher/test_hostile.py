"""What others may try on the launcher of a booted machine: neighbours on the bus, a daemon that was taken over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from tests.launcher.conftest import launcher_socket
from tests.launcher.driver import Driver, connected, fresh
from tests.machine.container import Machine
from vllmd.launcher.client import LauncherFailed
from vllmd.launcher.protocol import StartOrder

pytestmark = pytest.mark.machine

# As any local user: what claims to be systemd's, sent to every name that the launcher has on the bus.
FORGED = """
import subprocess, sys
rounds, signals = int(sys.argv[1]), sys.argv[2:]
listed = subprocess.run(["busctl", "list", "--no-legend"], capture_output=True, text=True).stdout
names = [line.split()[0] for line in listed.splitlines() if "vllmd-launcher" in line]
assert len(names) == 2, listed
for _ in range(rounds):
    for name in names:
        for given in signals:
            path, member, *arguments = given.split()
            subprocess.run(["dbus-send", "--system", "--type=signal", f"--dest={name}", path,
                            f"org.freedesktop.systemd1.{member}", *arguments], check=True)
"""
MANAGER = "/org/freedesktop/systemd1"
MALFORMED = (
    f"{MANAGER} Manager.JobRemoved",
    f"{MANAGER} Manager.UnitRemoved uint32:7",
    f"{MANAGER}/unit/a_zz Scope.RequestStop",
    f"{MANAGER} Manager.JobRemoved uint32:7 objpath:{MANAGER}/job/1 string:x string:failed",
)


def forge(site: Machine, *signals: str, rounds: int = 1) -> None:
    """Send them as a user who may do nothing else."""
    site.run(["/usr/bin/python3", "-c", FORGED, str(rounds), *signals], user="vllmd-engine")


def path_of(unit: str) -> str:
    """The object path of a unit."""
    return f"{MANAGER}/unit/" + "".join(each if each.isalnum() else f"_{ord(each):02x}" for each in unit)


@asynccontextmanager
async def driving(site: Machine) -> AsyncIterator[Driver]:
    """A driver on the machine's launcher, with the stand-in daemon running."""
    site.run("systemctl reset-failed vllmd.service; systemctl start vllmd.service")
    async with connected(launcher_socket(site)) as driver:
        yield driver


@contextmanager
def clean(site: Machine) -> Iterator[None]:
    """No traceback in the launcher's journal meanwhile."""
    before = site.journal("vllmd-launcher.service").count("Traceback")
    yield
    assert site.journal("vllmd-launcher.service").count("Traceback") == before


async def test_only_systemd_stops_an_engine(site: Machine) -> None:
    """Every user may send the launcher a signal that says it is systemd's; the sender tells that it is not."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000")
        with clean(site):
            forge(site, f"{path_of(engine.unit)} Scope.RequestStop")
            other = await driver.start("exec sleep 1000")  # what was sent before it has been read
        assert [found.instance for found in await driver.client.list()] == [engine.instance, other.instance]
        assert "was ignored: it is not systemd's" in site.journal("vllmd-launcher.service")
        site.run(["systemctl", "stop", engine.unit])
        report = await driver.exit()
        assert (report.instance, report.signal) == (engine.instance, signal.SIGTERM)


async def test_starts_do_not_mind_what_neighbours_send(site: Machine) -> None:
    """Whatever shape it has, and while it comes: no true signal is lost with it, and no line of log is due to each."""
    async with driving(site) as driver:
        with clean(site):
            before = site.journal("vllmd-launcher.service").count("\n")
            sending = asyncio.create_task(asyncio.to_thread(forge, site, *MALFORMED, rounds=15))
            while not sending.done():
                engine = await driver.start("exec sleep 1000")
                site.run(["systemctl", "stop", engine.unit])
                assert (await driver.exit()).signal == signal.SIGTERM
            await sending
        told = [line for line in site.journal("vllmd-launcher.service").splitlines()[before:] if "ignored" in line]
        assert 0 < len(told) <= 25


@pytest.mark.parametrize("again", ["systemctl daemon-reexec", "systemctl restart dbus"])
async def test_systemd_is_followed_to_its_next_name(site: Machine, again: str) -> None:
    """It comes back to the bus under another unique name: its signals count, and nobody else's."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000")
        site.run(again)
        site.wait_until("systemctl is-active vllmd-launcher.service")
        other = await driver.start("exec sleep 1000")
        forge(site, f"{path_of(other.unit)} Scope.RequestStop")
        third = await driver.start("exec sleep 1000")
        assert len(await driver.client.list()) == 3
        for each in (engine, other, third):
            site.run(["systemctl", "stop", each.unit])
            assert (await driver.exit()).instance == each.instance


async def test_run_directories_lie_where_they_may(site: Machine) -> None:
    """Root tidies them by the engine's user; a daemon that was taken over chooses neither the place nor the user."""
    async with driving(site) as driver:
        for place in ("/run/dbus", "/run/vllmd-engine", "/run/vllmd-engine-evil/x"):
            with pytest.raises(LauncherFailed, match=f"run_dir {place} is not beneath /run/vllmd-engine"):
                await driver.start("exec sleep 1000", run_dir=place)
    assert site.run("test -S /run/dbus/system_bus_socket").returncode == 0


async def test_notes_that_nobody_can_have_written_are_not_acted_on(site: Machine) -> None:
    """The next launcher tidies nothing for a user that it does not know, and outside of its root for nobody."""
    change = "import os, sys; os.setxattr(sys.argv[1], 'user.vllmd.launcher.' + sys.argv[2], sys.argv[3].encode())"
    for note, value in (("user", "nobody"), ("user", ""), ("run_dir", "/run/evil")):
        folder = f"/run/vllmd-engine/{fresh()}"
        site.run(f"mkdir -p /run/evil; rm -f /run/evil/s; chown vllmd-engine /run/evil; {SOCKET.format('/run/evil/s')}")
        async with driving(site) as driver:
            engine = await driver.start(f"{SOCKET.format('s')}; exec sleep 1000", run_dir=folder)
            site.wait_until(f"test -S {folder}/s")
            site.python(change, engine.cgroup, note, value)
            site.run("systemctl kill --signal=KILL --kill-who=main vllmd-launcher.service")
            await asyncio.wait_for(driver.lost.wait(), 10)
            await driver.client.kill(engine.instance)
            await driver.exit()
            await driver.start("exit 0")  # one more fork of the launcher, after that of a tidying
            await driver.exit()
        site.run(f"test -S {folder}/s && test -S /run/evil/s")


SOCKET = "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('{}')\""


async def test_metadata_leaves_room_for_the_launchers_own_notes(site: Machine) -> None:
    """A control group takes 128 attributes: the daemon's may not crowd out who the engine is."""
    async with driving(site) as driver:
        most = {f"k{number}": "x" for number in range(64)}
        engine = await driver.start("exec sleep 1000", metadata=most)
        with pytest.raises(LauncherFailed, match="more than 64 keys"):
            await driver.client.annotate(engine.instance, {"another": "x"})
        site.run("systemctl kill --signal=KILL --kill-who=main vllmd-launcher.service")
        await asyncio.wait_for(driver.lost.wait(), 10)
        (found,) = await driver.client.list()
        assert (found.pid, len(found.metadata)) == (engine.pid, 64)


async def test_no_engine_no_follower(site: Machine) -> None:
    """Each followed log is a process of root's: of a made-up engine there is none."""
    async with driving(site) as driver:
        for number in range(20):
            await driver.client.follow(f"made-up-{number}")
        site.wait_until("! pgrep -u root -x journalctl", timeout=20)


@pytest.mark.parametrize("before", ["echo before; ", ""])
async def test_a_record_of_many_megabytes_costs_little(site: Machine, before: str) -> None:
    """An engine may send journald 768 MiB in one field; whoever follows it must not be made to hold that."""
    async with driving(site) as driver:
        site.write("/usr/lib/bomb.py", BOMB)
        engine = await driver.start(f"{before}python3 /usr/lib/bomb.py 60; echo after; exec sleep 1000")
        await driver.client.follow(engine.instance, 1000)
        await driver.line("after")
        pid = site.show("vllmd-launcher.service", "MainPID")
        peak = int(site.out(f"grep VmHWM /proc/{pid}/status").split()[1])
        assert peak < 100_000  # kB
        lines = await driver.client.tail(engine.instance, 10)
        assert lines[-1] == "after"


BOMB = """
import array, fcntl, os, socket, struct, sys
body = b"ab" * (int(sys.argv[1]) << 19)
fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
with open(fd, "wb", closefd=False) as file:
    file.write(b"PRIORITY=6\\nMESSAGE\\n" + struct.pack("<Q", len(body)) + body + b"\\n")
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 15)
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.connect("/run/systemd/journal/socket")
journal.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
"""


async def test_no_text_of_an_order_reaches_a_unit(site: Machine) -> None:
    """systemd believes each line of a transient unit's file at its next reload: only checked words are in it."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000", metadata={"model": "m"}, env={"A": "x\nOnSuccess=evil.service"})
        text = site.read(f"/run/systemd/transient/{engine.unit}")
        assert f"Description=vllmd engine {engine.instance}\n" in text
        assert "evil" not in text
    with pytest.raises(TypeError):
        StartOrder("a", ("b",), description="c")  # type: ignore[call-arg]
