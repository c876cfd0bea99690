"""The instances API under ``/api/v1``: GPUs, processes, and models as instances on GPUs.

An instance is an engine: that of a model with one engine, or one of its replicas. A start on a GPU takes the instance
that is there, else one that is not loaded, else adds one more, which lasts until it is stopped, or until a reload; a
model whose replicas are configured has those and no more. A start with a ``config`` makes an unknown model known, for
as long as the daemon lives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from vllmd.admin.control import Control
from vllmd.admin.models import STARTED
from vllmd.admin.responses import json
from vllmd.admin.verbs import into
from vllmd.api.answers import NO_ENGINE, Instance, ModelInstanceInfo, ModelLine, ModelStatusItem
from vllmd.api.kinds import Count, JsonObject, Text
from vllmd.api.verbs import FORCE_KILL, PID, Param
from vllmd.errors import BadRequest, Conflict, NotFound
from vllmd.frozen import frozen
from vllmd.proxy.access import ADMIN, Reach, authorise
from vllmd.proxy.http import Request, Response

NAME = Param("model_name", Text("the name of a model"), place="body")
KIND = Param("model_type", Text("a kind of engine"), place="body", default=None)
GPU = Param("gpu_id", Count(), place="body", default=None)
CONFIG = Param("config", JsonObject("an object with settings as in vllmd.yaml(5)"), place="body", default=None)
START, STOP, KILL = (NAME, KIND, GPU, CONFIG), (NAME, KIND, GPU), (PID, FORCE_KILL)


@frozen
class InstanceRequest:
    """The body of a start or a stop."""

    model_name: str
    model_type: str | None
    gpu_id: int | None
    config: Mapping[str, object] | None = None


class InstanceEndpoints:
    """``/api/v1/...``; the caller has been found to be an operator."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def gpus(self, request: Request) -> Response:
        """``GET /api/v1/gpus``: a list of ``GPUInfo``; 501 where no GPU can be read."""
        return json(await self._control.status.gpus())

    async def kill(self, request: Request) -> Response:
        """``DELETE /api/v1/processes/{pid}``: 403 for a process that is no engine's without ``?force=true``."""
        return json(await into(self._control.commands.kill, KILL, request))

    async def start(self, request: Request) -> Response:
        """``POST /api/v1/models/start``: 202 with the ``ModelInstanceInfo`` as it begins."""
        await self._control.status.opened()
        body = into(InstanceRequest, START, request)
        if body.config:  # 1. Make the model known with these settings, if it is not.
            authorise(request.caller, ADMIN, Reach.MACHINE)  # as PUT /admin/guests is
            kind = self._kind(body)
            settings = {"engine": kind, **body.config} if kind else body.config
            trusted = request.peer.uid in (0, os.getuid())
            known = await self._control.runtime_models.put(body.model_name, settings, trusted=trusted)
            if known.differs:
                where = "is configured" if known.configured else "is in use"
                what = f"{body.model_name} {where} with another {', '.join(known.differs)}"
                raise Conflict(what, param="config")
        # 2. Start it, on the GPU if one is named.
        name, gpu = self._resolved(request, body), body.gpu_id
        if gpu is None:
            await self._control.commands.load(name)
        chosen = name if gpu is None else await self._control.commands.load_on(name, gpu)
        return json(instance(self._control.status.line(name), self._control.status.line(chosen)), 202)

    async def stop(self, request: Request) -> Response:
        """``POST /api/v1/models/stop``: the ``ModelInstanceInfo`` once it has stopped, after its requests.

        With a ``gpu_id`` only the instance on that GPU is stopped; the last instance to stop takes the model along.
        """
        await self._control.status.opened()
        body = into(InstanceRequest, STOP, request)
        name, gpu = self._resolved(request, body), body.gpu_id
        line = self._control.status.line(name)
        if line.state == "stopped":
            raise NotFound(f"{name} is not running", param="model_name")
        present = [each for each in engines(line) if each.state != "stopped"]
        going = [each.name for each in present if gpu is None or is_on(each, gpu)]
        if not going:
            raise NotFound(f"{name} is not running on GPU {gpu}", param="gpu_id")
        await self._control.commands.unload(name, force=False, device=gpu)
        for each in going:
            async for _ in self._control.following.progress(each):
                pass
            await self._control.commands.drop_instance(each)
        return json(instance(self._control.status.line(line.replica_of or name)))

    async def status(self, request: Request) -> Response:
        """``GET /api/v1/models/status``: an item per instance, of all that are loaded or have failed."""
        await self._control.status.opened()
        lines = (await self._control.status.status(request.caller)).models
        return json([item for line in lines if line.state != "stopped" for item in items(line)])

    async def status_of(self, request: Request) -> Response:
        """``GET /api/v1/models/status/{name}``: the items of one model, stopped or not. Raises UnknownModel."""
        status = self._control.status
        await status.opened()
        return json(items(status.line(status.resolve(request.params["name"], request.caller))))

    def _resolved(self, request: Request, body: InstanceRequest) -> str:
        """The configured name of the body's model. Raises BadRequest where it is not of the body's type."""
        name = self._control.status.resolve(body.model_name, request.caller)
        engine, kind = self._control.status.line(name).config.engine or "", self._kind(body)
        if kind and kind != engine:
            raise BadRequest(f"{name} is of the type {engine!r}, not {kind!r}", param="model_type")
        return name

    def _kind(self, body: InstanceRequest) -> str:
        """The engine kind that the body names, "" without one. Raises BadRequest for an unknown one."""
        if body.model_type is None:
            return ""
        kind, types = body.model_type.lower(), self._control.status.types()
        if kind not in types:
            raise BadRequest(f"there is no type {kind!r}; there are {', '.join(types)}", param="model_type")
        return kind


def engines(line: ModelLine) -> Sequence[ModelLine]:
    """The lines of a model's replicas, or its own."""
    return line.replicas or (line,)


def is_on(line: ModelLine, gpu: int) -> bool:
    """Whether the instance is on the GPU; one without any, which failed or is yet to get one, counts as there."""
    return gpu in line.devices or not line.devices


def instance(line: ModelLine, one: ModelLine | None = None) -> ModelInstanceInfo:
    """A model, from its line of the status; with the state of ``one`` of its instances."""
    loaded = [each for each in engines(line) if each.state not in NO_ENGINE]
    gpus = sorted({gpu for each in loaded for gpu in each.devices})
    shown = one if one and not one.replicas else next(iter(loaded), engines(line)[0])
    common = vars(_common(line, shown))
    return ModelInstanceInfo(**common, active_gpu_ids=tuple(gpus), total_instances=len(loaded))


def items(line: ModelLine) -> list[ModelStatusItem]:
    """An item for each instance that is loaded or has failed, else one for the model; each names its first GPU."""
    present = [each for each in engines(line) if each.state != "stopped"] or engines(line)[:1]
    return [ModelStatusItem(**vars(_common(line, each)), gpu_id=next(iter(each.devices), None)) for each in present]


def _common(model: ModelLine, line: ModelLine) -> Instance:
    """The fields of an instance that both answers have; every instance bears the model's name."""
    _, _, port = line.socket.rpartition(":")
    return Instance(
        model_name=model.name,
        model_type=line.config.engine or "",
        status=line.state.upper(),
        pid=line.pid,
        port=int(port) if port.isdecimal() and not line.socket.startswith("/") else None,
        created_at=_moment(line.started_at) if line.started_at else None,
        updated_at=_moment(line.changed_at or STARTED),
        message=line.failure or line.never,
    )


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
