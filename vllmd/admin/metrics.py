"""``/metrics``: our own for Prometheus, and the engines' with a label that says whose they are."""

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
        """``GET /metrics``; ``?model=`` the metrics of that model's engine instead."""
        name = request.query.get("model", "")
        if name:
            if READ not in request.caller.scopes:
                authorise(request.caller, MODELS, Reach.ONE)  # its engine is asked
            model = self._control.status.resolve(name, request.caller)
            return _text(merged([(model, (await self._control.status.scrape(model)).decode("utf-8", "replace"))]))
        # The client library is a room that only whoever scrapes has to enter.
        exposition = await asyncio.to_thread(importlib.import_module, "vllmd.admin.exposition")
        accept, gauges = request.headers.get("accept"), await self._control.status.gauges()
        records = self._control.records
        gauges = replace(gauges, use_written=not records.trouble, traced=records.traced())
        work = exposition.expose_in_turns(self._control.counters, gauges, accept, request.caller)
        body, content_type = await in_turns(work)
        return Response(200, body, content_type)

    async def engines(self, request: Request) -> Response:
        """``GET /metrics/engines``: those of every loaded engine, labelled with its model, or its replica's name."""
        models = (await self._control.status.status(request.caller)).models
        lines = [each for line in models for each in line.replicas or (line,)]
        loaded = [line.name for line in lines if line.state not in UNLOADED]
        texts = await asyncio.gather(*(self._scraped(model) for model in loaded))
        return _text(merged(zip(loaded, texts, strict=True)))

    async def _scraped(self, model: str) -> str:
        """One engine's metrics; "" where the engine does not answer, so that the others are still shown."""
        try:
            return (await self._control.status.scrape(model)).decode("utf-8", "replace")
        except (Conflict, UpstreamFailed):
            return ""


def _text(text: str) -> Response:
    return Response(200, text.encode(), TEXT)
