"""Where engines may be put, and further ones of a model, at run time: M's API. A reload forgets both."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core import events
from vllmd.core.types import ModelSpec, ReplicaSpec
from vllmd.errors import BadRequest, Conflict

if TYPE_CHECKING:
    from vllmd.daemon.service import Daemon


class Instances:
    """A model that has one engine becomes, with another, one of two replicas; the engine that runs is the first."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._specs: tuple[ModelSpec, ...] = ()
        self._narrowed: dict[str, int] = {}  # engine -> the one device that its next start may use
        self._made: dict[str, ReplicaConfig] = {}  # model -> the replicas that it has by us

    def configure(self, specs: Iterable[ModelSpec]) -> None:
        """Know what the core was told of the engines of a new configuration."""
        self._specs, self._narrowed = tuple(specs), {}

    # -- where they may be put

    async def narrow(self, model: str, device: int | None) -> None:
        """Have its next start use that device only. Raises BadRequest where it cannot."""
        await self._daemon.opened.wait()
        for engine in [each.id for spec in self._specs for each in spec.replicas if model in (spec.name, each.id)]:
            self._narrow(engine, device)

    def _narrow(self, engine: str, device: int | None) -> None:
        if device is not None:
            self._check(engine, device)
        self._narrowed = {name: at for name, at in self._narrowed.items() if name != engine}
        if device is not None:
            self._narrowed[engine] = device
        self._daemon.post(events.ModelsChanged(tuple(self._placed(spec) for spec in self._specs)))

    def _placed(self, spec: ModelSpec) -> ModelSpec:
        narrowed = self._narrowed
        replicas = [replace(r, devices=(narrowed[r.id],)) if r.id in narrowed else r for r in spec.replicas]
        return replace(spec, replicas=tuple(replicas))

    def _check(self, engine: str, device: int) -> None:
        for spec in [each for model in self._specs for each in model.replicas]:
            if engine == spec.id:
                _check(spec, device, [known.index for known in self._daemon.memory.inventory])

    # -- further ones

    async def add(self, model: str, device: int) -> str:
        """Give the model one more engine, on that device; what it is called. Raises BadRequest, Conflict."""
        await self._daemon.opened.wait()
        async with self._daemon.control.runtime_models.changing:
            known = self._daemon.config.models.get(model)
            if known is None:
                raise Conflict(f"{model} is on another GPU, and a replica; its model may have one more", param="gpu_id")
            if known.replicas and not self._is_ours(known):
                what = (
                    f"all {len(known.replicas.of)} replicas of {model} are loaded; replicas in vllmd.yaml(5) gives more"
                )
                raise Conflict(what, param="gpu_id")
            self._check(model, device)
            rules = self._with_another(known, device)
            await self._take(known, rules)
            return rules.of[-1].name

    async def drop(self, name: str) -> None:
        """Forget an engine that was added; the first of a model, and what a file has, stays."""
        async with self._daemon.control.runtime_models.changing:
            for model, rules in list(self._made.items()):
                left = tuple(one for one in rules.of if one.name != name or one is rules.of[0])
                known = self._daemon.config.models.get(model)
                if known and self._is_ours(known) and len(left) < len(rules.of):
                    await self._take(known, replace(rules, of=left) if len(left) > 1 else None)

    def plain(self, model: ModelConfig) -> ModelConfig:
        """The model without what was added here."""
        return replace(model, replicas=None) if self._is_ours(model) else model

    def _is_ours(self, model: ModelConfig) -> bool:
        return model.replicas is not None and model.replicas is self._made.get(model.name)

    def _with_another(self, model: ModelConfig, device: int) -> ReplicaConfig:
        base = replace(model, replicas=None, aliases=(), replica_of=model.name)
        rules = model.replicas or ReplicaConfig(of=(replace(base, name=f"{model.name}@1"),))
        taken = {*self._daemon.config.models, *(one.name for one in rules.of)}
        name = next(name for n in itertools.count(2) if (name := f"{model.name}@{n}") not in taken)
        return replace(rules, of=(*rules.of, replace(base, name=name, devices=(device,))))

    async def _take(self, model: ModelConfig, rules: ReplicaConfig | None) -> None:
        """Go on with these replicas; what is narrowed stays so."""
        config, narrowed = self._daemon.config, self._narrowed
        await self._daemon.take(replace(config, models={**config.models, model.name: replace(model, replicas=rules)}))
        self._made.pop(model.name, None)
        if rules:
            self._made[model.name] = rules
        for engine, device in narrowed.items():
            self._narrow(engine, device)


def _check(spec: ReplicaSpec, device: int, known: Sequence[int]) -> None:
    """Whether the model can be put on that device alone. Raises BadRequest."""
    if device not in known:
        there = f"there are {', '.join(map(str, known))}" if known else "there are none on this machine"
        raise BadRequest(f"there is no GPU {device}; {there}", param="gpu_id")
    if spec.devices and device not in spec.devices:
        raise BadRequest(f"{spec.id} may use the GPUs {', '.join(map(str, spec.devices))} only", param="gpu_id")
    if spec.device_count != 1:
        raise BadRequest(f"{spec.id} takes {spec.device_count} GPUs and cannot be put on one", param="gpu_id")
