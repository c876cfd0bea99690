"""The engines that this machine is to have: models, or in their place their replicas, less what is meant for others."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace

from vllmd.config.types import Config, ModelConfig


def engines_of(models: Mapping[str, ModelConfig]) -> Mapping[str, ModelConfig]:
    """Every engine by its id: the model's name, or of several ``NAME@1`` and so on, each with the rules they share."""
    if all(model.replicas is None for model in models.values()):
        return models
    found = {}
    for name, model in models.items():
        if model.replicas is None:
            found[name] = model
            continue
        rules = replace(model.replicas, given=(), of=(), min=model.replicas.min or len(model.replicas.of))
        found.update((one.name, replace(one, replicas=rules)) for one in model.replicas.of)
    return found


def of_this_host(config: Config, is_here: Callable[[str], bool]) -> tuple[Config, list[str]]:
    """``config`` without models and replicas that name another host, and the names of the models that it lost."""
    kept: dict[str, ModelConfig] = {}
    for name, model in config.models.items():
        left = _left(model, is_here)
        if left is not None:
            kept[name] = left
    return replace(config, models=kept), [name for name in config.models if name not in kept]


def _left(model: ModelConfig, is_here: Callable[[str], bool]) -> ModelConfig | None:
    if model.replicas is None:
        return model if not model.host or is_here(model.host) else None
    left = tuple(one for one in model.replicas.of if not one.host or is_here(one.host))
    return replace(model, replicas=replace(model.replicas, of=left)) if left else None


def is_this_host(host: str) -> bool:
    """Whether ``host`` is a name or an address of this machine. No name is looked up."""
    name = socket.gethostname()
    if host.lower() in (name.lower(), name.partition(".")[0].lower(), "localhost"):
        return True
    return _is_ours(host, socket.AF_INET) or _is_ours(host.strip("[]"), socket.AF_INET6)


def _is_ours(address: str, family: socket.AddressFamily) -> bool:
    """An address to which a socket can be bound is ours; ``0.0.0.0`` is nobody's."""
    try:
        packed = socket.inet_pton(family, address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return any(packed)
