"""Decisions and engines' events as they pass: counted, and told to those who follow (``vllmctl watch``, a load)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from vllmd.admin.counters import Counters
from vllmd.api.answers import Decision
from vllmd.core import events
from vllmd.core import types as core
from vllmd.core.types import ReplicaView
from vllmd.daemon.current import Current
from vllmd.daemon.last_starts import in_words
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.serializers import decision, state_of

if TYPE_CHECKING:
    from vllmd.daemon.dispatcher import Dispatcher

WATCH_BACKLOG = 1000  # decisions kept for a watcher that does not read; then it loses the oldest
OUTCOMES: dict[type, tuple[str, bool]] = {  # engine event -> the change that it ends, and whether that failed
    events.EngineReady: ("start", False),
    events.EngineStartFailed: ("start", True),
    events.EngineAwake: ("wake", False),
    events.EngineWakeFailed: ("wake", True),
    events.EngineAsleep: ("sleep", False),
    events.EngineSleepFailed: ("sleep", True),
    events.EngineStopped: ("stop", False),
    events.EngineExited: ("exit", True),
}
COMINGS = frozenset({"start", "wake"})  # changes after which an engine serves
ENDINGS = frozenset({"stop", "exit"})  # changes after which the engine's process is gone


class Changes:
    """Passes decisions and engines' events on; keeps nothing but its followers."""

    def __init__(
        self,
        current: Current,
        counters: Counters,
        learnt: Learnt,
        engine_gone: Callable[[str], None],
        engine_up: Callable[[str, float], None] = lambda engine, took: None,
    ) -> None:
        """``engine_gone`` is called with the id of an engine whose process has ended.

        ``engine_up``: with the id of one that has started or woken, and the seconds that it took.
        """
        self._current = current
        self._counters = counters
        self._learnt = learnt
        self._engine_gone = engine_gone
        self._engine_up = engine_up
        self._watchers: set[asyncio.Queue[Decision]] = set()
        self._changed = asyncio.Event()
        self._followers = 0  # how many wait for a change

    # -- what passes

    def decided(self, made: core.Decision, now: float) -> None:
        """The core has decided something, at ``now`` by its clock."""
        self._counters.decided(made)
        answer = decision(made, self._learnt.dates.note(made.at, now))
        if answer.model:
            self._learnt.decided(answer)
        if self._watchers:
            self.tell(answer)

    def engine_event(self, event: events.Event, dispatcher: Dispatcher) -> None:
        """Pass an engine's event on to the core; count it, and tell watchers what became of the engine."""
        if (outcome := OUTCOMES.get(type(event))) is None:
            dispatcher.post(event)
            return
        change, failed = outcome
        engine: str = getattr(event, "replica", "")
        before = _view(dispatcher, engine)
        took = (before.since or 0.0) if before else 0.0
        self._learnt.dates.note(dispatcher.now(), dispatcher.now())
        self._counters.changed(self._current.model_of(engine), change, took, failed=failed)
        if change in COMINGS and not failed:
            self._engine_up(engine, took)
        dispatcher.post(event)
        if change in ENDINGS:
            self._engine_gone(engine)
        if self._watchers:
            now = _view(dispatcher, engine)
            what, why = f"{change} failed" if failed else change, getattr(event, "reason", "") or f"{change} done"
            start = self._learnt.starts.get(engine) if isinstance(event, events.EngineReady) else None
            if start is not None:
                words = in_words(start.phases, start.loader)
                why = f"start done in {start.seconds:.1f} s{f': {words}' if words else ''}"
            state = state_of(now) if now else ""
            numbers = {phase: round(seconds, 3) for phase, seconds in start.phases.items()} if start else {}
            self.tell(Decision(time.time(), what, engine, why, numbers, state=state))

    def mark_changed(self) -> None:
        """Wake everything that waits for a change."""
        if self._followers:
            self._changed.set()
            self._changed = asyncio.Event()

    def tell(self, news: Decision) -> None:
        """Send a decision, or another event in its form, to everything that watches."""
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(news)

    # -- followers

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """While this lasts, ``next_change`` is set at changes."""
        self._followers += 1
        try:
            yield
        finally:
            self._followers -= 1

    @property
    def next_change(self) -> asyncio.Event:
        """Set at the next change. Take it before reading the state: then a change while reading is not missed."""
        return self._changed

    async def changed(self, limit: float) -> None:
        """Wait until something has happened, at most ``limit`` seconds."""
        with self.following(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._changed.wait()

    async def watch(self) -> AsyncIterator[Decision]:
        """Decisions as they are made, and engines' changes as they end."""
        queue: asyncio.Queue[Decision] = asyncio.Queue(WATCH_BACKLOG)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


def _view(dispatcher: Dispatcher, engine: str) -> ReplicaView | None:
    return next(iter(dispatcher.scheduler.replicas_of(engine, dispatcher.now())), None)
