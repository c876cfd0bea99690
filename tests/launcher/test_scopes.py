"""Engines in scopes of a real systemd 252, through the real launcher."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.launcher.conftest import LAUNCHER, launcher_socket
from tests.launcher.driver import Driver, connected, fresh, until
from tests.machine.container import Machine
from vllmd.launcher import client
from vllmd.launcher.client import ExitReport, LauncherClient, LauncherFailed, Running, StartOrder
from vllmd.launcher.protocol import unit_of

pytestmark = pytest.mark.machine

# Double-forked, in a session of its own: neither a child nor in the process group of the engine.
ESCAPEE = "setsid sh -c 'setsid sleep 1000 & exit' & wait; "


@asynccontextmanager
async def driving(site: Machine) -> AsyncIterator[Driver]:
    """A driver on the machine's launcher, with the stand-in daemon running."""
    site.run("systemctl reset-failed vllmd.service; systemctl start vllmd.service")
    async with connected(launcher_socket(site)) as driver:
        yield driver


def units(site: Machine) -> str:
    """The scopes that systemd knows."""
    return site.out("systemctl list-units --all --plain --no-legend 'vllmd-model-*'")


def kill_launcher(site: Machine) -> None:
    """As the OOM killer would."""
    site.run("systemctl kill --signal=KILL --kill-who=main vllmd-launcher.service")


# --- standbys ---

IMPORTED = "import os; BORN = os.getpid()"
PROGRAM = """#!/usr/bin/python3
import os, imported, socket, sys, time
socket.socket(socket.AF_UNIX).bind("s")
print(imported.BORN == os.getpid(), sys.argv[1:], os.getcwd(), os.environ["LATE"], flush=True)
if os.fork() == 0:
    time.sleep(1000)
time.sleep(1000)
"""


async def standby(site: Machine, driver: Driver) -> Running:
    """One that waits, for the program at /usr/local/lib/program."""
    site.write("/usr/local/lib/imported.py", IMPORTED)
    site.write("/usr/local/lib/program", PROGRAM, mode="755")
    late = ["LATE", "VLLMD_INSTANCE"]
    spec = {"program": "/usr/local/lib/program", "imports": ["imported"], "late": late, "ours": [], "set": {}}
    argv = ("/usr/bin/python3", "/opt/vllmd/vllmd/engines/standby_main.py", json.dumps(spec))

    found = await driver.client.start(StartOrder(fresh(), argv, waits=True, limits={"cpu_weight": 1}))
    await until(lambda: found.instance in driver.waiting)
    return found


def made_of(one: Running, word: str) -> StartOrder:
    """An engine of that standby."""
    instance = fresh()
    run = f"/run/vllmd-engine/{instance}"
    argv, env = ("/usr/local/lib/program", word), {"LATE": word}
    limits = {"memory_max": 1 << 30}
    return StartOrder(
        instance, argv, env, run_dir=run, listen_uds=f"{run}/s", limits=limits, standby=one.instance, timeout=20
    )


async def test_a_standby_moves_into_the_scope_of_the_engine_that_it_becomes(site: Machine) -> None:
    """With its forks, its limits, its log and its run directory as any other; of the standby's unit nothing stays."""
    async with driving(site) as driver:
        one = await standby(site, driver)
        assert site.cgroup_pids(one.unit) == [one.pid]
        engine = await driver.client.start(made_of(one, "hello"))
        assert (engine.pid, engine.standby) == (one.pid, one.instance)
        await driver.client.follow(engine.instance)
        run = f"/run/vllmd-engine/{engine.instance}"
        await driver.line(f"True ['hello'] {run} hello")
        pids = await until(lambda: found if len(found := site.cgroup_pids(engine.unit)) == 2 else None)
        assert engine.pid in pids
        assert site.show(engine.unit, "MemoryMax") == "1073741824"
        assert site.out(f"stat -c '%A %U:%G' {run} {run}/s").splitlines() == [
            "drwxr-s--- vllmd-engine:vllmd-sockets",
            "srwxrwx--- vllmd-engine:vllmd-sockets",
        ]
        await until(lambda: engine.unit in units(site) and one.unit not in units(site))
        await driver.client.kill(engine.instance)
        assert (await driver.exit()).instance == engine.instance
        site.wait_until(f"test ! -e {run}", timeout=5)
        assert units(site) == ""


