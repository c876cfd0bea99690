"""A standby becomes an engine: what is handed over, and that whatever goes wrong costs one ordinary start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.driver import Driver, fresh, private, until
from tests.launcher.test_sessions import alive, children, descendants, launcher_of, launchers
from vllmd.engines.standby import SCRIPT
from vllmd.launcher import handover
from vllmd.launcher.client import ExitReport, LauncherFailed, Running, StartOrder
from vllmd.launcher.protocol import ProtocolError

BOTH = pytest.mark.parametrize("options", [(), ("--no-cgroups",)], ids=["cgroups", "sessions"])
# Tells where it is, as what, and with what; then it serves. SLOW is what it imports.
PROGRAM = """#!{python}
import json, os, sys, time
import slow
if __name__ == "__main__":
    fds = sorted(os.path.realpath(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2)
    said = dict(pid=os.getpid(), born=slow.PID, argv=sys.argv, cwd=os.getcwd(), env=dict(os.environ),
                cpus=sorted(os.sched_getaffinity(0)), main=sys.modules["__main__"].__file__, path=sys.path[0],
                fds=[fd for fd in fds if "/proc/" not in fd])
    print(json.dumps(said), flush=True)
    print("serving", file=sys.stderr, flush=True)
    if "child" in sys.argv:
        if os.fork() == 0:
            time.sleep(987)
    time.sleep(0 if "short" in sys.argv else 987)
    sys.exit(7)
"""
SLOW = """
import os, time
PID = os.getpid()
os.environ["MADE_BY_IMPORT"] = "yes"
"""


@dataclass
class Place:
    """A program whose modules can be imported ahead of time, and the order of a standby for it."""

    folder: Path
    driver: Driver

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "run").mkdir()
        self.program = self.folder / "bin/engine"
        self.program.write_text(PROGRAM.format(python=sys.executable))
        self.program.chmod(0o755)
        (self.folder / "bin/slow.py").write_text(SLOW)

    def spec(self, **more: Any) -> dict[str, Any]:
        return {"program": str(self.program), "imports": ["slow", "absent"], "late": ["LATE", "VLLMD_INSTANCE"],
                "ours": ["OURS"], "set": {"METHOD": "fork"}, **more}  # fmt: skip

    async def standby(self, *, script: str = "", wait: bool = True, **more: Any) -> Running:
        """One that waits (or, with a ``script`` of its own, does what that says)."""
        run = ["-c", script] if script else [str(SCRIPT), json.dumps(self.spec(**more))]
        env = {"EARLY": "1", "OURS": "kept"}
        running = await self.driver.client.start(StartOrder(fresh(), (sys.executable, *run), env, waits=True))
        if wait:
            await until(lambda: running.instance in self.driver.waiting)
        return running

    async def start(self, standby: Running | str, *argv: str, **more: Any) -> Running:
        """An engine of the program, made of this standby if that works."""
        instance, name = fresh(), standby if isinstance(standby, str) else standby.instance
        env = more.pop("env", {"EARLY": "1", "LATE": instance})
        run = self.folder / "run" / instance
        self.ordered = instance
        order = StartOrder(instance, (str(self.program), *argv), env, run_dir=str(run), standby=name, **more)
        return await self.driver.client.start(order)

    async def told(self, engine: Running) -> dict[str, Any]:
        """What the engine says of itself, once it serves."""
        async with asyncio.timeout(20):
            while "serving" not in (lines := await self.driver.client.tail(engine.instance)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        found: dict[str, Any] = json.loads(lines[-2])
        return found

    async def end(self, engine: Running) -> None:
        await self.driver.client.kill(engine.instance)
        while (await self.driver.exit()).instance != engine.instance:
            pass


@asynccontextmanager
async def place(folder: Path, options: tuple[str, ...] = ()) -> AsyncIterator[Place]:
    """A place with a launcher of its own, of which nobody is left."""
    async with private(*options) as driver:
        await driver.client.info()  # it has begun
        launcher = launcher_of(driver.client)
        yield Place(folder, driver)
        left = descendants(launcher)
    assert [pid for pid in left if alive(pid)] == []
    assert list((folder / "run").iterdir()) == []


@BOTH
async def test_a_standby_becomes_the_engine_that_was_ordered(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The same process, as if it had just been started: arguments, environment, directory, output, and no more."""
    async with place(tmp_path, options) as here:
        standby, cpu = await here.standby(), max(os.sched_getaffinity(0))
        engine = await here.start(standby, "serve", "model", "child", cpus=(cpu,), node=0)
        assert here.driver.waiting[standby.instance] > 1 << 20
        assert (engine.pid, engine.standby) == (standby.pid, standby.instance)
        said = await here.told(engine)
        assert said["pid"] == said["born"] == standby.pid
        assert said["argv"] == [str(here.program), "serve", "model", "child"]
        assert (said["main"], said["path"]) == (str(here.program), str(here.program.parent))
        assert said["cwd"] == str(tmp_path / "run" / engine.instance)
        env = {name: said["env"].get(name) for name in ("EARLY", "LATE", "OURS", "METHOD", "MADE_BY_IMPORT")}
        assert env == {"EARLY": "1", "LATE": engine.instance, "OURS": "kept", "METHOD": "fork", "MADE_BY_IMPORT": "yes"}
        assert said["env"]["VLLMD_INSTANCE"] == engine.instance
        assert not [name for name in said["env"] if name.startswith("VLLMD_STANDBY")]
        assert (said["fds"], said["cpus"]) == ([], [cpu])
        assert [one.instance for one in await here.driver.client.list()] == [engine.instance]
        (child,) = await until(lambda: children(engine.pid))
        await here.driver.client.signal(engine.instance, signal.SIGTERM)
        report = await here.driver.exit()
        assert (report.instance, report.signal, report.empty) == (engine.instance, signal.SIGTERM, True)
        assert not alive(child)


@BOTH
async def test_its_end_is_told_as_of_every_engine(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Status and last lines; and of the standby that it was nothing is told."""
    async with place(tmp_path, options) as here:
        engine = await here.start(await here.standby(), "short")
        report = await here.driver.exit()
        assert (report.instance, report.status, report.log_tail[-1]) == (engine.instance, 7, "serving")
        assert here.driver.exits.empty()


ODD = {
    "dead": "import os, socket; os.close(int(os.environ['VLLMD_STANDBY_LINK']))",
    "silent": "import os, socket, time; s = socket.socket(fileno=int(os.environ['VLLMD_STANDBY_LINK'])); "
    "s.send(b'ready'); time.sleep(987)",
    "dies of it": "import os, socket; s = socket.socket(fileno=int(os.environ['VLLMD_STANDBY_LINK'])); "
    "s.send(b'ready'); s.recv(9)",
    "talks": "import os, socket, time; s = socket.socket(fileno=int(os.environ['VLLMD_STANDBY_LINK'])); "
    "s.send(b'ready'); s.recv(9); s.send(b'\\x1b[31m' * 900); time.sleep(987)",
    "takes too early": "import os, socket, time; s = socket.socket(fileno=int(os.environ['VLLMD_STANDBY_LINK'])); "
    "s.send(b'ready'); s.send(b'taken'); time.sleep(987)",
}


@pytest.mark.parametrize("how", ODD)
@BOTH
async def test_one_that_misbehaves_costs_an_ordinary_start(tmp_path: Path, how: str, options: tuple[str, ...]) -> None:
    """The order is carried out without it, under the same name, and nothing of it is left."""
    async with place(tmp_path, options) as here:
        standby = await here.standby(script=ODD[how], wait=how != "dead")
        engine = await here.start(standby)
        assert engine.standby == ""
        assert engine.pid != standby.pid
        assert (await here.told(engine))["born"] == engine.pid
        await until(lambda: not alive(standby.pid))
        await here.end(engine)


@BOTH
async def test_an_environment_that_was_read_already_cannot_be_handed_over(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """What an import has read is what it was; only variables that nothing reads so early may differ."""
    for env in ({"EARLY": "2"}, {}, {"EARLY": "1", "NEW": "1"}):
        (tmp_path / str(len(env))).mkdir()
        folder = tmp_path / str(len(env)) / "".join(env.values()) if env else tmp_path / "none"
        folder.mkdir()
        async with place(folder, options) as here:
            engine = await here.start(await here.standby(), env=env)
            assert engine.standby == ""
            assert {name: (await here.told(engine))["env"].get(name) for name in env} == env
            await here.end(engine)


@pytest.mark.parametrize("what", ["torch", "nothing"])
async def test_one_whose_imports_have_opened_a_device_never_waits(tmp_path: Path, what: str) -> None:
    """No fork of it could use the device, and it sees the one that was visible then."""
    async with place(tmp_path) as here:
        (tmp_path / "bin/torch.py").write_text("class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
        standby = await here.standby(imports=[what], wait=what == "nothing")
        if what == "torch":
            report = await here.driver.exit()
            assert (report.instance, standby.instance in here.driver.waiting) == (standby.instance, False)


async def test_two_starts_at_once_get_one_each(tmp_path: Path) -> None:
    """The second starts as ever: a standby never serves two models."""
    async with place(tmp_path) as here:
        standby = await here.standby()
        engines = await asyncio.gather(here.start(standby, "one"), here.start(standby, "two"))
        assert [engine.standby for engine in engines] == [standby.instance, ""]
        for engine, word in zip(engines, ("one", "two"), strict=True):
            assert (await here.told(engine))["argv"][1:] == [word]
            await here.end(engine)


async def test_one_that_still_imports_or_is_unknown_is_not_waited_for(tmp_path: Path) -> None:
    """An ordinary start begins at once; what was given away for it, and could not be used, ends."""
    async with place(tmp_path) as here:
        (tmp_path / "bin/endless.py").write_text("import time; time.sleep(987)")
        warming = await here.standby(imports=["endless"], wait=False)
        for name in (warming.instance, "no-such"):
            engine = await here.start(name)
            assert engine.standby == ""
            await here.end(engine)
        assert not alive(warming.pid)


@BOTH
@pytest.mark.parametrize("when", ["ready", "ordered"])
async def test_one_that_is_killed(tmp_path: Path, when: str, options: tuple[str, ...]) -> None:
    """Before, or while it is being made an engine of: the engine runs in either case."""
    async with place(tmp_path, options) as here:
        standby = await here.standby()
        if when == "ready":
            os.kill(standby.pid, signal.SIGKILL)
            engine = await here.start(standby)
        else:
            os.kill(standby.pid, signal.SIGSTOP)
            starting = asyncio.ensure_future(here.start(standby))
            await asyncio.sleep(0.05)
            os.kill(standby.pid, signal.SIGKILL)
            engine = await starting
        assert engine.pid != standby.pid
        await here.told(engine)
        await here.end(engine)


@BOTH
async def test_it_ends_with_whoever_ordered_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Also when the launcher is killed: nobody would know of it any more."""
    async with private(*options) as driver:
        here = Place(tmp_path, driver)
        standby = await here.standby()
        os.kill(launcher_of(driver.client), signal.SIGKILL)
        await until(lambda: not alive(standby.pid))
    (tmp_path / "two").mkdir()
    async with private(*options) as driver:
        here = Place(tmp_path / "two", driver)
        standby = await here.standby()
    assert not alive(standby.pid)


async def end_early(here: Place) -> None:
    """End the engine that is being made, once its order has reached the launcher."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await here.driver.client.signal(here.ordered, signal.SIGTERM)
            except LauncherFailed:  # it knows no such engine yet
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["killed", "told to end"])
async def test_an_engine_ends_while_it_is_being_made(tmp_path: Path, how: str) -> None:
    """Then nothing begins anew."""
    async with place(tmp_path) as here:
        standby = await here.standby()
        os.kill(standby.pid, signal.SIGSTOP)
        starting = asyncio.ensure_future(here.start(standby))
        await asyncio.sleep(0.05)
        if how == "killed":
            starting.cancel()
        else:
            await end_early(here)
            os.kill(standby.pid, signal.SIGCONT)
            with pytest.raises(LauncherFailed):
                await starting
        await until(lambda: not alive(standby.pid))
        async with asyncio.timeout(20):
            while await here.driver.client.list():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@BOTH
async def test_a_daemon_dies_while_one_is_being_made(
    tmp_path: Path, options: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its launcher, which has only just read the order, ends all of it, and itself."""
    async with place(tmp_path, options) as here:
        os.kill((await here.standby()).pid, signal.SIGSTOP)
        (standby,) = await here.driver.client.list()
        starting = asyncio.ensure_future(here.start(standby))
        await asyncio.sleep(0)  # it is sent
    with pytest.raises(LauncherFailed):
        await starting
    assert "a callback of the launcher failed" not in capfd.readouterr().err


async def test_hand_overs_in_a_row(tmp_path: Path) -> None:
    """Twenty, or as many as HAND_OVERS says (`make standbys`), most of them with something in their way."""
    (tmp_path / "lost").mkdir()
    counted: Counter[str] = Counter()
    async with place(tmp_path) as here:
        for number in range(int(os.environ.get("HAND_OVERS", "20"))):
            what = MISHAPS[number % len(MISHAPS)]
            if what == "the daemon dies":
                await a_daemon_dies_in_mid_hand_over(tmp_path / "lost", number % 11 / 1000)
                counted[what] += 1
                continue
            standby = await here.standby()
            orders = [here.start(standby, *MISHAP_ARGV.get(what, ()), **MISHAP_ORDER.get(what, {}))]
            orders += [here.start(standby)] if what == "two at once" else []
            starting = asyncio.gather(*orders)
            if what == "killed":
                await asyncio.sleep(number % 7 / 1000)
                os.kill(standby.pid, signal.SIGKILL)
            engines = await starting
            if what != "killed":
                made = [engine.pid == standby.pid for engine in engines]
                assert made == [what != "another environment", *([False] if what == "two at once" else [])]
            for engine in engines:
                if what == "wrong arguments":
                    assert (await exit_of(here.driver, engine)).status == 7
                    continue
                with contextlib.suppress(LauncherFailed):  # the blow came just after the hand-over, and it has ended
                    await here.driver.client.kill(engine.instance)
                await exit_of(here.driver, engine)
            assert not alive(standby.pid)
            counted[what] += 1
        assert await here.driver.client.list() == []
    print(dict(counted))


MISHAPS = ("none", "two at once", "killed", "another environment", "wrong arguments", "the daemon dies")
MISHAP_ARGV = {"wrong arguments": ("short",)}  # with which the program ends at once, with status 7
MISHAP_ORDER = {"another environment": {"env": {"EARLY": "2"}}}  # which its imports have read already


async def exit_of(driver: Driver, engine: Running) -> ExitReport:
    """The report of its end; those of others are passed over."""
    while (report := await driver.exit()).instance != engine.instance:
        pass
    return report


async def a_daemon_dies_in_mid_hand_over(folder: Path, after: float) -> None:
    """A launcher's client is gone so many seconds after its order: nobody is left, on neither side of the hand-over."""
    shutil.rmtree(folder)
    os.mkdir(folder)
    others = launchers()
    async with private() as driver:
        await driver.client.info()
        (launcher,), here = launchers() - others, Place(folder, driver)
        standby = await here.standby()
        starting = asyncio.ensure_future(here.start(standby))
        await asyncio.sleep(after)
        known = {standby.pid, *descendants(launcher)}
    with contextlib.suppress(LauncherFailed):
        await starting
    await until(lambda: not any(alive(pid) for pid in known))
    await until(lambda: not list((folder / "run").iterdir()))


def test_an_order_that_makes_no_sense() -> None:
    """A standby is made of nothing."""
    for more in ({"waits": True, "standby": "b"}, {"standby": "a"}, {"standby": "No Such"}):
        with pytest.raises(ProtocolError):
            StartOrder("a", ("x",), **more)  # type: ignore[arg-type]


def test_an_order_that_is_too_long_is_not_sent() -> None:
    """It would be cut, or wait for a reader; the ordinary start has no such limit."""
    link = handover.Link()
    with pytest.raises(OSError, match="at most"):
        link.send(StartOrder("a", ("x",)), {"A": "x" * handover.MAX_ORDER_BYTES}, 1)
    link.close()
