"""Samples: attributed, bounded in time, and compared after an engine's end."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllmd.core import events
from vllmd.core.types import Device, Placement
from vllmd.daemon import device_readings, memory
from vllmd.daemon.device_readings import UNREAD, DeviceReadings, devices_found
from vllmd.daemon.memory import Memory
from vllmd.gpu import DeviceSample, Sample
from vllmd.sizes import GiB


class Scripted:
    """One device whose readings are given; the last one is repeated."""

    source = note = "scripted"
    notes = ()
    readable = True
    trouble = None
    asking = False

    def __init__(self, readings: Iterable[Sample | Exception | threading.Event]) -> None:
        self._readings = list(readings)
        self.reads = 0

    def inventory(self) -> tuple[Device, ...]:
        return (Device(0, "0", 80 * GiB),)

    def sample(self) -> Sample:
        self.reads += 1
        reading = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        if isinstance(reading, threading.Event):
            reading.wait(120)
            return Sample()
        if isinstance(reading, Exception):
            raise reading
        return reading

    def close(self) -> None: ...


def used(size: int, *, unsized: frozenset[int] = frozenset(), hides: bool = False) -> Sample:
    """So much in use, and owned by no process."""
    return Sample({0: DeviceSample(80 * GiB, size, 80 * GiB - size, {}, unsized, hides)})


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is not waited for long."""
    monkeypatch.setattr(memory, "SAMPLE_LIMIT", 0.1)
    monkeypatch.setattr(memory, "RETURN_LIMIT", 0.1)
    monkeypatch.setattr(memory, "RETURN_POLL", 0.01)


