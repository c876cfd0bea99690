"""The configuration in force with something else in it: what is planned with, and never served by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vllmd.config.nodes import Node, Where
from vllmd.config.runtime_model import changed
from vllmd.config.types import Config, DeviceConfig
from vllmd.config.value_types import Wrong, sized
from vllmd.errors import BadRequest, UnknownModel

MOST_DEVICES = 64


def with_devices(config: Config, sizes: Sequence[int]) -> Config:
    """``config`` with devices of these sizes (bytes), which need not exist: they are only planned for."""
    return replace(config, devices=tuple(DeviceConfig(size) for size in sizes))


def what_if(
    config: Config, devices: str, policy: str, host_memory: str, models: Mapping[str, object], policies: Sequence[str]
) -> Config:
    """``config`` with other devices (sizes, separated by commas), policy, host memory, or settings of models.

    "" leaves a value as it is. ``policies``: the names of all. Raises BadRequest, UnknownModel.
    """
    if devices:
        sizes = [_size(text.strip(), "devices") for text in devices.split(",") if text.strip()]
        if len(sizes) > MOST_DEVICES:
            raise BadRequest(f"devices: at most {MOST_DEVICES} can be planned for, not {len(sizes)}", param="devices")
        config = with_devices(config, sizes)
    if policy:
        if policy not in policies:
            raise BadRequest(f"there is no policy {policy!r}; there are {', '.join(policies)}", param="policy")
        config = replace(config, policy=policy)
    if host_memory:
        config = replace(config, host_memory=_size(host_memory, "host_memory"))
    for name, settings in models.items():
        if name not in config.models:
            raise UnknownModel(f"models: {name!r} is not configured", param="models")
        if not isinstance(settings, Mapping):
            raise BadRequest(f"models: the settings of {name!r} must be an object", param="models")
        config = replace(config, models={**config.models, name: changed(name, settings, config)})
    return config


def _size(text: str, what: str) -> int:
    try:
        return sized(Node(Where("request"), text, text))
    except Wrong as error:
        raise BadRequest(f"{what}: {error or f'{text!r:.40} is no size such as 80GiB'}", param=what) from None
