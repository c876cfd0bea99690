"""The heart's timer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from vllmd.core import events
from vllmd.core.commands import AddReplica, Admit, Answer, Command, Record, Reject, RejectReason
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Decision
from vllmd.daemon.admission_gate import ERRORS
from vllmd.daemon.dispatcher import DECISIONS, FAILED, Dispatcher
from vllmd.errors import InternalError

ARRIVED = events.RequestArrived("1", "m")


class StillLoop(asyncio.SelectorEventLoop):
    """Its clock goes when the test says so."""

    clock = 100.0

    def time(self) -> float:
        return self.clock

    async def until(self, clock: float) -> None:
        """Let time pass, and whatever is due happen."""
        self.clock = clock
        for _ in range(3):
            await asyncio.sleep(0)


class Wanting(Scheduler):
    """A core that decides nothing; ``due`` is what it says of the next timer."""

    def __init__(self) -> None:
        self.due: float | None = None
        self.heard: list[float] = []

    def handle(self, event: events.Event, now: float) -> list[Command]:
        if isinstance(event, events.TimePassed):
            self.heard.append(now)
            self.due = None
        return []

    def next_timer(self) -> float | None:
        return self.due

    def wants_time_before(self, moment: float) -> bool:
        return self.due is not None and self.due < moment


Story = Callable[[StillLoop, Dispatcher, Wanting], Awaitable[None]]


def play(story: Story) -> None:
    """Run it with a heart in a loop that stands still."""

    async def told(loop: StillLoop) -> None:
        core = Wanting()
        dispatcher = Dispatcher(core, {}, clock=loop.time)
        await story(loop, dispatcher, core)
        dispatcher.close()

    loop = StillLoop()
    try:
        loop.run_until_complete(told(loop))
    finally:
        loop.close()


@pytest.mark.parametrize("dues", [(110.0,), (105.0, 110.0), (115.0, 110.0), (None, 110.0)])
def test_the_core_hears_of_the_time_when_it_wanted_to_last(dues: tuple[float | None, ...]) -> None:
    """Put off, moved forward or newly wanted: not before that time, then at once, and once."""

    async def story(loop: StillLoop, dispatcher: Dispatcher, core: Wanting) -> None:
        for core.due in dues:
            dispatcher.post(ARRIVED)
        for clock in (105.0, 109.0, 110.0, 115.0, 120.0):
            await loop.until(clock)
        assert core.heard == [110.0]

    play(story)


def test_the_core_hears_nothing_that_it_does_not_want_any_more() -> None:
    """The timer that it once wanted passes without a word."""

    async def story(loop: StillLoop, dispatcher: Dispatcher, core: Wanting) -> None:
        for core.due in (105.0, None):
            dispatcher.post(ARRIVED)
        await loop.until(120.0)
        assert core.heard == []

    play(story)


def test_what_was_due_long_ago_is_due_now() -> None:
    """The core may want to go on at once (it does after a start with models to preload)."""

    async def story(loop: StillLoop, dispatcher: Dispatcher, core: Wanting) -> None:
        core.due = 1.0
        dispatcher.post(ARRIVED)
        await loop.until(100.0)
        assert core.heard == [100.0]

    play(story)


class Answering(Wanting):
    """A core that does what it is asked, or fails."""

    def handle(self, event: events.Event, now: float) -> list[Command]:
        assert isinstance(event, events.LoadAsked)
        if event.model == "broken":
            raise ValueError("a defect")
        return [Answer(event.ask, event.model), AddReplica(event.model, 1)]


def test_whoever_asks_hears_before_what_follows_begins() -> None:
    """Once, of his own event; what he raises is raised to him, and what follows begins all the same."""
    heard: list[str] = []

    def refuse(answer: Answer) -> None:
        raise ValueError(answer.chosen)

    async def told(loop: StillLoop) -> None:
        dispatcher = Dispatcher(Answering(), {AddReplica: lambda command: heard.append(f"add to {command.model}")})
        dispatcher.ask(events.LoadAsked("m"), lambda answer: heard.append(answer.chosen))
        with pytest.raises(ValueError, match="n"):
            dispatcher.ask(events.LoadAsked("n"), refuse)
        dispatcher.post(events.LoadAsked("o"))
        dispatcher.ask(events.LoadAsked("broken"), lambda answer: heard.append(answer.refused))
        dispatcher.close()

    loop = StillLoop()
    loop.run_until_complete(told(loop))
    loop.close()
    assert heard == ["m", "add to m", "add to n", "add to o", "vllmd could not do it; its log says why"]


def test_what_the_scheduler_fails_at_is_told_as_a_defect(caplog: pytest.LogCaptureFixture) -> None:
    """Who asked, who operates and who waits hear of it with status 500; the next event is handled."""
    done: list[object] = []

    class Failing(Wanting):
        def handle(self, event: events.Event, now: float) -> list[Command]:
            if event != events.PinSet("m", False):
                raise ValueError("a defect")
            return [Admit("2", "m")]

    async def story() -> None:
        dispatcher = Dispatcher(Failing(), {Reject: done.append, Admit: done.append})
        with pytest.raises(InternalError, match="its log says why"):
            dispatcher.perform(events.PinSet("m", True))
        dispatcher.ask(events.LoadAsked("m"), done.append)
        dispatcher.post(ARRIVED)
        dispatcher.perform(events.PinSet("m", False))
        dispatcher.close()

    asyncio.run(story())
    told = (FAILED, RejectReason.DEFECT)
    assert done == [Answer("1", "", *told), Reject("1", told[1], told[0]), Admit("2", "m")]
    assert (ERRORS[RejectReason.DEFECT], InternalError.status) == (InternalError, 500)
    assert caplog.text.count("ValueError: a defect") == 3


def test_what_the_scheduler_fails_at_on_the_short_way_is_for_an_event(caplog: pytest.LogCaptureFixture) -> None:
    """A defect there neither loses a request's place nor breaks off an answer at its end."""

    class Failing(Wanting):
        def admit_at_once(self, request: str, name: str, now: float) -> str | None:
            raise ValueError("a defect")

        def finish_at_once(self, request: str, now: float) -> bool:
            raise ValueError("a defect")

    async def story() -> None:
        dispatcher = Dispatcher(Failing(), {})
        assert dispatcher.admit_at_once("1", "m") is None
        assert not dispatcher.finish_at_once("1")
        dispatcher.close()

    asyncio.run(story())
    assert caplog.text.count("ValueError: a defect") == 2