def told(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(story(), 10)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("after", "missing"),
    [
        ([used(0)], {}),
        ([used(20 * GiB)], {0: 20 * GiB}),
        ([used(20 * GiB), used(20 * GiB), used(GiB // 8)], {}),  # it takes a moment
        ([used(70 * GiB)], {0: 50 * GiB}),  # more than it had is not its own
        ([used(20 * GiB, unsized=frozenset({7}))], {}),  # somebody's, of unknown size
        ([used(20 * GiB, hides=True)], {}),  # processes cannot be seen: nothing can be concluded
        ([Sample(failed={0: "lost"})], {}),
        ([RuntimeError("driver")], {}),
    ],
)
def test_what_is_missing_after_an_end(after: list[Sample], missing: dict[int, int]) -> None:
    """Only what nobody owns, that was its own, and that does not come back in time."""

    async def story() -> None:
        devices = Scripted(after)
        assert await Memory(devices).missing({0: 50 * GiB}, {0: 0}) == missing

    told(story)


def test_what_nobody_owned_before_is_not_missing() -> None:
    """The driver keeps something for itself."""

    async def story() -> None:
        assert await Memory(Scripted([used(GiB)])).missing({0: 50 * GiB}, {0: GiB}) == {}

    told(story)


def test_what_held_nothing_misses_nothing() -> None:
    """And the devices are not asked."""

    async def story() -> None:
        devices = Scripted([used(20 * GiB)])
        assert await Memory(devices).missing({}, {}) == {}
        assert devices.reads == 0

    told(story)


def test_a_driver_that_hangs_is_given_up_and_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """One stuck thread is enough; everybody else goes on."""

    async def story() -> None:
        stuck = threading.Event()
        devices = Scripted([stuck, used(GiB)])
        subject = Memory(devices)
        assert await subject.sample() is None
        assert await subject.sample() is None
        assert devices.reads == 1
        stuck.set()
        assert subject._reading
        await asyncio.wait({subject._reading})
        assert await subject.sample() is not None

    told(story)
    assert "the driver does not answer: a reading hangs" in caplog.text


def test_what_cannot_be_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a driver's library throws."""

    async def story() -> None:
        assert await Memory(Scripted([RuntimeError("NVML: unknown error")])).report({}, {}) is None

    told(story)
    assert "NVML: unknown error" in caplog.text


def test_files_of_a_placement_are_all_or_none() -> None:
    """A stand-in that holds part of its memory nowhere would be worse than one that holds none."""
    subject = Memory(Scripted([Sample()]), {0: Path("/gpu0")})
    assert subject.files_of(Placement((0,))) == ("/gpu0",)
    assert subject.files_of(Placement((0, 1))) == ()
    assert subject.files_of(Placement()) == ()


def test_a_reading_is_nobodys_loss_when_three_ask_at_once() -> None:
    """One that is done is the answer of all who asked for it, though somebody may have asked for the next already."""

    async def story() -> None:
        subject = Memory(Scripted([used(GiB)]))
        began: list[asyncio.Task[Sample | None]] = []

        async def ask_when_done() -> None:
            reading = subject._reading
            assert reading
            await asyncio.wait({reading})
            began.append(asyncio.ensure_future(subject.sample()))

        first = asyncio.ensure_future(subject.sample())
        await asyncio.sleep(0)
        waiters = [asyncio.ensure_future(ask_when_done()), asyncio.ensure_future(subject.sample())]
        await asyncio.gather(*waiters)
        assert all([await each for each in (first, waiters[1], *began)])

    told(story)


def test_an_engine_without_devices_asks_no_driver() -> None:
    """A model on the CPU is not held up by a driver that hangs."""

    async def story() -> None:
        devices = Scripted([threading.Event()])
        subject = Memory(devices)
        process = SimpleNamespace(placement=Placement(()), running=object())
        assert await subject.held(process) == {}  # type: ignore[arg-type]
        assert devices.reads == 0

    told(story)


@pytest.mark.parametrize(
    ("reading", "held"),
    [
        (used(20 * GiB), {0: 0}),  # all is somebody else's
        (used(20 * GiB, hides=True), {}),  # as in a container, and on the CPU
        (used(20 * GiB, unsized=frozenset({os.getpid()})), {}),
        (used(20 * GiB, unsized=frozenset({1})), {0: 0}),
        (Sample(failed={0: "lost"}), {}),
    ],
)
def test_what_is_hidden_is_not_taken_for_nothing(reading: Sample, held: dict[int, int]) -> None:
    """Else a sleep seems to have freed nothing of what the ledger has, and the model sleeps as dear as it was awake."""

    async def story() -> None:
        running = SimpleNamespace(cgroup="", pid=os.getpid())
        process = SimpleNamespace(placement=Placement((0,)), running=running, model=SimpleNamespace(name="m"))
        assert await Memory(Scripted([reading])).held(process) == held  # type: ignore[arg-type]

    told(story)


class Core:
    """Notes what is posted. Stands for the dispatcher and for the engine manager, of which there are no engines."""

    def __init__(self) -> None:
        self.posted: list[events.Event] = []
        self.processes: dict[str, Any] = {}
        self.scheduler = self
        self.replicas = ()

    def post(self, event: events.Event) -> None:
        self.posted.append(event)

    def activity(self, now: float) -> Core:
        return self

    def now(self) -> float:
        return 0.0


GPU = Device(0, "0", 80 * GiB)
KNOWN = events.DevicesChanged((GPU,))


def test_devices_that_were_found_are_not_known_before_their_first_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may hold all of them: a start on them before that is a start by a guess, also with a file too few."""

    async def story() -> None:
        devices = Scripted([RuntimeError("driver"), used(GiB)])
        core, here = Core(), Memory(devices)
        assert devices_found(devices) == events.DevicesChanged((GPU,), UNREAD, asking=True)
        readings = DeviceReadings(here, cast(Any, core), cast(Any, core))
        with monkeypatch.context() as out:
            out.setattr(device_readings, "out_of_files", lambda: True)
            await readings.look()
        assert core.posted == [] and readings.is_due
        await readings.look()  # fails once, which may be a driver that is being loaded
        assert core.posted == [events.MemorySampled({}, {}, {0: "no answer"})] and readings.is_due
        await readings.look()
        assert core.posted[1:] == [events.MemorySampled({0: GiB}, {}), KNOWN] and not readings.is_due
        here.use_devices(Scripted([used(2 * GiB)]))
        assert here.last is None, "what other devices said"
        assert readings.is_due
        await readings.look()
        assert core.posted[3:] == [events.MemorySampled({0: 2 * GiB}, {}), KNOWN]

    told(story)


def test_a_reading_of_other_devices_is_none_of_these() -> None:
    """It was under way when they came: device 0 is another one now."""

    async def story() -> None:
        stuck = threading.Event()
        here = Memory(Scripted([stuck]))
        old = asyncio.ensure_future(here.sample())
        await asyncio.sleep(0)
        here.use_devices(Scripted([used(GiB)]))
        fresh = await here.sample()
        stuck.set()
        assert await old is None
        assert here.last is fresh is not None

    told(story)
