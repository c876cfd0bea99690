"""Endpoints for every client: the list of models, health, the version."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import vllmd
from vllmd.admin.control import Control
from vllmd.admin.responses import json
from vllmd.api.answers import Alive, Card, Health, Model, ModelList, Version
from vllmd.api.codec import fields, plain
from vllmd.errors import Forbidden, UnknownModel
from vllmd.proxy.http import MEMBERS_PER_TURN, Request, Response, list_response, text_response

STARTED = int(time.time())
SINCE = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(STARTED))  # RFC 3339, as Anthropic has it


class ModelEndpoints:
    """``/v1/models``, ``/health`` and ``/version``. A caller is shown the models that it may use, and no others."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def every(self, request: Request) -> Response:
        """``GET /v1/models``: every model that the key may use and that is not hidden, then their aliases.

        Adapters, variants and pools are entries, too; ``parent`` is the model that they belong to. An alias is an entry
        of its own whose ``root`` is the model, as vLLM lists several served names, so that clients which offer a choice
        offer the alias. The list is one page, as Anthropic has them.
        """
        models = [model for model in await self._models(request) if not model.hidden]
        aliases = ((model, alias) for model in models for alias in model.aliases)
        named = [*((model, model.id) for model in models), *aliases]
        first, last = (named[0][1], named[-1][1]) if named else (None, None)
        # Codex wants descriptions of its own models, prompts and all, under ``models``; with none it has its defaults.
        codex = () if "client_version" in request.query else None
        whole = fields(ModelList(data=(), first_id=first, last_id=last, models=codex))
        return await list_response({**whole, "data": named}, "data", plain, lambda each: _card(*each))

    async def one(self, request: Request) -> Response:
        """``GET /v1/models/{id}``, by its name, an alias, or its end. Raises UnknownModel."""
        given = request.params["model"]
        with contextlib.suppress(Forbidden):  # a model that the key may not use does not exist for it
            name = self._control.status.called(given, request.caller)
            model = await self._control.status.model(name)
            if model is not None and request.caller.may_use(name):
                return json(_card(model, given if given in model.aliases else name))
        raise UnknownModel(f"model {given!r} does not exist; GET /v1/models lists those that do", param="model")

    async def settings(self, request: Request) -> Response:
        """``GET /admin/config``: the settings in force with their origins; with ``?model=`` those of that model."""
        name = request.query.get("model", "")
        model = self._control.status.resolve(name, request.caller) if name else ""
        lines = list[str]()
        for line in self._control.status.settings(model):
            lines.append(line)
            if len(lines) % MEMBERS_PER_TURN == 0:
                await asyncio.sleep(0)
        return text_response("".join(lines))

    async def _models(self, request: Request) -> list[Card]:
        return [model for model in await self._control.status.models() if request.caller.may_use(model.id)]

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 with ``status: ok``, or 503 and what is wrong."""
        health = await self._health(request)
        return json(health, 200 if health.status == "ok" else 503)

    async def ready(self, request: Request) -> Response:
        """``GET /health/ready``: 200 once requests need not wait for devices and engines to be found."""
        health = await self._health(request)
        return json(health, 200 if health.ready else 503)

    async def _health(self, request: Request) -> Health:
        health, may_use = await self._control.status.health(), request.caller.may_use
        states = {model: state for model, state in health.model_status.items() if may_use(model)}
        return replace(health, loaded_models=tuple(filter(may_use, health.loaded_models)), model_status=states)

    async def live(self, request: Request) -> Response:
        """``GET /health/live``: 200 as long as the daemon answers at all."""
        return json(Alive())

    async def version(self, request: Request) -> Response:
        """``GET /version``: the version of vllmd, for anybody."""
        return json(Version(vllmd.__version__))


def _card(model: Card, name: str) -> Model:
    """The entry of a model under one of its names."""
    return Model(**{**vars(model), "id": name}, created=STARTED, created_at=SINCE)