async def test_nothing_is_left_of_a_standby_that_nobody_can_use_any_more(site: Machine) -> None:
    """Killed while it is being moved it costs an ordinary start; with the daemon, or the launcher, it ends."""
    async with driving(site) as driver:
        one = await standby(site, driver)
        site.run(["kill", "-STOP", str(one.pid)])
        starting = asyncio.ensure_future(driver.client.start(made_of(one, "again")))
        await asyncio.sleep(0.03)
        site.run(["kill", "-KILL", str(one.pid)])
        engine = await starting
        assert engine.standby == ""
        await driver.client.follow(engine.instance)
        await driver.line(f"True ['again'] /run/vllmd-engine/{engine.instance} again")
        await driver.client.kill(engine.instance)
        await driver.exit()
        await until(lambda: units(site) == "")
        one = await standby(site, driver)
        kill_launcher(site)
        await until(lambda: driver.lost.is_set() and units(site) == "")
        # The launcher dies, and the standby in the engine's scope hears nothing of it: it is no engine all the same.
        one = await standby(site, driver)
        site.run(["kill", "-STOP", str(one.pid)])
        starting = asyncio.ensure_future(driver.client.start(made_of(one, "anew")))
        await until(lambda: one.unit not in units(site))
        kill_launcher(site)
        engine = await starting
        assert engine.standby == ""
        assert engine.pid != one.pid
        await driver.client.kill(engine.instance)
        await driver.exit()
        await until(lambda: units(site) == "")
    for ordered in (False, True):
        async with driving(site) as driver:
            one = await standby(site, driver)
            if ordered:  # the daemon is killed while the engine is being made
                site.run(["kill", "-STOP", str(one.pid)])
                starting = asyncio.ensure_future(driver.client.start(made_of(one, "lost")))
                await asyncio.sleep(0.03)
                await driver.client.close()
                with pytest.raises(LauncherFailed):
                    await starting
                site.run(f"kill -CONT {one.pid} || true")
            else:
                await driver.client.close()
            await until(lambda: units(site) == "")
            driver.lost.set()


# --- starting ---


async def test_an_engine_runs_in_a_scope_of_its_own_as_the_engine_user(site: Machine) -> None:
    """Whoever breaks into an engine is an unprivileged user without the launcher's descriptors or capabilities."""
    async with driving(site) as driver:
        engine = await driver.start(
            "id -un; umask; ls /proc/self/fd | tr '\\n' ' '; echo; grep CapEff /proc/self/status; exec sleep 1000",
            run_dir=f"/run/vllmd-engine/{fresh()}",
        )
        await driver.client.follow(engine.instance)
        await driver.line("CapEff:\t0000000000000000")
        lines = await driver.client.tail(engine.instance)
        assert lines[:3] == ["vllmd-engine", "0007", "0 1 2 3"]  # 3 is ls's own
        assert engine.cgroup == f"/sys/fs/cgroup/vllmd.slice/{engine.unit}"
        assert site.cgroup_pids(engine.unit) == [engine.pid]
        await driver.client.kill(engine.instance)
        assert (await driver.exit()).signal == signal.SIGKILL


async def test_the_environment_is_clean(site: Machine) -> None:
    """Nothing of the launcher's environment reaches an engine; what was ordered does."""
    async with driving(site) as driver:
        engine = await driver.start("/usr/bin/env", "-u", "none", env={"TOKEN": "secret"})
        report = await driver.exit()
        assert sorted(line.split("=")[0] for line in report.log_tail) == [
            *("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TOKEN", "USER", "VLLMD_INSTANCE")
        ]
        assert f"VLLMD_INSTANCE={engine.instance}" in report.log_tail


async def test_the_run_directory_is_the_engines_own(site: Machine) -> None:
    """The one member of the group vllmd-sockets (the daemon) may connect to its socket; a stale one is removed."""
    folder = f"/run/vllmd-engine/{fresh()}"
    site.run(["install", "-d", "-m", "2750", "-o", "vllmd-engine", "-g", "vllmd-sockets", folder])
    site.python("import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])", f"{folder}/s")
    listen = (
        "import socket, signal; socket.socket(socket.AF_UNIX).bind('s'); print('bound', flush=True); signal.pause()"
    )
    async with driving(site) as driver:
        engine = await driver.start("/usr/bin/python3", "-c", listen, run_dir=folder, listen_uds=f"{folder}/s")
        await driver.client.follow(engine.instance)
        await driver.line("bound")
        assert site.out(f"stat -c '%A %U:%G' {folder} {folder}/s").splitlines() == [
            "drwxr-s--- vllmd-engine:vllmd-sockets",
            "srwxrwx--- vllmd-engine:vllmd-sockets",
        ]
        await driver.client.kill(engine.instance)
        await driver.exit()
        site.wait_until(f"test ! -e {folder}", timeout=5)


