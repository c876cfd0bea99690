"""What any client may read: the model list and whether we are well."""

from __future__ import annotations

import time
from typing import Any

import vllmd
from vllmd.admin.control import Control
from vllmd.errors import UnknownModel
from vllmd.proxy.http import Request, Response, json_response

_STARTED = int(time.time())


class ModelEndpoints:
    """``/v1/models``, ``/health`` and ``/version``."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def list(self, request: Request) -> Response:
        """``GET /v1/models``: every configured model, loaded or not, as OpenAI lists them."""
        return json_response({"object": "list", "data": [_card(model) for model in self._control.models()]})

    async def one(self, request: Request) -> Response:
        """``GET /v1/models/{id}``. Raises UnknownModel."""
        name = self._control.resolve(request.params["model"])
        for model in self._control.models():
            if model["id"] == name:
                return json_response(_card(model))
        raise UnknownModel(f"model {name!r} does not exist", param="model")

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 with ``status: ok``, or 503 with what is wrong."""
        health = self._control.health()
        return json_response(health, 200 if health["status"] == "ok" else 503)

    async def live(self, request: Request) -> Response:
        """``GET /health/live``: 200 as long as the daemon answers at all."""
        return json_response({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": vllmd.__version__})


def _card(model: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's model object, and our fields beside its own."""
    return {"id": model["id"], "object": "model", "created": _STARTED, "owned_by": "vllmd",
            **{key: value for key, value in model.items() if key != "id"}}  # fmt: skip
