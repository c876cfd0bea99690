"""Which devices there are is asked until it is answered, again at the kernel's word, never twice at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping

import pytest

from tests.gpu.fake_nvml import FakeNvml, Gpu
from vllmd.config.types import Config
from vllmd.daemon import device_watch
from vllmd.daemon.device_watch import DeviceWatch
from vllmd.gpu import Devices, Trouble, Unanswered, open_devices
from vllmd.gpu.uevents import concerns_gpus, parse
from vllmd.sizes import GiB

SILENT = Trouble("the driver does not answer", "reboot")


class Script:
    """Answers in order, the last one again and again; ``taken``: what the daemon was told."""

    def __init__(self, *answers: Devices | threading.Event) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, int]] = []
        self.taken: asyncio.Queue[Devices] = asyncio.Queue()
        self.watch = DeviceWatch(self.open)

    def open(self, known: Mapping[str, int]) -> Devices:
        self.asked.append(dict(known))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, threading.Event):
            answer.wait(120)
            return nvidia("GPU-late")
        return answer

    async def take(self, devices: Devices) -> None:
        self.taken.put_nowait(devices)


class Words:
    """The kernel's, spoken by the test; ``limits``: how long was waited for each."""

    spoken: asyncio.Queue[bool]
    limits: list[float | None]

    async def wait(self, limit: float | None) -> bool:
        self.limits.append(limit)
        return await self.spoken.get()

    def close(self) -> None: ...


def nvidia(*uuids: str) -> Devices:
    return open_devices(Config(reserve=GiB), {}, FakeNvml(*map(Gpu, uuids)))


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> type[Words]:
    """Nobody speaks but the test, and nothing takes its time."""
    Words.limits = []
    monkeypatch.setattr(device_watch, "Uevents", Words)
    monkeypatch.setattr(device_watch, "SETTLE", 0.0)
    return Words


def told(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        Words.spoken = asyncio.Queue()
        async with asyncio.timeout(10):
            await story()

    asyncio.run(run())


async def until(happened: Callable[[], bool]) -> None:
    """Another task does it, as soon as it gets its turn."""
    for _ in range(10_000):
        if happened():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


def test_a_driver_that_fails_is_asked_again_with_growing_pauses_until_it_answers(words: type[Words]) -> None:
    """And then at the kernel's word only."""

    async def story() -> None:
        script = Script(Unanswered("nvml", SILENT), Unanswered("nvml", SILENT), nvidia("GPU-a"))
        assert (await script.watch.begin()).trouble == SILENT
        run = asyncio.ensure_future(script.watch.run(script.take))
        for _ in range(2):
            words.spoken.put_nowait(False)  # the pause is over, and nobody has spoken
        assert [device.id for device in (await script.taken.get()).inventory()] == ["GPU-a"]
        words.spoken.put_nowait(True)
        await until(lambda: len(script.asked) == 4)
        assert script.taken.empty()  # the same devices are no news
        assert words.limits[:3] == [1.0, 2.0, None]
        run.cancel()

    told(story)


def test_a_word_of_the_kernel_begins_the_pauses_anew(words: type[Words]) -> None:
    """The module was just loaded: the next failure is not waited out for a minute."""

    async def story() -> None:
        script = Script(Unanswered("nvml", SILENT))
        await script.watch.begin()
        run = asyncio.ensure_future(script.watch.run(script.take))
        for spoken in (False, False, True, False):
            words.spoken.put_nowait(spoken)
        await until(lambda: len(words.limits) == 5)
        assert words.limits == [1.0, 2.0, 4.0, 1.0, 2.0]
        run.cancel()

    told(story)


def test_a_slow_driver_is_waited_for_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start goes on without it; then it has not answered; then it does."""
    monkeypatch.setattr(device_watch, "LIMIT", 0.05)

    async def story() -> None:
        stuck = threading.Event()
        script = Script(stuck)
        first = await script.watch.begin(0.0)
        assert first.asking and first.trouble
        run = asyncio.ensure_future(script.watch.run(script.take))
        late = await script.taken.get()
        assert late.trouble and not late.asking
        assert len(script.asked) == 1
        stuck.set()
        Words.spoken.put_nowait(False)
        found = await script.taken.get()
        assert [device.id for device in found.inventory()] == ["GPU-late"]
        run.cancel()

    told(story)


def test_a_new_device_is_taken_and_the_old_ones_keep_their_numbers(words: type[Words]) -> None:
    """What was found before goes into the next question."""

    async def story() -> None:
        script = Script(nvidia("GPU-b"), nvidia("GPU-a", "GPU-b"))
        await script.watch.begin()
        run = asyncio.ensure_future(script.watch.run(script.take))
        words.spoken.put_nowait(True)
        await script.taken.get()
        assert script.asked == [{}, {"GPU-b": 0}]
        run.cancel()

    told(story)


def test_a_source_that_falls_silent_is_looked_at_and_not_forgotten(words: type[Words]) -> None:
    """Engines run on what is known of; whether it can be read any more is the readings' to say."""

    async def story() -> None:
        known = nvidia("GPU-a")
        script = Script(known, Unanswered("nvml", SILENT))
        await script.watch.begin()
        run = asyncio.ensure_future(script.watch.run(script.take))
        words.spoken.put_nowait(True)
        assert await script.taken.get() is known
        assert script.watch.current is known
        run.cancel()

    told(story)


def test_a_question_that_raises_is_no_answer() -> None:
    """Whatever a driver's library throws."""

    def broken(known: Mapping[str, int]) -> Devices:
        raise OSError("no")

    async def story() -> None:
        async def taken(devices: Devices) -> None: ...

        found = await DeviceWatch(broken).begin()
        assert found.trouble and "OSError: no" in found.trouble.why

    told(story)


@pytest.mark.parametrize(
    ("message", "concerns"),
    [
        (b"add@/module/nvidia\0ACTION=add\0DEVPATH=/module/nvidia\0SUBSYSTEM=module\0SEQNUM=7\0", True),
        (b"add@/module/snd\0ACTION=add\0DEVPATH=/module/snd\0SUBSYSTEM=module\0", False),
        (b"libudev\0\xfe\xed\xca\xfe\0\0\0ACTION=bind\0SUBSYSTEM=pci\0DRIVER=nvidia\0DEVPATH=/x\0", True),
        (b"remove@/x\0ACTION=remove\0SUBSYSTEM=pci\0PCI_CLASS=30200\0", True),
        (b"add@/x\0ACTION=add\0SUBSYSTEM=pci\0PCI_CLASS=20000\0", False),
        (b"change@/x\0ACTION=change\0SUBSYSTEM=drm\0HOTPLUG=1\0", True),
        (b"add@/x\0ACTION=add\0SUBSYSTEM=net\0", False),
        (b"", False),
    ],
)
def test_which_words_concern_gpus(message: bytes, concerns: bool) -> None:
    """The kernel's and udev's form alike."""
    assert concerns_gpus(parse(message)) is concerns
