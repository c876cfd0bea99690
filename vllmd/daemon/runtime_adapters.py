"""Adapters that an operator loads and unloads while a model serves, in the words of vLLM's own API.

vLLM keeps such an adapter for as long as its process lives. Here it belongs to the model: it is listed, permitted and
counted like one of the configuration, and an engine that is started again, or another replica, loads it at the first
request for it. It is gone when it is unloaded, when a reload takes the model or its leave away, and with the daemon.

What an adapter's path names is read, or fetched, by the engine as its own user. So a model must have
``runtime_adapters``, the key the scope admin, and the path is what ``vllmctl add`` takes as well: an absolute path of
this machine or a repository (``store.is_source``).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vllmd.api.json_types import ForeignJson
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.calls import ask
from vllmd.daemon.current import Current, Later
from vllmd.daemon.engine_process import EngineProcess, log_fields
from vllmd.daemon.store import is_source
from vllmd.engines.base import Call, Listen
from vllmd.errors import BadRequest, Conflict, Forbidden, NotFound, TooManyRequests, UnknownModel, VllmdError
from vllmd.proxy.access import Caller
from vllmd.proxy.http import Response
from vllmd.proxy.peek import model_name

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd.engines")

MOST = 1000  # of one model: a program in a loop must not fill the memory
UNLOAD_LIMIT = 60.0  # seconds
RIGHT = "right are an absolute path without ~, and a repository as ORG/NAME"
OURS = frozenset({"model"})  # members of the request that an engine does not know


class RuntimeAdapters:
    """Implements ``vllmd.admin.adapters.RuntimeAdapters``."""

    def __init__(self, current: Current, gate: AdmissionGate, back: Later[BackEnd]) -> None:
        self._current, self._gate, self._back = current, gate, back
        self._changing: dict[str, asyncio.Lock] = {}  # by model: its engine's adapters and the offers change together
        self._loading: set[str] = set()  # names of adapters

    async def load(self, members: ForeignJson, caller: Caller) -> Response:
        """Have the model's engine load an adapter, and offer it once the engine has it; the answer is the engine's.

        Raises VllmdError for a request that is not passed on to the engine.
        """
        name, path = _text(members, "lora_name"), _text(members, "lora_path")
        model = self._model(members, caller)
        if not is_source(path):
            raise Forbidden(f"an adapter from {path!r} is not loaded: {RIGHT}", param="lora_path")
        body = {key: value for key, value in members.items() if key not in OURS}
        async with self._changing.setdefault(model, asyncio.Lock()):
            offered = self._gate.runtime_adapters(model)
            if name not in offered:
                # Requests for something else of this name would be answered by the adapter.
                if self._gate.has(name) or name in self._loading or self._means_others(name, caller):
                    raise Conflict(f"{name!r} is the name of something else that is served here", param="lora_name")
                if len(offered) >= MOST:
                    raise TooManyRequests(f"{model} has {MOST} such adapters; unload those that are not needed")
            elif body.get("load_inplace") is not True:
                raise BadRequest(f"the adapter {name!r} has already been loaded", param="lora_name")
            self._loading.add(name)
            try:
                return await self._loaded(model, name, path, body, caller)
            finally:
                self._loading.discard(name)

    async def _loaded(self, model: str, name: str, path: str, body: ForeignJson, caller: Caller) -> Response:
        """The engine's answer, once it is awake; if it has the adapter then, that is offered."""
        permit = await self._gate.acquire(model, caller.name)
        try:
            answer = await self._asked(permit.upstream, body)
            if answer.status == 200:
                await self._take(model, permit.replica, name, path)
        finally:
            permit.release()
        return answer

    async def unload(self, members: ForeignJson, caller: Caller) -> Response:
        """Offer an adapter no more, and have the engines that have it drop it. Raises NotFound, Conflict, Forbidden."""
        name = _text(members, "lora_name")
        offer = self._gate.offers.get(name)
        model = offer.model if offer is not None and offer.is_adapter else ""
        if not model or not caller.may_use(model):
            raise NotFound(f"the adapter {name!r} cannot be found")
        async with self._changing.setdefault(model, asyncio.Lock()):
            adapters = self._gate.runtime_adapters(model)
            if name not in adapters:
                raise Conflict(f"{name!r} is an adapter of the configuration: remove it there, and reload")
            self._gate.offer_adapters(model, {key: path for key, path in adapters.items() if key != name})
            body = {key: value for key, value in members.items() if key not in OURS}
            for process in await self._processes(model):
                await _drop(process, name, body)
        return Response(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), "text/plain")

    async def _asked(self, listen: Listen, body: ForeignJson) -> Response:
        """The engine's answer to the load. An adapter that it has by an earlier daemon is loaded anew."""
        from vllmd.engines.adapters import LOAD_LIMIT, LOADED_ALREADY  # no client waits for this import

        call = Call("POST", "/v1/load_lora_adapter", dict(body), timeout=LOAD_LIMIT)
        status, fields, answer = await ask(listen, call)
        if status == 400 and LOADED_ALREADY.encode() in answer:
            status, fields, answer = await ask(listen, replace(call, json={**body, "load_inplace": True}))
        kind = next((value.decode("latin-1") for key, value in fields if key == b"content-type"), "text/plain")
        return Response(status, answer, kind)

    async def _take(self, model: str, replica: str, name: str, path: str) -> None:
        """Offer an adapter that the engine has now; every other replica loads it at its next request for it."""
        self._gate.offer_adapters(model, {**self._gate.runtime_adapters(model), name: path})
        for process in await self._processes(model):
            process.adapters.pop(name, None)
            if process.name == replica:
                process.adapters[name] = asyncio.ensure_future(_well())

    async def _processes(self, model: str) -> list[EngineProcess]:
        processes = (await self._back.wait()).engines.processes
        return [process for process in processes.values() if (process.model.replica_of or process.model.name) == model]

    def _model(self, members: ForeignJson, caller: Caller) -> str:
        """The model that an adapter is for: named, or the only one that takes any."""
        models = self._current.config.models.items()
        may = [name for name, model in models if model.runtime_adapters and caller.may_use(name)]
        name = model_name(members.get("model"))
        if not name:
            if not may:
                raise Forbidden("no model loads adapters while it runs: runtime_adapters is the setting that lets it")
            if len(may) > 1:
                raise BadRequest(f"say in model which it is for: {' or '.join(map(repr, may[:3]))}", param="model")
            return may[0]
        target = self._gate.resolve(name, caller)
        caller.check(target.permit_name, name)
        if target.model not in may or target.offer:
            what = "the model's setting runtime_adapters lets it; adapters of the configuration are in adapters"
            raise Forbidden(f"{target.permit_name!r} loads no adapters while it runs: {what}", param="model")
        return target.model

    def _means_others(self, name: str, caller: Caller) -> bool:
        """Whether clients reach by this name something that an operator of some models has no say in.

        By the guesses of ``api.names``, or because a request for it has a repository fetched (``pull.on_request``):
        then the adapter would answer requests for that.
        """
        if caller.models is None:
            return False
        if self._gate.would_fetch(name):
            return True
        try:
            called = self._gate.called(name)
        except UnknownModel:
            return False
        except VllmdError:  # several things
            return True
        return not caller.may_use(self._gate.base_of(called))


async def _well() -> str:
    """The result of a load that is over: nothing went wrong."""
    return ""


async def _drop(process: EngineProcess, name: str, body: ForeignJson) -> None:
    """Have the engine drop an adapter that it has. A sleeping engine keeps it, and no client can ask for it."""
    if process.adapters.pop(name, None) is None or process.asleep or process.ending or process.exited.is_set():
        return
    try:
        await ask(process.listen, Call("POST", "/v1/unload_lora_adapter", dict(body), timeout=UNLOAD_LIMIT))
    except (OSError, VllmdError) as error:
        log.warning("%s: its adapter %s is not unloaded: %s", process.name, name, error, extra=log_fields(process))


def _text(members: ForeignJson, name: str) -> str:
    """A member that must be there. Raises BadRequest."""
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} is missing: a text", param=name)
    return model_name(value)
