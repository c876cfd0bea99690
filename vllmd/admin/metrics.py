"""``/metrics``: the daemon's own metrics for Prometheus, and the engines' own with the label ``model``."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import replace

from vllmd.admin.control import Control
from vllmd.admin.relabel import merged
from vllmd.core.types import State
from vllmd.errors import Conflict, UpstreamFailed
from vllmd.proxy.access import MODELS, READ, Reach, authorise
from vllmd.proxy.http import Request, Response
from vllmd.proxy.large import in_turns

TEXT = "text/plain; version=0.0.4; charset=utf-8"
UNLOADED = frozenset(state.value for state in (State.STOPPED, State.STARTING, State.STOPPING, State.FAILED))


class MetricsEndpoints:
    """The handlers of ``/metrics`` and ``/metrics/engines``."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def own(self, request: Request) -> Response:
        """``GET /metrics``: the daemon's; with ``?model=`` those of that model's engine instead."""
        name = request.query.get("model", "")
        if name:
            if READ not in request.caller.scopes:
                authorise(request.caller, MODELS, Reach.ONE)  # a request to its engine, as any other
            model = self._control.status.resolve(name, request.caller)
            return _text(merged([(model, (await self._control.status.scrape(model)).decode("utf-8", "replace"))]))
        # The metrics library takes a while to import: only a daemon that is scraped pays, and in a thread.
        exposition = await asyncio.to_thread(importlib.import_module, "vllmd.admin.exposition")
        accept, gauges = request.headers.get("accept"), await self._control.status.gauges()
        records = self._control.records
        gauges = replace(gauges, use_written=not records.trouble, traced=records.traced())
        work = exposition.expose_in_turns(self._control.counters, gauges, accept, request.caller)
        body, content_type = await in_turns(work)
        return Response(200, body, content_type)

    async def engines(self, request: Request) -> Response:
        """``GET /metrics/engines``: those of every loaded engine, labelled with its model's or replica's name."""

        async def scraped(model: str) -> str:
            try:
                return (await self._control.status.scrape(model)).decode("utf-8", "replace")
            except (Conflict, UpstreamFailed):  # the others are shown all the same
                return ""

        models = (await self._control.status.status(request.caller)).models
        lines = [each for line in models for each in line.replicas or (line,)]
        loaded = [line.name for line in lines if line.state not in UNLOADED]
        texts = await asyncio.gather(*map(scraped, loaded))
        return _text(merged(zip(loaded, texts, strict=True)))


def _text(text: str) -> Response:
    return Response(200, text.encode(), TEXT)