async def test_shared_memory_of_a_killed_engine_is_freed(site: Machine) -> None:
    """vLLM's would stay until the machine is started anew. Another engine's, of the same user, is in use."""
    hold = (
        "import signal, sys; from _multiprocessing import SemLock; from multiprocessing.shared_memory import *; "
        "n = sys.argv[1]; held = SharedMemory('psm_' + n, True, 8), SemLock(1, 1, 1, '/mp-' + n, False); signal.pause()"
    )
    async with driving(site) as driver:
        left, other = fresh(), fresh()
        for name in (other, left):
            engine = await driver.start("/usr/bin/python3", "-c", hold, name, run_dir=f"/run/vllmd-engine/{name}")
            site.wait_until(f"ls /dev/shm/psm_{name} /dev/shm/sem.mp-{name}", timeout=5)
        await driver.client.kill(engine.instance)
        await driver.exit()
        site.wait_until(f"! ls /dev/shm | grep {left}", timeout=5)
        site.run(f"ls /dev/shm/psm_{other} /dev/shm/sem.mp-{other}")


async def test_limits_become_properties_of_the_scope(site: Machine) -> None:
    """What is configured for a model is what systemd enforces."""
    limits = {"memory_max": 1 << 30, "memory_swap_max": 0, "cpu_weight": 50, "cpu_quota": 1.5, "tasks_max": 99}
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000", limits={**limits, "oom_policy": "kill"})
        wanted = (
            "MemoryMax",
            "MemorySwapMax",
            "CPUWeight",
            "CPUQuotaPerSecUSec",
            "TasksMax",
            "OOMPolicy",
            "Description",
        )
        shown = [site.show(engine.unit, name) for name in wanted]
        assert shown == ["1073741824", "0", "50", "1.500000s", "99", "kill", f"vllmd engine {engine.instance}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nosuch", "x"), "there is no command 'nosuch'"),
        (("/nosuch", "x"), "there is no command /nosuch"),
        (("/etc/passwd", "x"), "cannot be executed: Permission denied"),
    ],
)
async def test_a_wrong_command_fails_for_good(site: Machine, argv: tuple[str, str], message: str) -> None:
    """The answer names the command, comes when all is clean, and says that trying again is no use."""
    async with driving(site) as driver:
        with pytest.raises(LauncherFailed, match=message) as failure:
            await driver.start(*argv)
        assert failure.value.permanent
        assert units(site) == ""


@pytest.mark.parametrize("user", ["root", "vllmd", "nosuch"])
async def test_other_users_are_refused(site: Machine, user: str) -> None:
    """The daemon can have engines run only as whom the administrator allowed."""
    async with driving(site) as driver:
        with pytest.raises(LauncherFailed, match="is not allowed; allowed are: vllmd-engine"):
            await driver.start("true", user=user)


async def test_a_scope_that_is_not_made_in_time_releases_nobody(site: Machine) -> None:
    """A child let go before the job is `done` would run, with all it forks, outside of the scope."""
    site.write("/etc/systemd/system/slow.service", "[Service]\nType=oneshot\nExecStart=/bin/sleep 5\n")
    site.write("/etc/systemd/system/vllmd.slice.d/slow.conf", "[Unit]\nWants=slow.service\nAfter=slow.service\n")
    site.run("systemctl daemon-reload; systemctl stop vllmd.slice; rm -f /tmp/ran")
    try:
        async with driving(site) as driver:
            with pytest.raises(LauncherFailed, match=r"systemd did not make the scope within 0\.3 s"):
                await driver.start("touch /tmp/ran; sleep 1000", timeout=0.3)
            assert units(site) == ""
        site.run("systemctl stop slow.service; test ! -e /tmp/ran")
    finally:
        site.run("rm -r /etc/systemd/system/vllmd.slice.d; systemctl daemon-reload")


async def test_a_start_that_fails_leaves_no_scope(site: Machine) -> None:
    """When its process ends while the scope is made, systemd asks us, the controller, to end what is not there."""
    async with driving(site) as driver:
        for _ in range(3):
            wrong = [driver.start("exec sleep 1000", cwd="/root", stop_timeout=600) for _ in range(6)]
            failed = await asyncio.gather(*wrong, return_exceptions=True)
            assert {str(error) for error in failed} == {"/bin/sh could not be started: Permission denied: /root"}
            assert units(site) == ""


async def test_a_name_in_use_is_refused_and_free_after_the_end(site: Machine) -> None:
    """A name can be taken again at once: the next start waits until systemd has forgotten the unit."""
    name = fresh()
    async with driving(site) as driver:
        for _ in range(10):
            await driver.start("sleep 1000 & exec sleep 1000", instance=name)
            with pytest.raises(LauncherFailed, match="is still in use"):
                await driver.start("true", instance=name)
            await driver.client.kill(name)
            await driver.exit()


# --- ending ---


@pytest.mark.parametrize(("command", "status", "number"), [("exit 7", 7, None), ("kill -ABRT $$", None, 6)])
async def test_the_exit_status_is_reported(site: Machine, command: str, status: int | None, number: int | None) -> None:
    """Whoever looks for the cause of a crash gets the status and the last lines."""
    async with driving(site) as driver:
        engine = await driver.start(f"echo one; echo two >&2; {command}")
        assert await driver.exit() == ExitReport(engine.instance, status, number, True, False, ("one", "two"))


