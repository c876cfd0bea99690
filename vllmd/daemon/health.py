"""Whether an engine that is loaded still serves: by the outcome of its requests, and by a liveness check now and then.

A process can live and serve nothing: its socket is gone, its core is dead behind a server that answers, a signal has
stopped it, it answers everything with 500. The launcher reports exits; of these cases nothing tells. So a request that
failed leads to a check at once, and an engine that has answered nothing for ``LOOK`` seconds is checked. An engine is
killed if what is wrong lasts for as long as its kind of failure is tolerated; the core then hears of a crash.

What is no fault of the engine. An engine that does its work may be too busy to answer: silence counts only over several
checks in half a minute, and not at all if a request was answered meanwhile. Errors count only if the engine answers
nothing else, and gives one to vllmd's own probe as well, for what clients ask may be wrong. And where vllmd itself has
no file descriptor to ask with, nothing is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from vllmd.daemon.calls import Liveness, check_liveness, timed_probe
from vllmd.daemon.engine_process import ERRORS, EngineProcess
from vllmd.proxy.upstream import OutOfFiles

log = logging.getLogger("vllmd.health")

LOOK, LOOK_AGAIN = 20.0, 1.0  # seconds without an answer until a check; between checks of an engine in doubt
PATIENCE = 10.0  # seconds that a check waits for an answer
# Seconds for which it is tolerated that no process listens, that checks get a wrong answer, that they get none.
REFUSED, WRONG, SILENT = 2.0, 10.0, 30.0


async def watch(process: EngineProcess, kill: Callable[[str], Awaitable[object]]) -> None:
    """Check an engine until it has ended; ``kill(why)`` is called once it serves no more."""
    health, wrong_since = process.health, 0.0
    while not process.exited.is_set():
        quiet = time.monotonic() - health.heard
        with contextlib.suppress(TimeoutError):
            next_look = LOOK_AGAIN if wrong_since else LOOK - quiet if quiet < LOOK else LOOK
            await asyncio.wait_for(health.doubt.wait(), next_look)
        doubted, began = health.doubt.is_set(), time.monotonic()
        health.doubt.clear()
        if process.task is not None or process.ending:  # the task that runs notices by itself
            wrong_since = 0.0
            continue
        if not doubted and not wrong_since and began - health.heard < LOOK:
            continue
        why, limit = await _look(process)
        if not why or health.heard >= began:
            wrong_since = 0.0
            continue
        if not wrong_since:
            wrong_since = began
            log.warning("%s: %s", process.name, why)
        lasted = time.monotonic() - wrong_since
        if lasted >= limit and process.task is None:
            await kill(f"it was of no use for {lasted:.0f} s and was killed: {why}")
            wrong_since = 0.0


async def _look(process: EngineProcess) -> tuple[str, float]:
    """What is wrong with the engine, "" if nothing is, and for how many seconds that is tolerated."""
    liveness, why = await check_liveness(process, PATIENCE)
    if liveness in (Liveness.REFUSED, Liveness.SILENT):
        return why, REFUSED if liveness is Liveness.REFUSED else SILENT
    if liveness is Liveness.UNKNOWN or process.asleep:  # a sleeper may answer what it likes
        return "", 0.0
    if liveness is Liveness.WRONG:
        return why, WRONG
    if process.health.errors >= ERRORS:
        try:
            seconds, failure = await timed_probe(process, PATIENCE)
        except OutOfFiles:
            return "", 0.0
        if seconds is None:
            return failure, WRONG
    process.health.errors = 0
    return "", 0.0
