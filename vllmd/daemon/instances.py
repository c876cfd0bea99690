"""Where engines may be put, and further ones of a model, at run time, for the instances API. A reload forgets both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core import commands, events
from vllmd.daemon.current import ApplyConfiguration, Current, Later
from vllmd.errors import Conflict, VllmdError

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd


class Instances:
    """A model that has one engine becomes, with another, one of two replicas; the engine that runs is the first."""

    def __init__(
        self, current: Current, back: Later[BackEnd], take: ApplyConfiguration, changing: asyncio.Lock
    ) -> None:
        self._current = current
        self._back = back
        self._apply_configuration = take
        self._changing = changing
        self._adding: set[asyncio.Task[None]] = set()  # one more engine is being made
        self._made: dict[str, ReplicaConfig] = {}  # model -> its replicas, of those that have some by this class

    # -- where engines are put

    async def load_on(self, model: str, device: int) -> str:
        """Have one of its engines on that device; the core says which. Raises BadRequest, Conflict."""
        back = await self._back.wait()
        try:
            return (await back.asked(events.LoadAsked(self._current.model_of(model), device))).chosen
        except VllmdError as refusal:
            refusal.param = "gpu_id"
            raise

    # -- further ones

    def add(self, command: commands.AddReplica) -> None:
        """Give the model one more engine, on that device, for the core to load; or tell the core why there is none."""

        def done(task: asyncio.Task[None]) -> None:
            self._adding.discard(task)
            error = None if task.cancelled() else task.exception()
            if self._back.now is not None and (error or task.cancelled()):
                reason = error.message if isinstance(error, VllmdError) else "it could not be given one more engine"
                self._back.now.post(events.ReplicaRefused(command.model, command.device, reason))

        task = asyncio.ensure_future(self._add(command.model, command.device))
        self._adding.add(task)
        task.add_done_callback(done)

    async def _add(self, model: str, device: int) -> None:
        """Give the model one more engine, on this device. Raises Conflict where that cannot be."""
        async with self._changing:
            known = self._current.config.models.get(model)
            if known is None:
                raise Conflict(f"{model} is no longer configured")
            if known.replicas and not self._is_ours(known):
                there = f"all {len(known.replicas.of)} replicas of {model} are loaded"
                raise Conflict(f"{there}; replicas in vllmd.yaml(5) gives more")
            base = replace(known, replicas=None, aliases=(), replica_of=model)
            rules = known.replicas or ReplicaConfig(of=(replace(base, name=f"{model}@1"),))
            taken = {*self._current.config.models, *(one.name for one in rules.of)}
            name = next(name for n in itertools.count(2) if (name := f"{model}@{n}") not in taken)
            await self._take(known, replace(rules, of=(*rules.of, replace(base, name=name, devices=(device,)))))

    async def drop(self, name: str) -> None:
        """Remove an engine that was added at run time; a model's first one stays, and what a file has."""
        async with self._changing:
            for model, rules in list(self._made.items()):
                left = tuple(one for one in rules.of if one.name != name or one is rules.of[0])
                known = self._current.config.models.get(model)
                if known and self._is_ours(known) and len(left) < len(rules.of):
                    with contextlib.suppress(Conflict):  # a client or operator has it loaded again: it stays
                        fewer = replace(rules, of=left) if len(left) > 1 else None
                        await self._take(known, fewer, frozenset({name}))

    def plain(self, model: ModelConfig) -> ModelConfig:
        """The model without the replicas that were added here."""
        return replace(model, replicas=None) if self._is_ours(model) else model

    def _is_ours(self, model: ModelConfig) -> bool:
        return model.replicas is not None and model.replicas is self._made.get(model.name)

    async def _take(
        self, model: ModelConfig, rules: ReplicaConfig | None, unless_used: frozenset[str] = frozenset()
    ) -> None:
        """Go on with these replicas. Raises Conflict if the core finds one of ``unless_used`` in use then."""
        config = self._current.config
        models = {**config.models, model.name: replace(model, replicas=rules)}
        await self._apply_configuration(replace(config, models=models), unless_used)
        self._made.pop(model.name, None)
        if rules:
            self._made[model.name] = rules
