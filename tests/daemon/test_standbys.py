"""When standbys are begun, given away and given up; and that one which is at fault costs an ordinary start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.rig import FakeLauncher, Rig, soon, tell
from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Placement
from vllmd.daemon import standbys
from vllmd.daemon.standbys import Standbys, available
from vllmd.engines.standby import Standby
from vllmd.launcher.client import ExitReport, LauncherFailed, Running, StartOrder
from vllmd.sizes import GiB

ONE = Standby("/e/1/bin/python", "/e/1/bin/vllm", ("vllm",), frozenset({"LATE"}), (("A", "1"),), (("OURS", "1"),))
TWO = replace(ONE, program="/e/2/bin/vllm")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a machine to be calm here."""
    monkeypatch.setattr(standbys, "CALM", 0.0)
    monkeypatch.setattr(standbys, "LOOK", 0.0)
    monkeypatch.setattr(standbys, "SEEK", 0.0)


class Launcher:
    """Starts and kills what it is told to; ``refusal`` says why it does not."""

    def __init__(self) -> None:
        self.orders: list[StartOrder] = []
        self.killed: list[str] = []
        self.refusal = ""

    async def start(self, order: StartOrder) -> Running:
        self.orders.append(order)
        if self.refusal:
            raise LauncherFailed(self.refusal)
        return Running(order.instance, 1, "unit")

    async def kill(self, instance: str) -> None:
        self.killed.append(instance)