async def test_nothing_survives_the_main_process(site: Machine) -> None:
    """A crashed API server leaves workers that hold the GPU: they are gone within the 2 s that were promised."""
    async with driving(site) as driver:
        engine = await driver.start(f"{ESCAPEE} sleep 1000 & echo forked; wait")
        await driver.client.follow(engine.instance)
        await driver.line("forked")
        await until(lambda: len(site.cgroup_pids(engine.unit)) >= 3)
        await driver.client.signal(engine.instance, signal.SIGKILL)
        async with asyncio.timeout(2):
            report = await driver.exits.get()
        assert (report.signal, report.empty) == (signal.SIGKILL, True)
        assert site.run(["pgrep", "-u", "vllmd-engine"], check=False).stdout == ""


async def test_a_signal_goes_to_the_main_process_only(site: Machine) -> None:
    """Workers of vLLM die of SIGTERM at once; only the main process knows how to end."""
    async with driving(site) as driver:
        engine = await driver.start(
            "(trap 'echo worker' TERM; while :; do sleep 0.1; done) & trap 'echo main; exit 0' TERM; echo up; wait"
        )
        await driver.client.follow(engine.instance)
        await driver.line("up")
        await driver.client.signal(engine.instance, signal.SIGTERM)
        await driver.exit()
        assert await driver.client.tail(engine.instance) == ["up", "main"]


async def test_every_line_of_a_short_life_is_attributed(site: Machine) -> None:
    """`journalctl -u` on the scope shows why an engine died at once."""
    async with driving(site) as driver:
        engines = [await driver.start(f"echo first {number}; exit 1") for number in range(10)]
        for _ in engines:
            await driver.exit()
        shown = [site.journal(engine.unit, "--output=cat", "--identifier", engine.instance) for engine in engines]
        assert shown == [f"first {number}\n" for number in range(10)]


async def test_a_log_is_followed_from_its_beginning(site: Machine) -> None:
    """Progress of a start is read from the log: no line may be missing, however late one begins to follow."""
    async with driving(site) as driver:
        engine = await driver.start("for i in $(seq 100); do echo $i; done; sleep 0.2; echo more; sleep 1000")
        await driver.client.follow(engine.instance, lines=100)
        await driver.line("more")
        assert await driver.client.tail(engine.instance, 3) == ["99", "100", "more"]
        await driver.client.unfollow(engine.instance)


async def test_nobody_follows_the_log_of_an_engine_that_has_ended(site: Machine) -> None:
    """A model that fails at each start would leave a process at each."""
    async with driving(site) as driver:
        engine = await driver.start("echo up; exec sleep 1000")
        await driver.client.follow(engine.instance)
        await driver.line("up")
        follower = f"pgrep --full 'journalctl.*--follow.*{engine.instance}'"
        assert site.run(follower, check=False).stdout
        await driver.client.kill(engine.instance)
        await driver.exit()
        assert site.run(follower, check=False).stdout == ""


# --- the daemon's life, systemd's commands ---


async def test_stop_drains_the_daemon_before_the_engines(site: Machine) -> None:
    """On `systemctl stop vllmd` streams end properly: the scope is stopped after the service, and gently."""
    async with driving(site) as driver:
        engine = await driver.start(
            "(trap 'echo worker' TERM; while :; do sleep 0.1; done) &"
            "trap 'echo main $(date +%s.%N); sleep 0.2; exit 0' TERM; echo up; while :; do sleep 0.02; done",
        )
        await driver.client.follow(engine.instance)
        await driver.line("up")
        site.run("rm -f /run/notes; systemctl stop vllmd.service vllmd.slice")
        assert units(site) == ""
        report = await driver.exit()
        lines = await driver.client.tail(engine.instance)
        (asked,) = [float(line.split()[1]) for line in lines if line.startswith("main")]
        (exited,) = [float(line.split()[0]) for line in site.read("/run/notes").splitlines() if "exits" in line]
        assert asked > exited
        assert (report.status, "worker" in lines) == (0, False)


async def test_the_launcher_outlives_the_engines_that_it_is_to_stop(site: Machine) -> None:
    """As at a shutdown, where everything stops: systemd leaves SIGTERM to the launcher, which must still be there."""
    async with driving(site) as driver:
        engine = await driver.start(
            "trap 'echo launcher $(systemctl is-active vllmd-launcher.service); exit 0' TERM; "
            "echo up; while :; do sleep 0.02; done",
        )
        await driver.client.follow(engine.instance)
        await driver.line("up")
        site.run("systemctl stop vllmd.service vllmd-launcher.service vllmd.slice")
        await asyncio.wait_for(driver.lost.wait(), 10)
        assert "launcher active" in site.journal(engine.unit, "--output=cat").splitlines()


