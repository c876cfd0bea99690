"""A model's engines asked their probe all at the same time, because an operator wants to know who is fastest."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmd.api.answers import Probed, ProbedReplica
from vllmd.config.types import ReplicaConfig
from vllmd.core import events
from vllmd.core.types import State
from vllmd.daemon.calls import timed_probe
from vllmd.daemon.serializers import state_of
from vllmd.errors import Conflict
from vllmd.proxy.upstream import OutOfFiles

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.daemon.engine_process import EngineProcess

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one probe: its seconds, or None and why it has none; ``abandoned``: it was not waited for."""

    seconds: float | None
    message: str
    abandoned: bool = False


async def probe(back: BackEnd, model: str, limit: float | None, *, everybody: bool) -> Probed:
    """Every engine of the model that serves, fastest first; but for ``everybody`` none is waited for in vain.

    Raises Conflict where none of them serves.
    """
    processes = _serving(back, model)
    rules = processes[0].model.replicas or ReplicaConfig()
    asking = [asyncio.ensure_future(_ask(back, process, limit or rules.probe_limit)) for process in processes]
    try:
        await _raced(asking, everybody=everybody)
        found = _results(asking)
    finally:
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    ranked = sorted(zip(processes, found, strict=True), key=lambda pair: _rank(pair[1]))
    lines = tuple(ProbedReplica(process.name, each.seconds, each.message) for process, each in ranked)
    return Probed(model, lines[0].name if lines[0].seconds is not None else None, lines)


def _serving(back: BackEnd, model: str) -> list[EngineProcess]:
    known = back.replicas_of(model)
    processes = [back.engines.processes[view.id] for view in known if view.state is State.READY]
    if not processes:
        state = state_of(known[0]) if known else "gone"
        raise Conflict(f"{model} does not serve now ({state}), and a probe loads nothing")
    return processes


async def _ask(back: BackEnd, process: EngineProcess, limit: float) -> Outcome:
    """One probe, of which the core knows while it runs."""
    request = f"asked-{next(_numbers)}"
    try:
        await back.asked(events.ProbeAsked(request, process.name))
    except Conflict as refusal:  # it has left since it was looked for
        return Outcome(None, refusal.message)
    seconds, why = None, "abandoned"
    try:
        seconds, why = await timed_probe(process, limit)
    except OutOfFiles as error:
        why = error.message
    finally:
        back.post(events.ReplicaProbed(request, seconds, why))
    return Outcome(seconds, why)


async def _raced(asking: Sequence[asyncio.Task[Outcome]], *, everybody: bool) -> None:
    """Wait for all, or until one has answered: they began together, so whoever has not is slower than that one."""
    waiting = set(asking)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not everybody and any(each.result().seconds is not None for each in done):
            return


def _results(asking: Sequence[asyncio.Task[Outcome]]) -> list[Outcome]:
    done = [each.result() for each in asking if each.done()]
    best = min((each.seconds for each in done if each.seconds is not None), default=0.0)
    slower = Outcome(None, f"slower than {best:.3f} s", abandoned=True)
    return [each.result() if each.done() else slower for each in asking]


def _rank(each: Outcome) -> tuple[bool, bool, float]:
    """The fastest first, then who was only slower, then who failed."""
    return each.seconds is None, not each.abandoned, each.seconds or 0.0