class Place:
    """A machine with ``spare`` bytes, and models whose engines' standbys are in ``kinds``."""

    def __init__(self, count: int | None = 1, machine: int = 64 * GiB, **kinds: Standby | None) -> None:
        self.launcher, self.spare, self.held = Launcher(), 32 * GiB, list[int]()
        self.kinds = kinds or {"a": ONE, "b": ONE}
        self.keeper = Standbys(
            self.launcher,  # type: ignore[arg-type]
            lambda model: self.kinds[model.name],
            self.held.append,
            lambda: self.spare,
            lambda: machine,
        )
        self.keeper.configure(count, [ModelConfig(name) for name in self.kinds])

    async def look(self, busy: bool = False, running: set[str] | None = None, over: int = 0) -> None:
        self.keeper.review(busy=busy, running={"a"} if running is None else running, over=over)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def waiting(self) -> str:
        """The instance of one that waits."""
        self.keeper.claim(ONE)
        await self.look()
        instance = self.launcher.orders[-1].instance
        self.keeper.mark_ready(instance, GiB // 2)
        return instance


def story(told: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test in a loop of its own."""

    def test() -> None:
        asyncio.run(asyncio.wait_for(told(), 20))

    test.__doc__, test.__name__ = told.__doc__, told.__name__
    return test


@story
async def test_one_is_begun_for_what_was_started_last() -> None:
    """Nothing is known before the first start, and nothing is begun while the machine is busy."""
    here = Place()
    await here.look()
    assert here.launcher.orders == []
    assert here.keeper.claim(ONE) == ""
    await here.look(busy=True)
    assert here.launcher.orders == []
    await here.look()
    (order,) = here.launcher.orders
    assert (order.waits, order.argv[0], order.env) == (True, ONE.python, {"A": "1", "OURS": "1"})
    assert json.loads(order.argv[2])["late"] == ["LATE"]
    await here.look()
    assert len(here.launcher.orders) == 1


@story
async def test_one_is_begun_for_what_an_earlier_daemon_started_last() -> None:
    """Its engines go on; models without a standby of any kind change nothing."""
    here = Place(1, a=ONE, b=TWO, c=None, d=TWO)
    here.keeper.remember([ModelConfig(name) for name in "abc"])
    assert here.keeper.in_use
    await here.look(running={"b"})
    (order,) = here.launcher.orders
    assert order.argv[0] == TWO.python


@story
async def test_one_is_begun_as_soon_as_the_configuration_wants_one() -> None:
    """For what was started while it wanted none, and cost nothing."""
    here = Place(0)
    assert here.keeper.claim(ONE) == ""
    await here.look()
    assert (here.launcher.orders, here.keeper.in_use) == ([], False)
    here.keeper.configure(1, [ModelConfig("b")])
    await here.look()
    assert [order.argv[0] for order in here.launcher.orders] == [ONE.python]
    here.keeper.configure(0, [ModelConfig("b")])
    await here.look()
    assert here.launcher.killed == [here.launcher.orders[0].instance]
    assert not here.keeper.in_use


@story
async def test_it_is_given_away_once_and_to_whom_it_fits() -> None:
    """Not while it still imports, nor to another version, nor twice; then another one is begun."""
    here = Place()
    here.keeper.claim(ONE)
    await here.look()
    assert here.keeper.claim(ONE) == ""
    instance = here.launcher.orders[0].instance
    here.keeper.mark_ready(instance, GiB // 2)
    assert here.keeper.claim(TWO) == here.keeper.claim(None) == ""
    assert here.keeper.claim(ONE) == instance
    assert here.keeper.claim(ONE) == ""
    assert here.held == [GiB, GiB // 2, 0]
    await here.look()
    assert len(here.launcher.orders) == 2
    assert here.launcher.killed == []


@pytest.mark.parametrize(
    ("count", "machine", "spare", "begun"),
    [
        (None, 64 * GiB, 32 * GiB, 1),
        (None, 15 * GiB, 14 * GiB, 0),
        (None, 64 * GiB, 4 * GiB, 0),
        (0, 64 * GiB, 32 * GiB, 0),
        (1, 4 * GiB, 3 * GiB, 1),
        (1, 4 * GiB, GiB, 0),
        (2, 64 * GiB, 32 * GiB, 2),
    ],
)
def test_as_many_as_are_wanted_and_there_is_memory_for(count: int | None, machine: int, spare: int, begun: int) -> None:
    """`auto` is one on a machine that can spare it."""

    async def told() -> None:
        here = Place(count, machine)
        here.spare = spare
        here.keeper.claim(ONE)
        for _ in range(4):
            await here.look()
            for order in here.launcher.orders:
                here.keeper.mark_ready(order.instance, GiB // 2)
        assert len(here.launcher.orders) == begun

    asyncio.run(told())


@story
async def test_several_are_for_what_was_started_lately() -> None:
    """The last one first; of what no model needs any more, after `engine use`, none stays."""
    here = Place(2, a=ONE, b=TWO, c=ONE)
    here.keeper.claim(TWO)
    here.keeper.claim(ONE)
    for _ in range(3):
        await here.look(running=set())
        for order in here.launcher.orders:
            here.keeper.mark_ready(order.instance, GiB)
    assert [json.loads(order.argv[2])["program"] for order in here.launcher.orders] == [ONE.program, TWO.program]
    here.kinds.update(a=TWO, c=TWO)
    await here.look(running=set())
    assert here.launcher.killed == [here.launcher.orders[0].instance]


@story
async def test_none_is_kept_for_models_that_are_all_loaded() -> None:
    """It could become nothing."""
    here = Place()
    await here.waiting()
    await here.look(running={"a", "b"})
    assert len(here.launcher.killed) == 1
    assert here.keeper.held == 0


@story
async def test_models_are_not_looked_through_at_every_look() -> None:
    """A daemon with ten thousand models looks every two seconds; a few are asked for, once something has changed."""
    here = Place(1, **{f"m{number}": ONE if number == 20 else None for number in range(10_000)})
    asked = 0

    def find(model: ModelConfig) -> Standby | None:
        nonlocal asked
        asked += 1
        return here.kinds[model.name]

    here.keeper._find = find
    standbys.SEEK = 60.0
    await here.waiting()
    assert asked == 21
    for _ in range(9):
        await here.look()
    assert asked == 21
    await here.look(running={"m20"})
    assert asked == 21 + standbys.MODELS
    assert here.keeper.held == 0


@story
async def test_it_is_given_up_for_others() -> None:
    """For an engine that is about to start, for sleepers that were promised the memory, and when it becomes scarce."""
    for give_up in ("start", "promise", "scarce"):
        here = Place()
        instance = await here.waiting()
        if give_up == "start":
            here.spare = 3 * GiB
            assert here.keeper.claim(TWO, 2 * GiB) == ""
            assert here.launcher.killed == []
            assert here.keeper.claim(TWO, 3 * GiB) == ""
        elif give_up == "promise":
            await here.look(over=1)
        else:
            here.spare = GiB // 4
            await here.look()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert here.launcher.killed == [instance], give_up


@story
async def test_what_fails_is_not_tried_for_ever() -> None:
    """Twice; a reload tries again. An end that is the launcher's does not count."""
    here = Place()
    here.keeper.claim(ONE)
    for _ in range(4):
        await here.look()
        here.keeper.ended(ExitReport(here.launcher.orders[-1].instance, 1, log_tail=("ImportError",)))
    assert len(here.launcher.orders) == 2
    here.keeper.configure(1, [ModelConfig("b")])
    for _ in range(4):
        await here.look()
        assert here.keeper.ended(ExitReport(here.launcher.orders[-1].instance))
    assert len(here.launcher.orders) == 6
    here.launcher.refusal = "there is no command"
    for _ in range(4):
        await here.look()
    assert len(here.launcher.orders) == 8
    assert not here.keeper.ended(ExitReport("somebody else's", 0))


def test_how_a_standby_ended_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its last line alone is that of its imports."""

    async def ends() -> None:
        here = Place()
        here.keeper.claim(ONE)
        await here.look()
        here.keeper.ended(ExitReport(here.launcher.orders[-1].instance, signal=9, log_tail=("Disabling Triton.",)))

    asyncio.run(ends())
    assert "no standby: the process was killed by SIGKILL; its last line: Disabling Triton." in caplog.text


@story
async def test_one_that_is_given_away_and_not_used_ends() -> None:
    """It is in nobody's list any more."""
    here = Place()
    instance = await here.waiting()
    assert here.keeper.claim(ONE) == instance
    here.keeper.not_used(instance)
    await asyncio.sleep(0)
    assert here.launcher.killed == [instance]


@story
async def test_those_that_do_not_become_engines_are_not_kept_for_ever() -> None:
    """Each costs its start the seconds of the hand-over: after two in a row there are no more until a reload."""
    here = Place()
    for _ in range(4):
        here.keeper.claim(ONE)
        await here.look()
        for instance in list(here.keeper.kept):
            here.keeper.mark_ready(instance, GiB)
            assert here.keeper.claim(ONE) == instance
            here.keeper.not_taken(ONE)
    assert len(here.launcher.orders) == 2


def test_what_is_available_is_the_kernels_word(tmp_path: Path) -> None:
    """Nothing, where it does not say."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert available(tmp_path) == 2 << 20
    assert available(tmp_path / "none") == 0


# ---- in the engine manager


def made_of_standby(rig: Rig, launcher: FakeLauncher) -> list[StartOrder]:
    """Every engine that is ordered so is made of a standby; returns the orders."""
    orders: list[StartOrder] = []
    start: Callable[[StartOrder], Awaitable[Running]] = launcher.start

    async def starts(order: StartOrder) -> Running:
        orders.append(order)
        return replace(await start(order), standby=order.standby)

    launcher.start = starts  # type: ignore[method-assign]
    rig.engine_manager.standbys.claim = lambda standby, needs=0: "s-1"  # type: ignore[method-assign]
    return orders


def test_a_start_that_fails_as_a_standby_begins_anew(tmp_path: Path) -> None:
    """Under a name and in a directory of its own, without a standby; the core hears of one start."""

    async def told(rig: Rig) -> None:
        orders = made_of_standby(rig, rig.launcher)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"{}")} if len(orders) == 1 else {})
        rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), GiB))
        await soon(rig.launcher.started.wait())
        rig.launcher.exit(orders[0].instance, 1, "RuntimeError: Cannot re-initialize CUDA in forked subprocess")
        assert isinstance(await rig.event(), events.EngineReady)
        assert [order.standby for order in orders] == ["s-1", ""]
        assert orders[0].run_dir != orders[1].run_dir
        assert rig.engine_manager.processes["m"].instance == orders[1].instance
        await rig.nothing_more()

    tell(told, tmp_path)


def test_a_standby_that_did_not_become_the_engine_is_noted(tmp_path: Path) -> None:
    """The launcher has started the engine without it, and the start goes on."""

    async def told(rig: Rig) -> None:
        planner, keeper, missed = rig.engine_manager.launch_planner, rig.engine_manager.standbys, list[Standby]()
        prepare = planner.prepare

        def prepared(command: commands.StartEngine) -> Any:
            process, order = prepare(command)
            process.standby = ONE
            return process, order

        planner.prepare = prepared  # type: ignore[method-assign]
        keeper.claim = lambda standby, needs=0: "s-1"  # type: ignore[method-assign]
        keeper.not_taken = missed.append  # type: ignore[method-assign]
        rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), GiB))
        assert isinstance(await rig.event(), events.EngineReady)
        assert [order.standby for order in rig.launcher.orders] == ["s-1"]
        assert missed == [ONE]

    tell(told, tmp_path)


def test_one_that_is_never_ready_is_not_waited_for_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that hangs says nothing; how long a start takes is known."""
    from vllmd.daemon import engine_manager

    async def told(rig: Rig) -> None:
        monkeypatch.setattr(engine_manager, "SHORTEST_PATIENCE", 0.2)
        monkeypatch.setattr(engine_manager, "KILL_LIMIT", 0.5)
        rig.usual["start"] = 0.01
        orders = made_of_standby(rig, rig.launcher)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"{}")} if len(orders) == 1 else {})
        rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), GiB))
        assert isinstance(await rig.event(), events.EngineReady)
        assert [order.standby for order in orders] == ["s-1", ""]

    tell(told, tmp_path)


def test_what_fails_both_ways_is_the_models_own_fault(tmp_path: Path) -> None:
    """The second failure is told, and standbys are kept on."""

    async def told(rig: Rig) -> None:
        orders = made_of_standby(rig, rig.launcher)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"{}")})
        rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), GiB))
        for number in (1, 2):
            while len(rig.launcher.orders) < number or not rig.launcher.engines:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            rig.launcher.exit(orders[-1].instance, 1, "ValueError: no such model")
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "no such model" in failed.reason
        assert not rig.engine_manager.processes
        await rig.nothing_more()

    tell(told, tmp_path)
