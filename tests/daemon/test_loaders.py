"""A start gets the loader that was fastest here; one that fails with it is begun anew without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.daemon.rig import Rig, soon, tell
from vllmd.core import commands, events
from vllmd.daemon.engine_process import EngineProcess
from vllmd.daemon.loaders import Loaders, Loading
from vllmd.engines.loaders import LOADERS, Files, LoaderBook
from vllmd.engines.sim import Sim
from vllmd.foreign import Unreadable
from vllmd.sizes import GiB

RUNAI = "runai_streamer"
FLAG = ["--load-format", RUNAI]
FILES = Files(10 * GiB, 5 * GiB, 0.0, "ext4 /dev/sda1")


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's kind can be told how to load here."""
    monkeypatch.setattr(Sim, "loaders", lambda self, model, argv: LOADERS[2:], raising=False)
    monkeypatch.setattr(Sim, "load_with", lambda self, argv, load_format: (*argv, "--load-format", load_format),
                        raising=False)  # fmt: skip


class Here(Loaders):
    """A machine whose disk was slow at the first start. ``files``: what is found of them, or raised."""

    def __init__(self, rig: Rig, wanted: bool = True, files: Files | Exception = FILES) -> None:
        self.book, self.told, self.found = LoaderBook(), list[str](), files
        super().__init__(self.book, wanted=lambda: wanted, past_the_cache=self.told.append)
        rig.engine_manager.loaders = self

    def _look(self, replica: str) -> Files:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def slow(self, place: str) -> None:
        self.book.measured(place, "", 40.0, 10 * GiB)


def last(rig: Rig) -> list[str]:
    """The end of the last order's command."""
    return list(rig.launcher.orders[-1].argv[-2:])


async def started(rig: Rig, *lines: str) -> EngineProcess:
    """A start whose engine says this; it is ready and has ended again."""
    rig.launcher.started.clear()
    rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
    await rig.start()
    await soon(rig.launcher.started.wait())
    process = rig.engine_manager.processes["m"]
    rig.engine_manager.on_log(rig.instance, list(lines))
    rig.engine.answers.clear()
    assert isinstance(await rig.event(), events.EngineReady)
    rig.launcher.exit(rig.instance, 0)
    assert isinstance(await rig.event(), events.EngineExited)
    return process