@contextmanager
def draining(site: Machine, verb: str) -> Iterator[None]:
    """While the daemon drains, because of ``systemctl VERB vllmd``."""
    site.run("rm -f /run/notes; touch /run/hold")
    waiting = site.popen(f"systemctl {verb} vllmd.service")
    try:
        site.wait_until("grep drains /run/notes")
        yield
    finally:
        site.run("rm -f /run/hold")
        waiting.wait(120)


async def test_nothing_starts_once_a_stop_is_asked(site: Machine) -> None:
    """Its scope would not be part of the stop, and the engine would run on with nobody."""
    async with driving(site) as driver:
        with draining(site, "stop"):
            began = time.monotonic()
            with pytest.raises(LauncherFailed, match="vllmd is being stopped"):
                await driver.start("exec sleep 1000")
            assert time.monotonic() - began < 5  # the scope's job would have waited for the daemon's end
        assert units(site) == ""


async def test_a_stop_that_comes_while_a_scope_is_made_takes_it_along(site: Machine) -> None:
    """Whichever of the two systemd takes first, nothing runs afterwards."""
    async with driving(site) as driver:
        for _ in range(8):
            site.run("systemctl reset-failed vllmd.service; systemctl start vllmd.service; rm -f /run/notes")
            starts = [asyncio.ensure_future(driver.start("exec sleep 1000")) for _ in range(6)]
            await asyncio.sleep(0)
            await driver.client.list()  # asked behind them: whatever a busy machine does, they came before the stop
            await asyncio.to_thread(site.run, "systemctl stop vllmd.service")
            await asyncio.gather(*starts, return_exceptions=True)
            site.wait_until(lambda: units(site) == "", timeout=10)
        assert site.run(["pgrep", "-u", "vllmd-engine"], check=False).stdout == ""
        while not driver.exits.empty():
            driver.exits.get_nowait()


async def test_a_restart_holds_no_start_up(site: Machine) -> None:
    """A daemon that drains serves those who wait, too; the engine then belongs to the next daemon."""
    async with driving(site) as driver:
        with draining(site, "restart"):
            engine = await driver.start("exec sleep 1000", timeout=5)
            assert site.show("vllmd.service", "SubState") == "stop-sigterm"
        assert site.cgroup_pids(engine.unit) == [engine.pid]
        assert site.show("vllmd.slice", "ActiveState") == "active"
        site.run("systemctl stop vllmd.service")
        assert (await driver.exit()).instance == engine.instance
        site.wait_until(lambda: units(site) == "", timeout=5)


async def test_an_engine_that_nobody_manages_is_ended(site: Machine) -> None:
    """Whatever made it: the service is down and stays down, and no daemon is connected."""
    site.run("systemctl reset-failed vllmd.service; systemctl stop vllmd.service")
    driver = Driver()
    driver.client = await LauncherClient.at(launcher_socket(site), *driver.callbacks).open()
    engine = await driver.start("exec sleep 1000")
    await asyncio.sleep(3)  # longer than the launcher looks
    assert site.cgroup_pids(engine.unit) == [engine.pid]  # its daemon, though not systemd's, is there
    await driver.client.close()
    site.wait_until(lambda: units(site) == "", timeout=10)
    assert "no daemon manages it" in site.journal("vllmd-launcher.service")


async def test_a_start_that_nobody_waits_for_comes_to_nothing(site: Machine) -> None:
    """The next daemon has asked for the list by then: it would never hear of the engine."""
    async with driving(site) as driver:
        with draining(site, "restart"):
            leaving = await LauncherClient.at(launcher_socket(site)).open()
            site.run("systemctl kill --signal=STOP --kill-who=main vllmd-launcher.service")
            started = asyncio.ensure_future(leaving.start(StartOrder(fresh(), ("/bin/sleep", "1000"))))
            await asyncio.sleep(0.2)
            await leaving.close()
            site.run("systemctl kill --signal=CONT --kill-who=main vllmd-launcher.service")
            with pytest.raises(LauncherFailed):
                await started
        assert await driver.client.list() == []
        site.wait_until(lambda: units(site) == "", timeout=10)


async def test_the_bus_may_be_restarted(site: Machine) -> None:
    """Models start and end afterwards as before, and ends are still told with their status."""
    async with driving(site) as driver:
        before = await driver.start("trap 'exit 9' TERM; echo up; while :; do sleep 0.02; done")
        pid = site.show("vllmd-launcher.service", "MainPID")
        for _ in range(3):
            site.run("systemctl restart dbus.service")
            started = await driver.start("exec sleep 1000")
            await driver.client.kill(started.instance)
            assert (await driver.exit()).instance == started.instance
        await driver.client.signal(before.instance, signal.SIGTERM)
        assert (await driver.exit()).status == 9
        assert units(site) == ""
        assert site.show("vllmd-launcher.service", "MainPID") == pid


