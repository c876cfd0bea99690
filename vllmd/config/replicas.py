"""The engines of this machine: models, or in their place their replicas, less those that name another host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace

from vllmd.config.types import Config, ModelConfig


def engines_of(models: Mapping[str, ModelConfig]) -> Mapping[str, ModelConfig]:
    """Every engine by its id: the model's name, or of several ``NAME@1`` and so on, each with the rules they share."""
    if all(model.replicas is None for model in models.values()):
        return models
    engines = {}
    for name, model in models.items():
        if model.replicas is None:
            engines[name] = model
            continue
        rules = replace(model.replicas, given=(), of=(), min=model.replicas.min or len(model.replicas.of))
        engines.update((one.name, replace(one, replicas=rules)) for one in model.replicas.of)
    return engines


def of_this_host(config: Config, is_here: Callable[[str], bool]) -> tuple[Config, list[str]]:
    """``config`` without models and replicas that name another host, and the names of the models that it lost."""
    kept: dict[str, ModelConfig] = {}
    for name, model in config.models.items():
        if model.replicas is not None:
            here = tuple(one for one in model.replicas.of if not one.host or is_here(one.host))
            if here:
                kept[name] = replace(model, replicas=replace(model.replicas, of=here))
        elif not model.host or is_here(model.host):
            kept[name] = model
    return replace(config, models=kept), [name for name in config.models if name not in kept]


def is_this_host(host: str) -> bool:
    """Whether ``host`` is a name or an address of this machine. No name is looked up."""
    name = socket.gethostname()
    if host.lower() in (name.lower(), name.partition(".")[0].lower(), "localhost"):
        return True
    for family, address in ((socket.AF_INET, host), (socket.AF_INET6, host.strip("[]"))):
        with contextlib.suppress(OSError):
            packed = socket.inet_pton(family, address)
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((address, 0))  # which works for the machine's own addresses only
            return any(packed)  # and for 0.0.0.0 and ::, which name no machine
    return False