def test_the_first_start_is_measured_and_the_second_tries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it took stands in the book by where it ran; what it was loaded by is told with its phases."""
    weights = "(EngineCore pid=8) INFO 11-20 19:00:00 [core.py:1] Starting to load model x"

    async def story(rig: Rig) -> None:
        here = Here(rig)
        process = await started(rig, weights)
        assert last(rig) != FLAG
        (place,) = here.book.plain()
        assert process.loading == Loading("", place, 10 * GiB)
        assert list(here.book.plain()[place]["per_gib"]) == [""]
        here.slow(place)
        process = await started(rig, weights)
        assert (last(rig), process.loader) == (FLAG, RUNAI)
        assert list(here.book.plain()[place]["per_gib"]) == ["", RUNAI]
        assert rig.engine_manager.starts["m"].loader == RUNAI
        await started(rig, weights)  # it took next to no time
        assert (last(rig), here.told) == (FLAG, [])

    caplog.set_level(logging.INFO)
    tell(story, tmp_path)
    fields = [getattr(record, "journal", {}) for record in caplog.records if "ready after" in record.getMessage()]
    assert [told.get("VLLMD_LOADER") for told in fields] == [None, RUNAI, RUNAI]


def test_two_that_load_at_the_same_time_tell_nothing_of_a_loader(tmp_path: Path) -> None:
    """They share the disk: a fast loader that seemed slow by that would never be tried again. The first word counts."""
    weights = "(EngineCore pid=8) INFO 11-20 19:00:00 [core.py:1] Starting to load model x"

    async def story(rig: Rig) -> None:
        here = Here(rig)
        await rig.ready()
        beside = rig.engine_manager.processes.pop("m")
        rig.launcher.engines.clear()
        beside.ready_after = None  # it is starting
        rig.engine_manager.processes["beside"] = beside
        await started(rig, weights)
        (place,) = here.book.plain()
        assert list(here.book.plain()[place]["per_gib"]) == [""]
        here.slow(place)
        await started(rig, weights)
        assert last(rig) == FLAG
        assert list(here.book.plain()[place]["per_gib"]) == [""]
        beside.ready_after = 0.0
        await started(rig, weights)
        assert list(here.book.plain()[place]["per_gib"]) == ["", RUNAI]

    tell(story, tmp_path)


@pytest.mark.parametrize("memory", [False, True])
def test_a_start_that_fails_with_it_begins_anew_without(tmp_path: Path, memory: bool) -> None:
    """The core hears of one start, that model is not started so again, and no standby is blamed."""
    why = "torch.OutOfMemoryError: CUDA out of memory" if memory else "ImportError: libstreamer.so: no such file"

    async def story(rig: Rig) -> None:
        here = Here(rig)
        process = await started(rig)
        assert process.loading
        here.slow(process.loading.place)
        rig.launcher.started.clear()
        fails = iter([True])
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")} if next(fails, False) else {})
        await rig.start()
        await soon(rig.launcher.started.wait())
        assert last(rig) == FLAG
        rig.launcher.exit(rig.instance, 1, why)
        assert isinstance(await rig.event(), events.EngineReady)
        assert last(rig) != FLAG
        assert here.book.plain()[process.loading.place]["failed"] == {RUNAI: ["m"]}
        rig.launcher.exit(rig.instance, 0)
        assert isinstance(await rig.event(), events.EngineExited)
        await started(rig)
        assert last(rig) != FLAG

    tell(story, tmp_path)


def test_what_fails_without_it_as_well_is_not_its_fault(tmp_path: Path) -> None:
    """It may be tried once more; a model that can never start is not started twice each time."""

    async def story(rig: Rig) -> None:
        here = Here(rig)
        process = await started(rig)
        assert process.loading
        here.slow(process.loading.place)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        for orders in (2, 2, 1):
            before = len(rig.launcher.orders)
            await rig.start()
            for number in range(orders):
                async with asyncio.timeout(10):
                    while len(rig.launcher.orders) <= before + number or not rig.launcher.engines:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                rig.launcher.exit(rig.instance, 1, "ValueError: no such model")
                await asyncio.sleep(0)
            assert isinstance(await rig.event(), events.EngineStartFailed)
            assert len(rig.launcher.orders) == before + orders

    tell(story, tmp_path)


def test_a_stop_before_the_order_gives_up_the_standby(tmp_path: Path) -> None:
    """It was given away already, and nobody would know of it any more."""

    async def story(rig: Rig) -> None:
        here, unused, looking = Here(rig), list[str](), asyncio.Event()
        rig.engine_manager.standbys.claim = lambda standby, needs=0: "s-1"  # type: ignore[method-assign]
        rig.engine_manager.standbys.not_used = unused.append  # type: ignore[method-assign]

        async def choose(*_: object) -> object:
            looking.set()
            return await asyncio.Event().wait()

        here.choose = choose  # type: ignore[method-assign,assignment]
        await rig.start()
        await soon(looking.wait())
        rig.engine_manager.stop(commands.StopEngine("m", "an operator"))
        assert isinstance(await rig.event(), events.EngineStopped)
        assert (unused, rig.launcher.orders) == (["s-1"], [])

    tell(story, tmp_path)


@pytest.mark.parametrize("why", ["a defect", "not wanted", "unreadable", "none", "half of it is cached"])
def test_it_is_left_to_itself(tmp_path: Path, why: str) -> None:
    """Where the settings say so, or its files tell nothing."""
    found: dict[str, Files | Exception] = {
        "a defect": RuntimeError("x"),
        "unreadable": Unreadable("its files could not be read within 0.5 s"),
        "none": Files(),
        "half of it is cached": Files(GiB, GiB, 0.5, "ext4 /dev/sda1"),
    }

    async def story(rig: Rig) -> None:
        Here(rig, wanted=why != "not wanted", files=found.get(why, FILES))
        process = await started(rig)
        assert process.loading is None

    tell(story, tmp_path)


def test_what_reads_past_the_page_cache_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two would share the disk, and one of them for nothing."""
    direct: Sequence[object] = LOADERS[:1]
    monkeypatch.setattr(Sim, "loaders", lambda self, model, argv: direct)

    async def story(rig: Rig) -> None:
        here = Here(rig)
        process = await started(rig)
        assert process.loading
        here.slow(process.loading.place)
        await started(rig)
        assert here.told == ["m"]

    tell(story, tmp_path)
