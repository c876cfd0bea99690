"""Probes to all engines of a model at the same time, for an operator who wants to know which one is fastest."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from vllmd.api.answers import Probed, ProbedReplica
from vllmd.config.types import ReplicaConfig
from vllmd.core import events
from vllmd.core.types import State
from vllmd.daemon.calls import timed_probe
from vllmd.daemon.serializers import state_of
from vllmd.errors import Conflict
from vllmd.frozen import frozen
from vllmd.proxy.upstream import OutOfFiles

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.daemon.engine_process import EngineProcess

_numbers = itertools.count(1)


@frozen
class Outcome:
    """The result of one probe: its seconds, or None and why; ``abandoned``: a faster engine had answered before."""

    seconds: float | None
    message: str
    abandoned: bool = False


async def probe(back: BackEnd, model: str, limit: float | None, *, everybody: bool) -> Probed:
    """Probe every engine of the model that serves, and rank them. Without ``everybody`` the first answer ends it.

    Raises Conflict where no engine serves.
    """
    # 1. The engines that serve.
    views = back.replicas_of(model)
    processes = [back.engines.processes[view.id] for view in views if view.state is State.READY]
    if not processes:
        state = state_of(views[0]) if views else "gone"
        raise Conflict(f"{model} does not serve now ({state}), and a probe loads nothing")
    # 2. Their probes, which begin together: an engine that has not answered when another one has is slower.
    rules = processes[0].model.replicas or ReplicaConfig()
    asking = [asyncio.ensure_future(_ask(back, process, limit or rules.probe_limit)) for process in processes]
    waiting, answered = set(asking), False
    try:
        while waiting and (everybody or not answered):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answered = answered or any(each.result().seconds is not None for each in done)
        outcomes = [each.result() if each.done() else None for each in asking]
    finally:
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    # 3. The ranking: the fastest first, then those that were slower, then those that failed.
    best = min((each.seconds for each in outcomes if each and each.seconds is not None), default=0.0)
    slower = Outcome(None, f"slower than {best:.3f} s", abandoned=True)
    ranked = sorted(
        zip(processes, (each or slower for each in outcomes), strict=True),
        key=lambda pair: (pair[1].seconds is None, not pair[1].abandoned, pair[1].seconds or 0.0),
    )
    lines = tuple(ProbedReplica(process.name, each.seconds, each.message) for process, each in ranked)
    return Probed(model, lines[0].name if lines[0].seconds is not None else None, lines)


async def _ask(back: BackEnd, process: EngineProcess, limit: float) -> Outcome:
    """Send one probe, which the core counts as a request of that replica."""
    request = f"operator-{next(_numbers)}"
    try:
        await back.asked(events.ProbeAsked(request, process.name))
    except Conflict as refusal:  # the replica has left meanwhile
        return Outcome(None, refusal.message)
    seconds, why = None, "abandoned"
    try:
        seconds, why = await timed_probe(process, limit)
    except OutOfFiles as error:
        why = error.message
    finally:
        back.post(events.ReplicaProbed(request, seconds, why))
    return Outcome(seconds, why)
