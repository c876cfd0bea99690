"""vLLM's two routes by which an operator loads and unloads LoRA adapters while a model serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vllmd.admin.schemas import doc, streams, takes_object
from vllmd.api.json_types import ForeignJson
from vllmd.errors import BadRequest
from vllmd.proxy.access import ADMIN, Caller
from vllmd.proxy.http import Request, Response
from vllmd.proxy.routing import LocalHandler, Router

TEXT = {"type": "string"}
MODEL = {"type": "string", "description": "which it is for, where several models load adapters"}
ADDED = {"lora_name": TEXT, "lora_path": TEXT, "load_inplace": {"type": "boolean"}, "model": MODEL}
SAID = streams("text/plain", "what was done, in words")


class RuntimeAdapters(Protocol):
    """The daemon's adapters that are loaded while a model serves."""

    async def load(self, asked: ForeignJson, caller: Caller) -> Response:
        """Load an adapter into an engine and offer it. Returns the engine's answer. Raises VllmdError."""

    async def unload(self, asked: ForeignJson, caller: Caller) -> Response:
        """Stop offering an adapter. Raises NotFound, Conflict, BadRequest."""


class AdapterEndpoints:
    """The handlers of the two routes. The router has checked the caller's scope."""

    def __init__(self, adapters: RuntimeAdapters) -> None:
        self._adapters = adapters

    async def load(self, request: Request) -> Response:
        """``POST /v1/load_lora_adapter``: the engine's answer, or our refusal. Raises VllmdError."""
        return await self._adapters.load(_members(request), request.caller)

    async def unload(self, request: Request) -> Response:
        """``POST /v1/unload_lora_adapter``: 200 once the adapter is not offered any more. Raises VllmdError."""
        return await self._adapters.unload(_members(request), request.caller)


def _members(request: Request) -> ForeignJson:
    members = request.json()
    if not isinstance(members, dict):
        raise BadRequest("the body must be a JSON object with lora_name, and lora_path to load one")
    return members


def add_adapters(router: Router, adapters: RuntimeAdapters, audited: Callable[[LocalHandler], LocalHandler]) -> None:
    """Add the rows of the two routes to the route table."""
    ends = AdapterEndpoints(adapters)
    for path, handler, members, about in (
        ("/v1/load_lora_adapter", ends.load, ADDED, "Load an adapter into a model that has runtime_adapters"),
        ("/v1/unload_lora_adapter", ends.unload, {"lora_name": TEXT}, "Unload such an adapter"),
    ):
        body = takes_object({"type": "object", "properties": members})
        router.add("POST", path, audited(handler), ADMIN, about, doc(SAID, body))