async def test_the_bus_may_be_restarted_while_starts_are_on_their_way(site: Machine) -> None:
    """The signal that tells of a job's end is lost: the launcher looks for itself."""
    async with driving(site) as driver:
        for command in ("systemctl restart dbus.service", "systemctl daemon-reexec") * 3:
            starts = [asyncio.ensure_future(driver.start("exec sleep 1000")) for _ in range(8)]
            await asyncio.to_thread(site.run, command)
            for started in await asyncio.gather(*starts):
                await driver.client.kill(started.instance)
                await driver.exit()
        assert units(site) == ""


@pytest.mark.parametrize("command", ["systemctl restart vllmd", "systemctl kill --signal=KILL vllmd"])
async def test_engines_outlive_the_daemon(site: Machine, command: str) -> None:
    """A package upgrade or a crash of the daemon reloads no model."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000", metadata={"model": "m"})
        before = site.show("vllmd.service", "MainPID")
        site.run(command)
        await until(lambda: site.show("vllmd.service", "MainPID") not in ("0", before))
        assert site.cgroup_pids(engine.unit) == [engine.pid]
        assert [(found.pid, found.metadata) for found in await driver.client.list()] == [(engine.pid, {"model": "m"})]


async def test_engines_end_when_the_daemon_has_failed_for_good(site: Machine) -> None:
    """Nothing runs on that nobody manages: OnFailure= is reached when Restart= has given up, not before."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000")
        site.run("systemctl reset-failed vllmd.service")
        for _ in range(5):  # StartLimitBurst=
            site.run("systemctl kill --signal=KILL vllmd; sleep 0.05")
            site.wait_until("systemctl is-active vllmd")
            assert site.cgroup_pids(engine.unit) == [engine.pid]
        site.run("systemctl kill --signal=KILL vllmd")
        assert (await driver.exit()).empty
        assert site.show("vllmd.service", "ActiveState") == "failed"
        site.run("systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket")


# --- the launcher's life ---


async def test_a_killed_launcher_loses_nothing(site: Machine) -> None:
    """The next one finds the engines with their metadata, and still hears of their end."""
    async with driving(site) as driver:
        engine = await driver.start("trap 'exit 9' TERM; while :; do sleep 0.02; done", metadata={"model": "m"})
        await driver.client.annotate(engine.instance, {"state": "ready"})
        kill_launcher(site)
        await asyncio.wait_for(driver.lost.wait(), 10)
        (found,) = await driver.client.list()
        assert (found.pid, found.metadata) == (engine.pid, {"model": "m", "state": "ready"})
        await driver.client.signal(engine.instance, signal.SIGTERM)
        report = await driver.exit()
        assert (report.instance, report.empty) == (engine.instance, True)
        assert report.status in (9, None)  # kernels before 6.15 do not tell the status of a stranger's child


async def test_a_launcher_that_hangs_is_replaced(site: Machine) -> None:
    """By systemd's watchdog, for every start and stop waits for it. What runs goes on, as when it is killed."""
    drop_in = "/etc/systemd/system/vllmd-launcher.service.d/20-watchdog.conf"
    assert "\nWatchdogSec=90s\n" in site.out("systemctl cat vllmd-launcher.service")
    site.write(drop_in, "[Service]\nWatchdogSec=2s\n")
    site.run("systemctl daemon-reload; systemctl stop vllmd-launcher.service; systemctl start vllmd-launcher.socket")
    try:
        async with driving(site) as driver:
            engine = await driver.start("sleep 1000")
            with pytest.raises(TimeoutError):  # one that lives is left alone
                await asyncio.wait_for(driver.lost.wait(), 3)
            site.run("systemctl kill --signal=STOP --kill-who=main vllmd-launcher.service")
            await asyncio.wait_for(driver.lost.wait(), 30)
            (found,) = await driver.client.list()
            assert found.pid == engine.pid
            await driver.client.kill(engine.instance)
            assert (await driver.exit()).instance == engine.instance
    finally:
        site.run(f"rm {drop_in}; systemctl daemon-reload; systemctl stop vllmd-launcher.service")
        site.run("systemctl start vllmd-launcher.socket")


