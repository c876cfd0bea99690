"""Where engines may be put, and further ones of a model, at run time: M's API. A reload forgets both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core import commands, events
from vllmd.core.types import ModelSpec, ReplicaSpec, State
from vllmd.daemon.current import Current, Later, Take
from vllmd.errors import BadRequest, Conflict

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd


class Instances:
    """A model that has one engine becomes, with another, one of two replicas; the engine that runs is the first."""

    def __init__(self, current: Current, back: Later[BackEnd], take: Take, changing: asyncio.Lock) -> None:
        self._current = current
        self._back = back
        self._take_configuration = take
        self._changing = changing
        self._specs: tuple[ModelSpec, ...] = ()
        self._adding: dict[tuple[str, int], asyncio.Task[None]] = {}  # model, device -> one more is being made
        self._made: dict[str, ReplicaConfig] = {}  # model -> the replicas that it has by us

    def configure(self, specs: Iterable[ModelSpec]) -> None:
        """Know what the core was told of the engines of a new configuration."""
        self._specs = tuple(specs)

    # -- where they may be put

    async def load_on(self, model: str, device: int) -> str:
        """Have one of its engines on that device; which the core decides. Raises BadRequest, Conflict."""
        back = await self._back.wait()
        name = self._current.model_of(model)
        for spec in [spec for spec in self._specs if spec.name == name]:
            _check(spec, device, [known.index for known in back.memory.inventory])
        adding = self._adding.get((name, device))
        if adding is None:
            back.post(events.LoadAsked(name, device))
            adding = self._adding.get((name, device))  # the core may have asked for one more
        if adding:
            await asyncio.shield(adding)
        views = back.replicas_of(name)
        return next((view.id for view in views if device in view.devices or view.bound == device), name)

    # -- further ones

    def add(self, command: commands.AddReplica) -> None:
        """Give the model one more engine, on that device, which the core then loads; or tell it that there is none."""
        key = (command.model, command.device)
        task = self._adding[key] = asyncio.ensure_future(self._add(*key))
        task.add_done_callback(lambda task: self._added(command, task))

    def _added(self, command: commands.AddReplica, task: asyncio.Task[None]) -> None:
        self._adding.pop((command.model, command.device), None)
        if task.cancelled() or task.exception():
            self._post(events.ReplicaRefused(command.model, command.device))

    def _post(self, event: events.Event) -> None:
        if self._back.now is not None:
            self._back.now.post(event)

    async def _add(self, model: str, device: int) -> None:
        """Raises Conflict."""
        async with self._changing:
            known = self._current.config.models.get(model)
            if known is None:
                raise Conflict(f"{model} is no longer configured", param="model_name")
            if known.replicas and not self._is_ours(known):
                what = (
                    f"all {len(known.replicas.of)} replicas of {model} are loaded; replicas in vllmd.yaml(5) gives more"
                )
                raise Conflict(what, param="gpu_id")
            await self._take(known, self._with_another(known, device))

    async def drop(self, name: str) -> None:
        """Forget an engine that was added; the first of a model, and what a file has, stays."""
        async with self._changing:
            for model, rules in list(self._made.items()):
                left = tuple(one for one in rules.of if one.name != name or one is rules.of[0])
                known = self._current.config.models.get(model)
                if known and self._is_ours(known) and len(left) < len(rules.of):
                    with contextlib.suppress(Conflict):  # somebody has it loaded again: it stays
                        fewer = replace(rules, of=left) if len(left) > 1 else None
                        await self._take(known, fewer, lambda: self._rests(name))

    def _rests(self, name: str) -> bool:
        """Whether the engine is stopped, and nobody waits for it."""
        views = self._back.now.replicas_of(name) if self._back.now else ()
        return all(view.state in (State.STOPPED, State.FAILED) and not view.waiting_for for view in views)

    def plain(self, model: ModelConfig) -> ModelConfig:
        """The model without what was added here."""
        return replace(model, replicas=None) if self._is_ours(model) else model

    def _is_ours(self, model: ModelConfig) -> bool:
        return model.replicas is not None and model.replicas is self._made.get(model.name)

    def _with_another(self, model: ModelConfig, device: int) -> ReplicaConfig:
        base = replace(model, replicas=None, aliases=(), replica_of=model.name)
        rules = model.replicas or ReplicaConfig(of=(replace(base, name=f"{model.name}@1"),))
        taken = {*self._current.config.models, *(one.name for one in rules.of)}
        name = next(name for n in itertools.count(2) if (name := f"{model.name}@{n}") not in taken)
        return replace(rules, of=(*rules.of, replace(base, name=name, devices=(device,))))

    async def _take(
        self, model: ModelConfig, rules: ReplicaConfig | None, still: Callable[[], bool] = lambda: True
    ) -> None:
        """Go on with these replicas, if that is ``still`` right then. Raises Conflict."""
        config = self._current.config
        models = {**config.models, model.name: replace(model, replicas=rules)}
        await self._take_configuration(replace(config, models=models), still)
        self._made.pop(model.name, None)
        if rules:
            self._made[model.name] = rules


def _check(model: ModelSpec, device: int, known: Sequence[int]) -> None:
    """Whether some engine of the model can be put on that device alone. Raises BadRequest."""
    refused = [why for why in (_refusal(spec, device, known) for spec in model.replicas) if why]
    if len(refused) == len(model.replicas):
        raise BadRequest(refused[0], param="gpu_id")


def _refusal(spec: ReplicaSpec, device: int, known: Sequence[int]) -> str:
    """Why the engine cannot be put on that device alone; "" if it can."""
    if device not in known:
        there = f"there are {', '.join(map(str, known))}" if known else "there are none on this machine"
        return f"there is no GPU {device}; {there}"
    if spec.devices and device not in spec.devices:
        return f"{spec.id} may use the GPUs {', '.join(map(str, spec.devices))} only"
    if spec.device_count != 1:
        return f"{spec.id} takes {spec.device_count} GPUs and cannot be put on one"
    return ""
