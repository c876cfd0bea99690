"""Loading adapters into engines that run, each once for as long as its engine lives.

Several requests that want the same adapter wait for one load. What an engine has is kept beside its process, so a
restart forgets it; an engine that was adopted from an earlier daemon answers that it has the adapter already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vllmd.daemon.calls import call
from vllmd.daemon.engine_process import EngineProcess, log_fields
from vllmd.engines.adapters import LOADED_ALREADY
from vllmd.engines.base import Call
from vllmd.errors import EngineFailed

log = logging.getLogger("vllmd.engines")


async def provide(process: EngineProcess, name: str, waits: Callable[[], None], load: Call | None = None) -> None:
    """Have the engine load the adapter called ``name``, unless it has it; ``waits`` is called if that takes its time.

    ``load``: the call, for an adapter that is not of the configuration. Raises EngineFailed.
    """
    loading = process.adapters.get(name)
    if loading is None:
        loading = process.adapters[name] = asyncio.ensure_future(_load(process, name, load))
    if not loading.done():
        waits()
    failure = await asyncio.shield(loading)  # a client that leaves must not cancel a load that others wait for
    if failure:
        if process.adapters.get(name) is loading:  # the next request tries again
            del process.adapters[name]
        raise EngineFailed(f"the adapter {name!r} of {process.name} cannot be loaded: {failure}")


async def _load(process: EngineProcess, name: str, load: Call | None) -> str:
    """Make the load call; returns what went wrong, "" if the adapter is loaded."""
    if load is None:
        adapter = process.engine.adapters(process.model).get(name)
        if adapter is None or adapter.load is None:
            return ""
        load = adapter.load
    failure = await call(process, load)
    if not failure or LOADED_ALREADY in failure:
        log.info("%s: its adapter %s is loaded", process.name, name, extra=log_fields(process))
        return ""
    log.warning("%s: its adapter %s cannot be loaded: %s", process.name, name, failure, extra=log_fields(process))
    return failure
