"""Whether an engine that is loaded still serves: found out from its requests, and by looking at it now and then.

A process can live and be of no use: its socket is gone, its core is dead behind a
server that answers, it was stopped by a signal, it answers everything with 500. Its
exit would be told; this nobody tells. So a request that failed brings a look at
once, and one that nothing is heard of is looked at every ``LOOK`` seconds. What
stays wrong for as long as its kind of failure deserves is killed, and the core
hears of a crash. Where we have no file descriptor to ask it with, it is not at fault.

An engine that does its work is busy, not dead: a look that it does not answer in
time counts only together with others over half a minute, and not at all if a
request was answered meanwhile. Errors that it answers count only if it answers
nothing else, and gives one to a question of our own as well: what clients ask may
be wrong.
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

LOOK, LOOK_AGAIN = 20.0, 1.0  # seconds between looks at one that nothing is heard of, and at one in doubt
PATIENCE = 10.0  # seconds that a look waits for an answer
# Seconds that nobody may be listening, that it may answer wrongly, that it may not answer.
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