async def test_nobody_notices_a_killed_launcher_while_he_asks(site: Machine) -> None:
    """Starts come out once each, however often it dies meanwhile; nothing that was ordered twice runs twice."""
    async with driving(site) as driver:
        orders = [StartOrder(fresh(), ("/bin/sleep", "1000")) for _ in range(24)]
        starts = [asyncio.ensure_future(driver.client.start(order)) for order in orders]
        for pause in (0.0, 0.05, 0.15, 0.3):
            await asyncio.sleep(pause)
            await asyncio.to_thread(kill_launcher, site)
            assert (await driver.client.info()).backend == "systemd"
        started = await asyncio.wait_for(asyncio.gather(*starts), 60)
        listed = {engine.instance: engine.pid for engine in await driver.client.list() if not engine.ending}
        assert {engine.instance: engine.pid for engine in started} == listed
        alive = {int(pid) for pid in site.out("pgrep -u vllmd-engine sleep").split()}
        assert alive == set(listed.values())
        assert driver.exits.empty()
        await driver.end_all()


async def test_a_start_that_comes_too_late_leaves_nothing(site: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives up on it may use its memory for another: so it is gone by then, whatever the launcher was doing."""
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
    async with driving(site) as driver:
        site.run("systemctl kill --signal=STOP --kill-who=main vllmd-launcher.service")
        starting = asyncio.ensure_future(driver.start("exec sleep 1000", timeout=0.5))
        await asyncio.sleep(2)
        assert not starting.done()  # nobody knows what will become of it
        site.run("systemctl kill --signal=CONT --kill-who=main vllmd-launcher.service")
        with pytest.raises(LauncherFailed, match="did not start"):
            await starting
        assert site.run(["pgrep", "-u", "vllmd-engine", "sleep"], check=False).stdout == ""


async def test_ends_while_there_was_no_launcher_are_reported(site: Machine) -> None:
    """What happened in between is found out: the one is gone, of the other only stray children are left."""
    async with driving(site) as driver:
        gone, strays = await driver.start("exec sleep 1000"), await driver.start(f"{ESCAPEE} exec sleep 1000")
        await until(lambda: len(site.cgroup_pids(strays.unit)) == 2)
        site.run(f"kill -9 $(systemctl show -P MainPID vllmd-launcher) {gone.pid} {strays.pid}")
        reports = {report.instance: report for report in (await driver.exit(), await driver.exit())}
        assert reports.keys() == {gone.instance, strays.instance}
        await until(lambda: units(site) == "")
        assert site.run(["pgrep", "-u", "vllmd-engine"], check=False).stdout == ""


async def test_a_reused_pid_is_never_signalled(site: Machine) -> None:
    """The number alone does not identify a process: with another start time it counts as gone."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000")
        bystander = int(site.out("sleep 1000 >/dev/null 2>&1 & echo $!"))
        change = "import os, sys; os.setxattr(sys.argv[1], 'user.vllmd.launcher.pid', sys.argv[2].encode())"
        site.python(change, engine.cgroup, str(bystander))
        kill_launcher(site)
        assert (await driver.exit()).instance == engine.instance
        assert units(site) == ""
        site.run(["kill", str(bystander)])  # it was still there


async def test_an_empty_scope_is_removed(site: Machine) -> None:
    """A scope made around a zombie stays `active` for ever, and nobody else would stop it."""
    unit = unit_of(fresh())
    site.python(ZOMBIE_SCOPE, unit)
    assert "active" in units(site)
    site.run("systemctl stop vllmd-launcher.service")
    async with driving(site) as driver:
        assert all(found.ending for found in await driver.client.list())
        await until(lambda: units(site) == "")


ZOMBIE_SCOPE = """
import os, sys, time
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES
KNOWN_UNIT_SIGNATURES[b"PIDs"] = b"au"
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
with Manager() as manager:
    manager.Manager.StartTransientUnit(sys.argv[1].encode(), b"fail", {b"PIDs": [pid]})
    os.system(f"systemctl is-active --wait {sys.argv[1]} >/dev/null")
"""


async def test_what_engines_left_while_there_was_no_launcher_is_removed(site: Machine) -> None:
    """Run directories with their sockets; a folder with data in it stays, and so does a new one."""
    async with driving(site) as driver:
        folder = f"/run/vllmd-engine/{fresh()}"
        engine = await driver.start("exec sleep 1000", run_dir=folder)
        make = "import os, socket, sys; [os.mkdir(d, 0o750) for d in sys.argv[1:]]; "
        make += "[socket.socket(socket.AF_UNIX).bind(d + '/s') for d in sys.argv[1:]]"
        left, new, full = (f"/run/vllmd-engine/{name}" for name in ("left-1", "new-1", "full-1"))
        site.python(make, left, full)
        site.run(f"touch {full}/data; chown -R vllmd-engine: {left} {full}")
        kill_launcher(site)
        await driver.client.info()
        site.python(make, new)  # after its first look, before its second one
        site.run(f"chown -R vllmd-engine: {new}")
        site.wait_until(f"test ! -e {left}", timeout=25)
        site.run(f"test -e {new} && test -e {full}/data && test -e {folder}")
        await driver.client.kill(engine.instance)
        await driver.exit()
        site.run(f"rm -r {new} {full}")


