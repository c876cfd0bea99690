"""Puts engines to sleep and wakes them, by their kinds' ordered calls, and checks that the memory came back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from vllmd.core import commands, events
from vllmd.daemon.calls import call_all, complete, is_busy
from vllmd.daemon.engine_process import EngineProcess, log_fields
from vllmd.daemon.memory import RETURN_LIMIT, TOLERANCE, Memory
from vllmd.engines.base import Call

log = logging.getLogger("vllmd.engines")

FREEZE_TOKENS = 64
BUSY_POLL = 1.0  # seconds
MANY_TIMES, SHORTEST_LIMIT = 10.0, 20.0  # a step that takes so many times as long as usual, and so many seconds, hangs

Annotate = Callable[..., Awaitable[None]]


class Sleeps:
    """What an engine goes through between awake and asleep; each ends in the event that the core is owed."""

    def __init__(self, memory: Memory, annotate: Annotate, usual: Callable[[str, str], float]) -> None:
        self._memory = memory
        self._annotate = annotate
        self._usual = usual

    async def sleep(self, process: EngineProcess, command: commands.SleepEngine) -> events.Event:
        """Let the engine finish its work, then make its sleep calls; memory that does not come free is a failure."""
        await finish_work(process)
        before = await self._memory.held(process)
        await self._annotate(process, state="falling_asleep", level=str(command.level))
        steps = process.engine.sleep(command.level, freeze=command.freeze)
        failure = await call_all(process, self._limited(process, command.level, "sleep", steps))
        if failure:
            return events.EngineSleepFailed(process.name, failure)
        after = await self._memory.settled(process, before)
        freed = {index: before[index] - after[index] for index in before if index in after}
        if process.self_managed:  # what it had is not what it may take, so what came back means nothing
            freed = {}
        if freed and max(before.values()) > TOLERANCE > max(freed.values()):
            held = ", ".join(f"{size >> 20} MiB on device {index}" for index, size in after.items())
            why = f"it says that it sleeps, but {RETURN_LIMIT:g} s later it still holds {held}"
            return events.EngineSleepFailed(process.name, why)
        await self._annotate(process, state="sleeping", level=str(command.level))
        return events.EngineAsleep(process.name, command.level, freed)

    async def wake(self, process: EngineProcess, level: int) -> events.Event:
        """Have the engine woken: its kind's calls, one after the other, within their limits."""
        await self._annotate(process, state="waking", level=str(level))
        failure = await call_all(process, self._limited(process, level, "wake", process.engine.wake(level)))
        if failure:
            return events.EngineWakeFailed(process.name, failure)
        await self._annotate(process, state="ready", level="0")
        return events.EngineAwake(process.name)

    def _limited(self, process: EngineProcess, level: int, what: str, steps: Iterable[Call]) -> list[Call]:
        """The calls, with a limit where it is known how long they usually take: one that hangs holds up its device."""
        usual = self._usual(process.name, f"{what}{level}")
        limit = max(SHORTEST_LIMIT, MANY_TIMES * usual) if usual else math.inf
        return [replace(step, timeout=min(step.timeout, limit)) for step in steps]

    async def prove_freeze(self, process: EngineProcess) -> events.Event:
        """The same greedy request twice, once with a sleep and a wake in its middle: the answers must be equal."""
        body = {"model": process.engine.served_name(process.model), "prompt": "Count: one, two, three,",
                "max_tokens": FREEZE_TOKENS, "temperature": 0, "ignore_eos": True}  # fmt: skip
        began = time.monotonic()
        undisturbed = await complete(process, body)
        frozen = asyncio.ensure_future(complete(process, body))
        await asyncio.wait({frozen}, timeout=(time.monotonic() - began) / 2)  # into the middle of its answer
        amid = not frozen.done()
        asleep = await call_all(process, process.engine.sleep(1, freeze=True))
        amid = amid and not frozen.done()
        failure = asleep or await call_all(process, process.engine.wake(1))
        answer = None if failure else await frozen
        survived = amid and answer is not None and answer == undisturbed
        log.info(
            "%s: a frozen request %s",
            process.name,
            "survived" if survived else "did not survive",
            extra=log_fields(process),
        )
        return events.FreezeProved(process.name, survived)


async def finish_work(process: EngineProcess) -> None:
    """Wait until the engine has finished work that no open request shows, at most for the model's drain limit."""
    probe, limit = process.engine.busy(), process.model.drain_limit
    until = None if limit is None else time.monotonic() + limit
    # The queue is the engine's own, so no event tells when it is empty.
    while probe and await is_busy(process, probe) and (until is None or time.monotonic() < until):  # noqa: ASYNC110
        await asyncio.sleep(BUSY_POLL)
