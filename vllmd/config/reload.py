"""What a reload does with a changed setting: one column of the table (``settings.Setting.reload``).

The daemon's answer to a reload, its log, the exit status of ``vllmctl reload`` and the manual come from that column.
A daemon that goes on with another configuration takes ``in_force``: what waits for the next start keeps its present
value there, so that nothing which reads the configuration can see a value that is not in force.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllmd.config.types import Config, ModelConfig

LATER = "takes effect at the next start of vllmd"
BY_SYSTEMD = "is not used: vllmd.socket says where to listen, and vllmd.service who vllmd is"
UNDER_SYSTEMD = frozenset({"server.listen", "server.user"})  # what the units say, where systemd has started it


def in_force(running: Config, read: Config, *, activated: bool) -> tuple[Config, dict[str, str]]:
    """``read`` as a daemon that runs by ``running`` can take it, and what becomes of each setting that it cannot.

    ``activated``: its sockets are systemd's.
    """
    from vllmd.config.settings import Reload, leaves

    config, postponed = read, dict[str, str]()
    for path in [leaf.path for leaf in leaves() if leaf.reload is Reload.NEXT_START and leaf.row.field is not None]:
        before, now = _value(running, path), _value(read, path)
        if before == now:
            continue
        if activated and path in UNDER_SYSTEMD:
            postponed[path] = BY_SYSTEMD
        else:
            postponed[path] = LATER
            config = _with(config, path, before)
    return config, postponed


def shared(read: Config, running: Config) -> Config:
    """``read`` with the models of ``running`` where they are the same, each as the same object.

    Of ten thousand models whoever goes on with it then sees at a glance which are others, and none is there twice.
    """
    models = dict(read.models)
    for name, model in models.items():
        known = running.models.get(name)
        if known is not None and known == model and _json_values(known) == _json_values(model):
            models[name] = known
    return replace(read, models=models)


def _json_values(model: ModelConfig) -> str:
    """The settings of a model whose values are any JSON, as text: for Python ``1 == True == 1.0``, for a client not."""
    engines = (model, *(model.replicas.of if model.replicas else ()))
    return repr([(each.options, each.request, each.variants) for each in engines])


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
