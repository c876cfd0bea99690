"""What any client may read: the model list and whether we are well."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import vllmd
from vllmd.admin.control import Control
from vllmd.errors import Forbidden, UnknownModel
from vllmd.proxy.http import Request, Response, json_response, list_response, text_response

KINSHIP = ("parent", "root")
_STARTED = int(time.time())
_SINCE = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED))  # RFC 3339, as Anthropic has it


class ModelEndpoints:
    """``/v1/models``, ``/health`` and ``/version``. A caller is shown the models that it may use, and no others."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def every(self, request: Request) -> Response:
        """``GET /v1/models``: what the key may use and is not hidden, loaded or not, then their aliases.

        An adapter, a variant and a pool are entries, too; ``parent`` is the model that they belong to.
        As vLLM lists several served names: an alias is an entry of its own whose
        ``root`` is the model, so that clients which offer a choice offer it, too. The list is one page, as Anthropic
        has them.
        """
        models = [model for model in await self._models(request) if not model["hidden"]]
        aliases = (_card(model, alias) for model in models for alias in model["aliases"])
        data = [*(_card(model, model["id"]) for model in models), *aliases]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        # Codex wants descriptions of its own models, prompts and all, under ``models``; with none it has its defaults.
        codex: dict[str, Any] = {"models": []} if "client_version" in request.query else {}
        return await list_response({"object": "list", "data": data, "has_more": False, **ends, **codex}, "data")

    async def one(self, request: Request) -> Response:
        """``GET /v1/models/{id}``, by its name, an alias, or its end. Raises UnknownModel."""
        asked = request.params["model"]
        with contextlib.suppress(Forbidden):  # what one may not use one need not know of
            name = self._control.status.called(asked, request.caller)
            for model in await self._models(request):
                if model["id"] == name:
                    return json_response(_card(model, asked if asked in model["aliases"] else name))
        raise UnknownModel(f"model {asked!r} does not exist; GET /v1/models lists those that do", param="model")

    async def settings(self, request: Request) -> Response:
        """``GET /admin/config``: what is in force, with the origin of each setting; ``?model=``: that model's part."""
        name = request.query.get("model", "")
        model = self._control.status.resolve(name, request.caller) if name else ""
        return text_response(self._control.status.settings(model), content_type="application/yaml")

    async def _models(self, request: Request) -> list[dict[str, Any]]:
        return [model for model in await self._control.status.models() if request.caller.may_use(model["id"])]

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 with ``status: ok``, or 503 with what is wrong."""
        health = self._health(request)
        return json_response(health, 200 if health["status"] == "ok" else 503)

    async def ready(self, request: Request) -> Response:
        """``GET /health/ready``: 200 once requests need not wait for devices and engines to be found."""
        health = self._health(request)
        return json_response(health, 200 if health["ready"] else 503)

    def _health(self, request: Request) -> dict[str, Any]:
        health, may_use = self._control.status.health(), request.caller.may_use
        states = {model: state for model, state in health["model_status"].items() if may_use(model)}
        return {**health, "loaded_models": list(filter(may_use, health["loaded_models"])), "model_status": states}

    async def live(self, request: Request) -> Response:
        """``GET /health/live``: 200 as long as the daemon answers at all."""
        return json_response({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": vllmd.__version__})


def _card(model: dict[str, Any], name: str) -> dict[str, Any]:
    """OpenAI's model object, and Anthropic's, under one of its names, and our fields beside its own."""
    own = {"id": name, "object": "model", "type": "model", "created": _STARTED, "created_at": _SINCE}
    kin = {"parent": None, "root": model["id"], **{key: model[key] for key in KINSHIP if key in model}}
    return {**model, **kin, **own, "owned_by": "vllmd"}