class Refusing(Wanting):
    """A core that refuses, and says so each time."""

    def handle(self, event: events.Event, now: float) -> list[Command]:
        what = "fail" if event == events.TimePassed() else "refuse"
        return [Record(Decision(now, what, "m", "its queue is full"))]


def test_refusals_do_not_drown_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """journald drops all of a service that logs too much, what operators did included. Each one is still counted."""

    async def told(loop: StillLoop) -> None:
        decided = list[Decision]()
        dispatcher = Dispatcher(Refusing(), {}, lambda decision, now: decided.append(decision), clock=loop.time)
        for _ in range(10 * DECISIONS):
            dispatcher.post(ARRIVED)
        dispatcher.post(events.TimePassed())
        dispatcher.flush_log()
        assert len(decided) == 10 * DECISIONS + 1
        dispatcher.close()

    loop = StillLoop()
    with caplog.at_level(logging.INFO, "vllmd"):
        loop.run_until_complete(told(loop))
    loop.close()
    assert caplog.messages.count("m: refuse: its queue is full") == DECISIONS
    (failed,) = (each for each in caplog.records if each.getMessage() == "m: fail: its queue is full")
    assert failed.levelno == logging.ERROR  # so journalctl -p err, the first thing in the morning, shows it
    left = sum(int(text.split()[0]) for text in caplog.messages if "were left out" in text)
    assert left + caplog.messages.count("m: refuse: its queue is full") == 10 * DECISIONS


def test_a_command_that_fails_takes_no_other_along(caplog: pytest.LogCaptureFixture) -> None:
    """Two requests are admitted by one event: the second one is, whatever goes wrong with the first."""
    admitted: list[str] = []

    def admit(command: Admit) -> None:
        if command.request == "1":
            raise RuntimeError("a defect")
        admitted.append(command.request)

    class Deciding(Wanting):
        def handle(self, event: events.Event, now: float) -> list[Command]:
            return [Admit("1", "m"), Admit("2", "m")]

    async def story() -> None:
        Dispatcher(Deciding(), {Admit: admit}).post(ARRIVED)

    asyncio.run(story())
    assert admitted == ["2"]
    assert "could not carry out Admit" in caplog.text