async def test_an_idle_launcher_exits_and_no_connection_is_lost(site: Machine) -> None:
    """At rest nothing runs; whoever connects in that very moment is served by the next one."""
    idle = "/etc/systemd/system/vllmd-launcher.service.d/20-idle.conf"
    site.write(idle, LAUNCHER.format(more="--idle-exit 0.05"))
    site.run("systemctl daemon-reload; systemctl stop vllmd-launcher.service")
    try:
        pids = set()
        for pause in range(12):
            async with connected(launcher_socket(site)) as driver:
                assert (await driver.client.info()).backend == "systemd"
                pids.add(site.show("vllmd-launcher.service", "MainPID"))
            await asyncio.sleep(pause * 0.01)  # around the moment of its exit
        assert len(pids) > 1
        site.wait_until("! systemctl is-active vllmd-launcher.service")
        assert site.show("vllmd-launcher.service", "Result") == "success"
    finally:
        site.run(f"rm {idle}; systemctl daemon-reload")


# --- who may talk, and how ---


async def test_only_the_daemon_may_connect(site: Machine) -> None:
    """The socket's mode keeps others out; were it opened up, the launcher still looks at the peer's user."""
    connect = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        'try: s.connect(\'/run/vllmd/launcher.sock\'); s.send(b\'{"id":1,"type":"Info","body":{}}\')\n'
        "except (PermissionError, BrokenPipeError) as error: sys.exit(repr(error))\n"
        "print(s.recv(1000).decode() or 'closed')"
    )
    attempt = ["/usr/bin/python3", "-c", connect]
    assert '"backend":"systemd"' in site.run(attempt, user="vllmd").stdout
    assert "PermissionError" in site.run(attempt, user="vllmd-engine", check=False).stderr
    site.run("chmod 666 /run/vllmd/launcher.sock")
    try:
        refused = site.run(attempt, user="vllmd-engine", check=False)
        assert refused.stdout == "closed\n" or "Error" in refused.stderr
    finally:
        site.run("chmod 600 /run/vllmd/launcher.sock")


async def test_root_is_not_the_daemon(site: Machine) -> None:
    """Nor is a program of root's that was talked into connecting: only whom the command line names may."""
    tests_own = "/etc/systemd/system/vllmd-launcher.service.d/10-tests.conf"
    given = site.read(tests_own)
    site.run(f"rm {tests_own}; systemctl daemon-reload; systemctl stop vllmd-launcher.service")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(str(launcher_socket(site)))
            raw.settimeout(20)
            assert raw.recv(1000) == b""
        assert "user id 0" in site.journal("vllmd-launcher.service")
    finally:
        site.write(tests_own, given)
        site.run("systemctl daemon-reload; systemctl stop vllmd-launcher.service")


async def test_malformed_packets_harm_nobody(site: Machine) -> None:
    """A broken client gets an error for each; engines and other clients do not notice."""
    async with driving(site) as driver:
        engine = await driver.start("exec sleep 1000")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(str(launcher_socket(site)))
            for packet in (
                b"{",
                b"[]",
                b"\xff" * 100,
                b'{"id": 5, "type": "Start", "body": {"order": {}}}',
                b"x" * 150_000,
            ):
                raw.send(packet)
                assert b'"Failed"' in raw.recv(10_000)
        await driver.client.kill(engine.instance)
        assert (await driver.exit()).instance == engine.instance


async def test_a_user_runs_it_without_root(site: Machine) -> None:
    """`systemctl --user`: the same scopes in the user's own manager, as the same user."""
    if "ann" not in site.read("/etc/passwd"):
        site.run("systemctl restart systemd-logind.service")  # tests above restart the bus, which it may not survive
        site.add_user("ann")
    uid = site.uid("ann")
    admitted = "[Service]\nExecStart=\nExecStart=/usr/bin/vllmd-launcher --user-bus --client-user root\n"  # the tests
    site.write("/etc/systemd/user/vllmd-launcher.service.d/10-tests.conf", admitted)
    site.run("systemctl --user daemon-reload; systemctl --user start vllmd-launcher.socket", user="ann")
    address = Path(f"/proc/{site.leader}/root/run/user/{uid}/vllmd/launcher.sock")
    async with connected(address) as driver:
        assert (await driver.client.info()).backend == "systemd-user"
        engine = await driver.start("id -un; exec sleep 1000", run_dir=f"/run/user/{uid}/vllmd/engine/x")
        await driver.client.follow(engine.instance)
        await driver.line("ann")
        assert f"user@{uid}.service" in engine.cgroup
        await driver.client.kill(engine.instance)
        report = await driver.exit()
        assert (report.signal, report.empty, await driver.client.tail(engine.instance)) == (
            signal.SIGKILL,
            True,
            ["ann"],
        )
