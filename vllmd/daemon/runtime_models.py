"""Models that programs bring along at run time, kept in memory only."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from vllmd.api.answers import Known
from vllmd.config.runtime_model import runtime_model
from vllmd.config.types import Config, ModelConfig
from vllmd.daemon.current import ApplyConfiguration, Current, Later
from vllmd.errors import Conflict, TooManyRequests, UnknownModel

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

MOST = 256  # guests at a time: a program in a loop must not fill the memory
ABOUT_OURSELVES = frozenset({"where", "start_timeout"})  # what two programs may want otherwise and still share


class RuntimeModels:
    """Implements ``vllmd.admin.runtime_models.RuntimeModels``: models of the configuration that no file has."""

    def __init__(
        self,
        current: Current,
        back: Later[BackEnd],
        take: ApplyConfiguration,
        changing: asyncio.Lock,
        plain: Callable[[ModelConfig], ModelConfig],
        listen: tuple[str, ...],
    ) -> None:
        """``plain`` takes from a model what ``Instances`` added. ``listen``: where clients reach us over TCP."""
        self._current = current
        self._back = back
        self._apply_configuration = take
        self._changing = changing
        self._plain = plain
        self._listen = listen
        self._models: dict[str, ModelConfig] = {}

    def added_to(self, config: Config) -> Config:
        """``config`` with the run-time models; those that it names itself by now are dropped."""
        self._models = {name: model for name, model in self._models.items() if name not in config.models}
        return replace(config, models={**config.models, **self._models}) if self._models else config

    async def put(self, name: str, settings: Mapping[str, object], *, trusted: bool) -> Known:
        """Add a model, unless it is there. The answer says which of its settings differ from these.

        Raises BadRequest.
        """
        await self._back.wait()
        async with self._changing:
            config = self._current.config
            aliased = (model for model in config.models.values() if name in model.aliases)
            known = config.models.get(name) or next(aliased, None)
            name = known.name if known else name
            wanted = runtime_model(name, settings, self._without(name), trusted=trusted)
            differs = _differences(self._plain(known), wanted) if known else []
            if known is None or (differs and name in self._models):
                with contextlib.suppress(Conflict):  # the model is in use, and stays as it is
                    if name not in self._models and len(self._models) >= MOST:
                        what = f"{MOST} models were put already; DELETE /admin/guests/NAME those that are not needed"
                        raise TooManyRequests(what)
                    models = {**self._current.config.models, name: wanted}
                    await self._apply_configuration(replace(config, models=models), frozenset({name}))
                    self._models[name] = wanted
                    known, differs = wanted, []
            assert known
            return Known(known.name, known.name not in self._models, tuple(differs), self._listen)

    async def drop(self, name: str) -> None:
        """Remove a run-time model. Raises UnknownModel, Conflict."""
        await self._back.wait()
        async with self._changing:
            if name in self._models:
                del self._models[name]
                await self._apply_configuration(self._without(name))
            elif name in self._current.config.models:
                raise Conflict(f"{name!r} is configured in a file: remove it there, and reload")
            else:
                raise UnknownModel(f"no model {name!r} was put", param="model")

    def _without(self, name: str) -> Config:
        """The configuration in force without one model."""
        config = self._current.config
        return replace(config, models={key: model for key, model in config.models.items() if key != name})


def addresses(listeners: Iterable[socket.socket]) -> tuple[str, ...]:
    """``host:port`` of each listener, as a client on this machine can use it."""
    found = []
    for listener in listeners:
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            host, port = listener.getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            found.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return tuple(found)


def _differences(known: ModelConfig, wanted: ModelConfig) -> list[str]:
    names = (each.name for each in fields(ModelConfig) if each.name not in ABOUT_OURSELVES)
    return [name for name in names if getattr(known, name) != getattr(wanted, name)]
