"""M's API under ``/api/v1``: GPUs, processes, and models as instances on GPUs.

A model has one engine here. It may be started on a GPU of the caller's choice;
one that runs elsewhere already is a conflict. A ``config`` of its own makes a
model known that is not, for as long as the daemon lives.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllmd.admin import asked
from vllmd.admin.control import Control
from vllmd.admin.operate import killed, process_id
from vllmd.errors import BadRequest, Conflict, NotFound
from vllmd.proxy.http import Request, Response, json_response

UNLOADED = frozenset({"stopped", "error"})


class InstanceEndpoints:
    """``/api/v1/...``; the caller has been found to be an operator."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def gpus(self, request: Request) -> Response:
        """``GET /api/v1/gpus``: a list of ``GPUInfo``; 501 where no GPU can be read."""
        return json_response(await self._control.gpus())

    async def kill(self, request: Request) -> Response:
        """``DELETE /api/v1/processes/{pid}``: 404 for none, 403 for a stranger's without ``?force=true``."""
        pid = process_id(request)
        return json_response(killed(pid, await self._control.kill(pid, force=asked.flag(request, "force"))))

    async def start(self, request: Request) -> Response:
        """``POST /api/v1/models/start``: 202 with the ``ModelInstanceInfo`` as it begins."""
        await self._control.opened()
        body = asked.fields(request, ["model_name", "model_type", "gpu_id", "config"])
        if body.get("config") not in (None, {}):
            await self._bring(request, body)
        name, gpu = self._named(body), asked.index(body, "gpu_id")
        line = self._control.line(name)
        if line["state"] in UNLOADED:
            await self._control.narrow(name, gpu)
        elif gpu is not None and gpu not in line["devices"]:
            on = ", ".join(map(str, line["devices"])) or "none"
            raise Conflict(f"{name} is {line['state']} on GPU {on}; stop it first", param="gpu_id")
        await self._control.load(name)
        return json_response(instance(self._control.line(name)), 202)

    async def stop(self, request: Request) -> Response:
        """``POST /api/v1/models/stop``: the ``ModelInstanceInfo`` once it has stopped, after its requests."""
        await self._control.opened()
        body = asked.fields(request, ["model_name", "model_type", "gpu_id"])
        name, gpu = self._named(body), asked.index(body, "gpu_id")
        line = self._control.line(name)
        if line["state"] == "stopped":
            raise NotFound(f"{name} is not running", param="model_name")
        if gpu is not None and line["devices"] and gpu not in line["devices"]:
            raise NotFound(f"{name} is not running on GPU {gpu}", param="gpu_id")
        await self._control.unload(name, force=False)
        async for _ in self._control.progress(name):
            pass
        await self._control.narrow(name, None)
        return json_response(instance(self._control.line(name)))

    async def status(self, request: Request) -> Response:
        """``GET /api/v1/models/status``: an item per instance, of all that are loaded or have failed."""
        await self._control.opened()
        lines = self._control.status()["models"]
        return json_response([item for line in lines if line["state"] != "stopped" for item in items(line)])

    async def status_of(self, request: Request) -> Response:
        """``GET /api/v1/models/status/{name}``: the items of one model, also if it is stopped. Raises UnknownModel."""
        await self._control.opened()
        return json_response(items(self._control.line(self._control.resolve(request.params["name"]))))

    async def _bring(self, request: Request, body: dict[str, Any]) -> None:
        """Make the model known with the settings of the body, if nobody knows it. Raises Conflict if they differ."""
        name, settings = asked.text(body, "model_name", "the name of a model"), body["config"]
        if not isinstance(settings, dict):
            raise BadRequest("config must be an object with settings as in vllmd.yaml(5), or null", param="config")
        if kind := self._kind(body):
            settings = {"engine": kind, **settings}
        known = await self._control.guests.put(name, settings, trusted=request.peer.uid in (0, os.getuid()))
        if known["differs"]:
            where = "is configured" if known["configured"] else "is in use"
            raise Conflict(f"{name} {where} with another {', '.join(known['differs'])}", param="config")

    def _named(self, body: dict[str, Any]) -> str:
        """The model that the body names, which is of the type that it names, if it does."""
        name = self._control.resolve(asked.text(body, "model_name", "the name of a model"))
        engine, kind = self._control.line(name)["config"].get("engine", ""), self._kind(body)
        if kind and kind != engine:
            raise BadRequest(f"{name} is of the type {engine!r}, not {kind!r}", param="model_type")
        return name

    def _kind(self, body: dict[str, Any]) -> str:
        """The type in the body, "" without one. Raises BadRequest for one that there is not."""
        if body.get("model_type") is None:
            return ""
        kind, types = asked.text(body, "model_type", "a kind of engine").lower(), self._control.types()
        if kind not in types:
            raise BadRequest(f"there is no type {kind!r}; there are {', '.join(types)}", param="model_type")
        return kind


def instance(line: dict[str, Any]) -> dict[str, Any]:
    """``ModelInstanceInfo``, from a line of the status."""
    loaded = line["state"] not in UNLOADED
    return {**_common(line), "active_gpu_ids": list(line["devices"]) if loaded else [], "total_instances": int(loaded)}


def items(line: dict[str, Any]) -> list[dict[str, Any]]:
    """``ModelStatusItem`` per engine: there is one; it names the first of its GPUs."""
    return [{**_common(line), "gpu_id": next(iter(line["devices"]), None)}]


def _common(line: dict[str, Any]) -> dict[str, Any]:
    _, _, port = line["socket"].rpartition(":")
    return {
        "model_name": line["name"],
        "model_type": line["config"].get("engine", ""),
        "status": line["state"].upper(),
        "pid": line["pid"],
        "port": int(port) if port.isdecimal() and not line["socket"].startswith("/") else None,
        "created_at": _moment(line["started_at"]) if line["started_at"] else None,
        "updated_at": _moment(time.time() - line["since"]),
        "message": line["failure"],
    }


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
