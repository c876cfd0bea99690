"""Engines without systemd: real processes, with and without control groups."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launcher.driver import fresh, private, until
from vllmd.launcher import sessions
from vllmd.launcher.client import ExitReport, LauncherClient, LauncherFailed
from vllmd.launcher.loop import Loop
from vllmd.launcher.process import Process
from vllmd.launcher.sessions import ProcessTree

BOTH = pytest.mark.parametrize("options", [(), ("--no-cgroups",)], ids=["cgroups", "sessions"])
# Double-forked and in a session of its own.
ESCAPEE = "setsid sh -c 'sleep 987 & echo escaped; exit' & wait; "


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Those that a process has now."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may just be ending
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def launcher_of(client: LauncherClient) -> int:
    """The private launcher's process."""
    (pid,) = launchers()
    return pid


def launchers() -> set[int]:
    """All private launchers of this process."""
    return {pid for pid in children(os.getpid()) if b"vllmd.launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@BOTH
async def test_status_and_last_lines_are_reported(options: tuple[str, ...]) -> None:
    """The same reports as with systemd."""
    async with private(*options) as driver:
        engine = await driver.start("echo one; echo two >&2; exit 7")
        assert await driver.exit() == ExitReport(engine.instance, 7, None, True, False, ("one", "two"))
        assert await driver.client.tail(engine.instance, 1) == ["two"]


async def test_an_engine_cannot_command_a_terminal() -> None:
    """Its lines are shown to people and kept in records, so they come without escape sequences."""
    async with private() as driver:
        await driver.start(r"printf '\033]0;owned\007\033[31mred\033[0m \033c\n 10%%\r 99%%\r\n'")
        assert (await driver.exit()).log_tail == (r"red \x1bc", " 99%")


@BOTH
async def test_a_session_of_its_own(options: tuple[str, ...]) -> None:
    """Ctrl-C in the terminal of `vllmd serve` is the daemon's to handle, not the engines'."""
    async with private(*options) as driver:
        engine = await driver.start("exec sleep 987")
        assert os.getsid(engine.pid) == engine.pid
        await driver.client.signal(engine.instance, signal.SIGTERM)
        assert (await driver.exit()).signal == signal.SIGTERM


@BOTH
async def test_a_log_is_followed(options: tuple[str, ...]) -> None:
    """Its beginning, too; and no more after unfollow."""
    async with private(*options) as driver:
        engine = await driver.start("echo first; read x; echo never", env={"X": "1"})
        assert (await driver.exit()).log_tail == ("first", "never")  # stdin is empty
        engine = await driver.start("echo first; sleep 0.1; echo second; exec sleep 987")
        await driver.client.follow(engine.instance)
        await driver.line("first")
        await driver.line("second")


@BOTH
async def test_grandchildren_that_left_the_session_are_killed(options: tuple[str, ...]) -> None:
    """Workers fork as they like; when the main process is gone, so are they."""
    async with private(*options) as driver:
        engine = await driver.start(
            f"{ESCAPEE if options else ESCAPEE.replace('setsid', 'setsid env -i')} sleep 987 & wait"
        )
        await driver.client.follow(engine.instance)
        await driver.line("escaped")
        launcher = launcher_of(driver.client)
        everybody = await until(lambda: descendants(launcher) if len(descendants(launcher)) >= 3 else None)
        await driver.client.signal(engine.instance, signal.SIGKILL)
        assert (await driver.exit()).empty
        assert [pid for pid in everybody if alive(pid)] == []


def descendants(pid: int) -> list[int]:
    """Those, theirs, and so on."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


@BOTH
async def test_kill_reaches_everybody(options: tuple[str, ...]) -> None:
    """An engine that ignores SIGTERM does not ignore this."""
    async with private(*options) as driver:
        engine = await driver.start("trap '' TERM; sleep 987 & echo up; while :; do sleep 0.1; done")
        await driver.client.follow(engine.instance)
        await driver.line("up")
        await driver.client.signal(engine.instance, signal.SIGTERM)
        await driver.client.kill(engine.instance)
        report = await driver.exit()
        assert (report.signal, report.empty) == (signal.SIGKILL, True)


@BOTH
async def test_everything_ends_with_the_connection(options: tuple[str, ...]) -> None:
    """The daemon's death, however it comes, closes the connection: nothing is left behind."""
    async with private(*options) as driver:
        engine = await driver.start("sleep 987 & echo up; wait")
        await driver.client.follow(engine.instance)
        await driver.line("up")
        launcher = launcher_of(driver.client)
        everybody = [launcher, *descendants(launcher)]
        await driver.client.close()
        assert [pid for pid in everybody if alive(pid)] == []


@BOTH
async def test_a_killed_launcher_is_replaced_and_its_engines_are_gone(options: tuple[str, ...]) -> None:
    """Without systemd nobody else would look after them; the daemon is told, and goes on."""
    async with private(*options) as driver:
        engine = await driver.start("trap '' TERM; sleep 987 & echo up; wait; wait")
        await driver.client.follow(engine.instance)
        await driver.line("up")
        launcher = launcher_of(driver.client)
        everybody = descendants(launcher)
        os.kill(launcher, signal.SIGKILL)
        assert await driver.exit() == ExitReport(engine.instance)
        assert [pid for pid in everybody if alive(pid)] == []
        assert (await driver.client.info()).backend == "sessions"


@BOTH
async def test_a_stop_of_the_daemon_ends_a_start_in_progress(options: tuple[str, ...]) -> None:
    """A start whose caller has gone must not leave an engine that nobody knows."""
    async with private(*options) as driver:
        name = fresh()
        start = asyncio.create_task(driver.start("exec sleep 987", instance=name))
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        await driver.client.info()  # by now the launcher has begun the start
        launcher = launcher_of(driver.client)
        await until(lambda: not children(launcher))
        await driver.client.info()
        assert await driver.client.list() == []


def test_a_family_remembers_whom_it_has_seen() -> None:
    """vLLM rewrites its environment, and orphans lose their ancestry: number and start time remain."""
    escape = ["setsid", "env", "-i", "sh", "-c", "sleep 987 & echo; wait"]
    with subprocess.Popen(["sh", "-c", '"$@" & wait', "sh", *escape], stdout=subprocess.PIPE) as main:
        assert main.stdout
        main.stdout.readline()
        family = ProcessTree("x", "token", Process(main.pid), Loop())
        members = family.members()
        assert len(members) == 3  # the main process, the shell in its own session, its sleep
        main.kill()
        main.wait()
        assert family.members() == members - {main.pid}
        family.kill()
        assert family.empty()


async def test_the_run_directory_goes_with_the_engine(tmp_path: Path) -> None:
    """Sockets of a killed engine are litter; files may be somebody's data."""
    for name in ("litter", "data"):
        folder = tmp_path / name
        bind = f"import socket; socket.socket(socket.AF_UNIX).bind('s'); open('f', 'w') if {name == 'data'} else 0"
        async with private() as driver:
            await driver.start(sys.executable, "-c", bind, run_dir=str(folder))
            assert (await driver.exit()).status == 0
            await until(lambda folder=folder: not (folder / "s").exists())
    await until(lambda: not (tmp_path / "litter").exists())
    assert (tmp_path / "data/f").exists()


@BOTH
async def test_the_launcher_ends_after_the_run_directory_is_gone(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A child of the launcher removes it, for a while here, and is not killed as a descendant that was left over."""
    folder = tmp_path / "engine"
    bind = "import socket, time; [socket.socket(socket.AF_UNIX).bind(f's{n}') for n in range(9000)]; time.sleep(987)"
    async with private(*options) as driver:
        await driver.start(sys.executable, "-c", bind, run_dir=str(folder))
        await until((folder / "s8999").exists)
    assert not folder.exists()


async def test_what_cannot_work_is_said() -> None:
    """A missing command is permanent; a folder that cannot be made is named."""
    async with private() as driver:
        with pytest.raises(LauncherFailed, match="there is no command 'nosuch': looked in /bin") as missing:
            await driver.start("nosuch", "x", env={"PATH": "/bin"})
        assert missing.value.permanent
        with pytest.raises(LauncherFailed, match=r"Not a directory: /etc/passwd/x"):
            await driver.start("true", run_dir="/etc/passwd/x")
        with pytest.raises(LauncherFailed, match="no engine 'nobody' is running here"):
            await driver.client.kill("nobody")
        with pytest.raises(LauncherFailed, match="user 'root' is not allowed"):
            await driver.start("true", user="root")


async def test_the_environment_is_ones_own_less_the_managers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, a virtual environment's PATH matters; the sockets that the daemon was passed do not."""
    monkeypatch.setenv("MY_OWN", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("NOTIFY_SOCKET", "/x")
    async with private() as driver:
        engine = await driver.start("/usr/bin/env", "-u", "none")
        lines = (await driver.exit()).log_tail
        assert {"MY_OWN=1", f"VLLMD_INSTANCE={engine.instance}"} <= set(lines)
        assert not [line for line in lines if line.startswith(("LISTEN_", "NOTIFY_"))]


async def test_a_chatty_engine_does_not_stop_the_launcher() -> None:
    """Its lines come in pieces that fit; its last ones are the tail; others are served meanwhile."""
    async with private() as driver:
        chatty = await driver.start("yes $(head -c 300 /dev/zero | tr '\\0' x) | head -n 200000; echo last")
        await driver.client.follow(chatty.instance)
        quiet = await driver.start("exit 3")
        reports = {report.instance: report for report in (await driver.exit(), await driver.exit())}
        assert reports[quiet.instance].status == 3
        assert reports[chatty.instance].log_tail[-1] == "last"


async def test_nobody_listens() -> None:
    """The daemon says where it looked for the launcher."""
    with pytest.raises(LauncherFailed, match=r"No such file or directory: /nonexistent/launcher\.sock"):
        await LauncherClient.at("/nonexistent/launcher.sock").open()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--user NAME must say whom engines run as" if os.geteuid() == 0 else "no socket named `launcher`"),
        (("--user", "nobody-of-that-name"), "there is no user 'nobody-of-that-name'"),
        (("--user", "root"), "'root' is root"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], complaint: str) -> None:
    """The launcher starts nobody's engines as root."""
    done = subprocess.run([sys.executable, "-m", "vllmd.launcher", *arguments], capture_output=True, text=True)
    assert (done.returncode, complaint in done.stderr) == (1, True)


def test_it_ends_when_the_other_end_is_already_closed() -> None:
    """The daemon may die between fork and the first message."""
    ours, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with child_end:
        argv = [sys.executable, "-m", "vllmd.launcher", "--fd", str(child_end.fileno())]
        assert subprocess.run(argv, pass_fds=[child_end.fileno()], timeout=20).returncode == 0


def test_a_look_that_cannot_be_is_repeated_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of a descriptor nothing is known of the processes, neither that they live nor that they have ended."""

    def full(*_: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    later: list[tuple[float, Callable[[], None]]] = []
    loop: Any = SimpleNamespace(later=lambda *asked: later.append(asked))
    main, changed = Process(os.getpid()), list[bool]()
    tree = ProcessTree("a", "token", main, loop)
    tree.watch(lambda: changed.append(True))
    with monkeypatch.context() as out:
        out.setattr(sessions, "stat_of", full)
        later[0][1]()
    monkeypatch.setattr(tree, "members", set)
    later[1][1]()
    assert [seconds for seconds, _ in later] == [sessions.POLL, sessions.POLL, sessions.REFRESH]
    assert not changed
    main.close()
