"""Run-time models, which programs add: they last as long as the daemon, and are written nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from vllmd.admin.responses import json
from vllmd.admin.schemas import answers, doc, takes_object
from vllmd.api.answers import Dropped, Known
from vllmd.errors import BadRequest
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import LocalHandler, Router

SETTINGS: dict[str, object] = {"type": "object", "description": "settings of one model, as in vllmd.yaml(5)"}


class RuntimeModels(Protocol):
    """The run-time models, as the daemon implements them."""

    async def put(self, name: str, settings: Mapping[str, object], *, trusted: bool) -> Known:
        """Add a run-time model. Raises BadRequest, TooManyRequests."""

    async def drop(self, name: str) -> None:
        """Drain, stop and remove a run-time model. Raises UnknownModel, Conflict for a configured one."""


class RuntimeModelEndpoints:
    """``/admin/guests/...``. The router has checked the caller's scope."""

    def __init__(self, runtime_models: RuntimeModels) -> None:
        self._models = runtime_models

    async def put(self, request: Request) -> Response:
        """``PUT /admin/guests/{model}`` with the settings of a model as in vllmd.yaml(5).

        A model of that name that is configured, or in use, stays as it is; ``differs`` names the settings that
        are not as requested. Settings that could run the caller's code are only for root and the daemon's own user.
        """
        settings = request.json() if request.body else {}
        if not isinstance(settings, dict):
            raise BadRequest("the body must be a JSON object with the settings of one model")
        trusted = request.peer.uid in (0, os.getuid())
        return json(await self._models.put(request.params["model"], settings, trusted=trusted))

    async def drop(self, request: Request) -> Response:
        """``DELETE /admin/guests/{model}``: forget such a model. Raises UnknownModel, Conflict."""
        await self._models.drop(request.params["model"])
        return json(Dropped(request.params["model"]))


def add_runtime_models(
    router: Router, runtime_models: RuntimeModels, audited: Callable[[LocalHandler], LocalHandler]
) -> None:
    """Add the rows of run-time models to the route table."""
    endpoints, add = RuntimeModelEndpoints(runtime_models), router.add
    add("PUT", "/admin/guests/{model:path}", audited(endpoints.put), "admin", "Make a model known until vllmd ends",
        doc(answers(Known), takes_object(SETTINGS)), Reach.MACHINE)  # fmt: skip
    add("DELETE", "/admin/guests/{model:path}", audited(endpoints.drop), "admin", "Forget such a model",
        answers(Dropped), Reach.MACHINE)  # fmt: skip
