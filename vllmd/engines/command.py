"""Any server as an engine: an argv template, a health path, and perhaps calls that mean sleep and wake.

    engine: command
    command: [llama-server, -m, "${MODEL}", --port, "${PORT}"]
    options:
      health: /health
      routes: [/v1/chat/completions]
      served_name: default
      sleep: {1: {path: /unload}}
      wake: {1: [{path: /load, json: {"name": "x"}, timeout: 120}]}

``${SOCKET}`` makes it listen on a Unix socket, ``${PORT}`` on a loopback port that
was reserved for it; one of the two must be there, or nobody could find it.
``$$`` is a dollar sign.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vllmd.config.types import ModelConfig
from vllmd.core.types import Footprint
from vllmd.engines.base import Call, Engine, Failure, Launch, Listen, Place, Progress
from vllmd.engines.options import text, unknown, words, wrong
from vllmd.engines.vllm import check_path, memory_share
from vllmd.errors import ConfigError

OPTIONS = {
    "health": "path that answers 200 once it is ready (default /health)",
    "routes": "the public paths that it serves",
    "served_name": "the name that it knows its model by, where that is not the configured one",
    "sleep": "by level, 1 or 2: the call or the calls that put it to sleep",
    "wake": "by level: the call or the calls that wake it",
    "asleep": "path whose JSON answer has is_sleeping",
    "cwd": "working directory",
}
VARIABLES = {
    "SOCKET": "path of the Unix socket to listen on",
    "PORT": "loopback port to listen on",
    "MODEL": "what to load",
    "NAME": "the model's name",
    "DEVICES": "ids of its devices, with commas",
    "MEMORY": "bytes per device promised to it",
    "SHARE": "the same as a share of the device",
    "RUN_DIR": "its private directory",
}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")
_FIELDS = {"method": str, "path": str, "json": object, "timeout": (int, float), "expect": int, "optional": bool}


class Command:
    """The kind; every model's own calls make an engine of its own, see ``bind``."""

    kind = "command"

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for options that are wrong."""
        unknown(model, OPTIONS)
        return CommandOf(model)


class CommandOf:
    """The contract of ``base.Engine``, as one model's options tell it."""

    kind = "command"

    def __init__(self, model: ModelConfig) -> None:
        self._sleep = _by_level(model, "sleep")
        self._wake = _by_level(model, "wake")
        if self._sleep.keys() != self._wake.keys():
            raise wrong(model, "sleep", "needs the calls that wake it from the same levels in options.wake")
        self._health = text(model, "health", "/health")
        self._asleep = text(model, "asleep")
        self._routes = frozenset(words(model, "routes") or ROUTES)
        self._name = text(model, "served_name", model.name)
        self._cwd = text(model, "cwd")

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Those that have calls."""
        return frozenset() if model.sleep_mode is False else frozenset(self._sleep)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The template filled in. Raises ConfigError for an unknown variable or no place to listen."""
        template = (*model.command, *model.extra_args)
        if not model.command:
            raise _wrong(model, "is missing: the engine 'command' runs what it says")
        argv = tuple(_fill(model, part, _values(model, place)) for part in template)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(place.device_ids)} if place.device_ids else {}
        token = {"HF_TOKEN": model.hf_token} if model.hf_token else {}
        return Launch(argv, _listen(model, place, template), {**devices, **token}, self._cwd)

    def ready(self, model: ModelConfig) -> Call:
        return Call("GET", self._health, timeout=5.0)

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        return self._sleep[level]

    def wake(self, level: int) -> Sequence[Call]:
        return self._wake[level]

    def asleep(self) -> Call | None:
        return Call("GET", self._asleep, timeout=5.0) if self._asleep else None

    def routes(self, model: ModelConfig) -> frozenset[str]:
        return self._routes

    def served_name(self, model: ModelConfig) -> str:
        return self._name

    def progress(self, line: str) -> Progress | None:
        """What it does while it starts, only it knows."""
        return None

    def failure(self, lines: Sequence[str]) -> Failure:
        """Its last words."""
        said = [line.strip() for line in lines if line.strip()]
        reason = said[-1] if said else "it said nothing"
        return Failure(reason, memory="out of memory" in reason.lower())

    def footprint(self, lines: Sequence[str]) -> Footprint | None:
        """Only the device can tell."""
        return None


def _values(model: ModelConfig, place: Place) -> dict[str, str]:
    share = memory_share(model, place)
    return {
        "SOCKET": str(place.run_dir / "engine.sock"),
        "PORT": str(place.port),
        "MODEL": model.source,
        "NAME": model.name,
        "DEVICES": ",".join(place.device_ids),
        "MEMORY": str(place.memory),
        "SHARE": "" if share is None else f"{share:g}",
        "RUN_DIR": str(place.run_dir),
    }


def _fill(model: ModelConfig, part: str, values: Mapping[str, str]) -> str:
    try:
        return string.Template(part).substitute(values)
    except KeyError as error:
        known = ", ".join(f"${{{name}}}" for name in VARIABLES)
        raise _wrong(model, f"{part!r}: unknown variable ${{{error.args[0]}}} (known: {known})") from None
    except ValueError:
        raise _wrong(model, f"{part!r}: a single $ means nothing; a dollar sign is $$") from None


def _listen(model: ModelConfig, place: Place, template: Sequence[str]) -> Listen:
    socket, port = (any(_uses(part, name) for part in template) for name in ("SOCKET", "PORT"))
    if socket == port:
        what = "has both ${SOCKET} and ${PORT}" if socket else "has neither ${SOCKET} nor ${PORT}"
        raise _wrong(model, f"{what}: it must listen on one of them")
    if port:
        return Listen(port=place.port)
    path = place.run_dir / "engine.sock"
    check_path(path, model)
    return Listen(uds=str(path))


def _uses(part: str, name: str) -> bool:
    return name in string.Template(part).get_identifiers()


def _by_level(model: ModelConfig, name: str) -> dict[int, tuple[Call, ...]]:
    given = model.options.get(name) or {}
    if not isinstance(given, Mapping) or not all(str(level) in ("1", "2") for level in given):
        raise wrong(model, name, f"{given!r}; right is a mapping of 1, 2 or both to calls such as {{path: /sleep}}")
    return {int(str(level)): _calls(model, name, calls) for level, calls in given.items()}


def _calls(model: ModelConfig, name: str, given: Any) -> tuple[Call, ...]:
    return tuple(_call(model, name, each) for each in (given if isinstance(given, list | tuple) else [given]))


def _call(model: ModelConfig, name: str, given: Any) -> Call:
    """One call from a mapping. Raises ConfigError naming the field that is wrong."""
    if not isinstance(given, Mapping) or "path" not in given:
        raise wrong(model, name, f"{given!r} is no call; it needs at least a path")
    for field, value in given.items():
        if field not in _FIELDS or not isinstance(value, _FIELDS[field]):  # type: ignore[arg-type]
            raise wrong(model, name, f"{field}: {value!r}; a call has {', '.join(_FIELDS)}")
    return Call(**{"method": "POST", **given})


def _wrong(model: ModelConfig, what: str) -> ConfigError:
    where = f"{model.where}: " if model.where else ""
    return ConfigError(f"{where}models.{model.name}.command {what}")
