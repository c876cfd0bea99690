"""Any server as an engine: an argv template, a health path, and perhaps calls that mean sleep and wake.

    engine: command
    command: [llama-server, -m, "${MODEL}", --port, "${PORT}"]
    options:
      health: /health
      routes: [/v1/chat/completions]
      served_name: default
      sleep: {1: {path: /unload}}
      wake: {1: [{path: /load, json: {"name": "x"}, timeout: 120}]}

A container is stopped by a command of its own, as its processes are not children of the engine's:

    command: podman run --rm --name ${INSTANCE} -p 127.0.0.1:${PORT}:8000 image
    options:
      stop: podman stop --time 20 ${INSTANCE}

``${SOCKET}`` makes it listen on a Unix socket, ``${PORT}`` on a loopback port that
was reserved for it; one of the two must be there, or nobody could find it.
``$$`` is a dollar sign.
"""

from __future__ import annotations

import shlex
import signal
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Call, Engine, Launch, Listen, Place
from vllmd.engines.options import UPSTREAM, choice, rules, switch, text, unknown, words, wrong
from vllmd.engines.plain import PROBE, Plain, environment, own_key
from vllmd.engines.vllm import check_path, memory_share
from vllmd.errors import ConfigError

OPTIONS = {
    "health": "path that answers 200 once it is ready (default /health)",
    "routes": "the public paths that it serves",
    "upstream": UPSTREAM,
    "served_name": "the name that it knows its model by, where that is not the configured one",
    "sleep": "by level, 1 or 2: the call or the calls that put it to sleep",
    "wake": "by level: the call or the calls that wake it",
    "asleep": "path whose JSON answer has is_sleeping",
    "alive": "path that answers 200 while it lives, also asleep (default: that of health)",
    "busy": "path whose JSON answer has a list that is not empty while it works on what no open request shows",
    "stop": "command that ends it, such as podman stop ${INSTANCE}; it is run whenever the engine is to go or has gone",
    "stop_signal": "SIGTERM (the default), SIGINT, SIGQUIT or SIGHUP: on which it finishes what runs and exits",
    "self_managed": "true: it takes and frees memory as it pleases; what it may take is gpu_memory, never measured",
    "cpu": "true: it runs on the CPU and takes no device",
    "key_env": "environment variable (LLAMA_API_KEY) in which it gets a key of its start, which it asks clients for",
    "cwd": "working directory",
}
VARIABLES = {
    "SOCKET": "path of the Unix socket to listen on",
    "PORT": "loopback port to listen on",
    "MODEL": "what to load",
    "NAME": "the model's name",
    "INSTANCE": "a name for this run that no other has, fit for a container",
    "DEVICES": "ids of its devices, with commas",
    "MEMORY": "bytes per device promised to it",
    "SHARE": "the same as a share of the device",
    "RUN_DIR": "its private directory",
}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")
SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")
_FIELDS = {"method": str, "path": str, "json": object, "timeout": (int, float), "expect": int, "optional": bool}


class Command:
    """The kind; each model's own calls make an engine of its own, see ``bind``."""

    kind = "command"

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError for options that are wrong."""
        unknown(model, OPTIONS)
        return CommandOf(model)


class CommandOf(Plain):
    """The contract of ``base.Engine``, as one model's options tell it."""

    kind = "command"

    def __init__(self, model: ModelConfig) -> None:
        self._sleep = _by_level(model, "sleep")
        self._wake = _by_level(model, "wake")
        if self._sleep.keys() != self._wake.keys():
            raise wrong(model, "sleep", "needs the calls that wake it from the same levels in options.wake")
        self._health = text(model, "health", "/health")
        self._alive = text(model, "alive", self._health)
        self._asleep, self._busy = text(model, "asleep"), text(model, "busy")
        self._routes = frozenset(words(model, "routes") or ROUTES)
        self._own_api = rules(model, "upstream")
        self._name = text(model, "served_name", model.replica_of or model.name)
        self._cwd, self._key_env = text(model, "cwd"), text(model, "key_env")
        self._stop = _stop_template(model)
        self._signal = signal.Signals[choice(model, "stop_signal", SIGNALS)]
        self._self_managed, self._cpu = switch(model, "self_managed"), switch(model, "cpu")

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """The levels for which the configuration has calls, unless ``sleep_mode`` is false."""
        return frozenset() if model.sleep_mode is False else frozenset(self._sleep)

    def device_count(self, model: ModelConfig) -> int:
        """The number of devices that the engine takes; 0 where it runs on the CPU."""
        return 0 if self._cpu else super().device_count(model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The templates filled in. Raises ConfigError for an unknown variable or no place to listen."""
        template = (*model.command, *model.extra_args)
        if not model.command:
            raise _wrong_command(model, "is missing: the engine 'command' runs what it says")
        values = _values(model, place)
        key = own_key(model, place, self._key_env) if self._key_env else ""
        return Launch(
            argv=tuple(_fill(part, values, lambda what: _wrong_command(model, what)) for part in template),
            listen=replace(_listen(model, place, template), key=key),
            env={**environment(model, place), **({self._key_env: key} if key else {})},
            cwd=self._cwd,
            stop=tuple(_fill(part, values, lambda what: wrong(model, "stop", what)) for part in self._stop),
            stop_signal=self._signal,
            self_managed=self._self_managed,
        )

    def ready(self, model: ModelConfig) -> Call:
        return Call("GET", self._health, timeout=PROBE)

    def alive(self, model: ModelConfig) -> Call:
        return Call("GET", self._alive, timeout=PROBE)

    def busy(self) -> Call | None:
        return Call("GET", self._busy, timeout=PROBE) if self._busy else None

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        return self._sleep[level]

    def wake(self, level: int) -> Sequence[Call]:
        return self._wake[level]

    def asleep(self) -> Call | None:
        return Call("GET", self._asleep, timeout=PROBE) if self._asleep else None

    def routes(self, model: ModelConfig) -> frozenset[str]:
        return self._routes

    def own_api(self, model: ModelConfig) -> frozenset[str]:
        return super().own_api(model) | self._own_api

    def served_name(self, model: ModelConfig) -> str:
        return self._name

    def _absent(self, lines: Sequence[str]) -> str:
        """Nothing: no line is known to say that an arbitrary command is missing."""
        return ""


def _stop_template(model: ModelConfig) -> tuple[str, ...]:
    """The stop command's words, from a list or one line."""
    option = model.options.get("stop")
    try:
        return tuple(shlex.split(text(model, "stop"))) if isinstance(option, str) else words(model, "stop")
    except ValueError as error:
        raise wrong(model, "stop", f"it cannot be split into words: {error}") from None


def _values(model: ModelConfig, place: Place) -> dict[str, str]:
    share = memory_share(model, place)
    return {
        "SOCKET": str(place.run_dir / "engine.sock"),
        "PORT": str(place.port),
        "MODEL": model.source,
        "NAME": model.name,
        "INSTANCE": place.run_dir.name,
        "DEVICES": ",".join(place.device_ids),
        "MEMORY": str(place.memory),
        "SHARE": "" if share is None else f"{share:g}",
        "RUN_DIR": str(place.run_dir),
    }


def _fill(part: str, values: Mapping[str, str], wrong: Callable[[str], ConfigError]) -> str:
    try:
        return string.Template(part).substitute(values)
    except KeyError as error:
        known = ", ".join(f"${{{name}}}" for name in VARIABLES)
        raise wrong(f"has an unknown variable ${{{error.args[0]}}} (known: {known})") from None
    except ValueError:
        raise wrong("has a single $, which means nothing; a dollar sign is $$") from None


def _listen(model: ModelConfig, place: Place, template: Sequence[str]) -> Listen:
    used = {name for part in template for name in string.Template(part).get_identifiers()}
    socket, port = "SOCKET" in used, "PORT" in used
    if socket == port:
        what = "has both ${SOCKET} and ${PORT}" if socket else "has neither ${SOCKET} nor ${PORT}"
        raise _wrong_command(model, f"{what}: it must listen on one of them")
    if port:
        return Listen(port=place.port)
    path = place.run_dir / "engine.sock"
    check_path(path, model)
    return Listen(uds=str(path))


def _by_level(model: ModelConfig, name: str) -> dict[int, tuple[Call, ...]]:
    option = model.options.get(name) or {}
    if not isinstance(option, Mapping) or not all(str(level) in ("1", "2") for level in option):
        raise wrong(model, name, "right is a mapping of 1, 2 or both to calls such as {path: /sleep}")
    calls = {int(str(level)): each if isinstance(each, list | tuple) else [each] for level, each in option.items()}
    return {level: tuple(_call(model, name, call) for call in each) for level, each in calls.items()}


def _call(model: ModelConfig, name: str, option: Any) -> Call:
    """One call from a mapping. Raises ConfigError naming the field that is wrong."""
    if not isinstance(option, Mapping) or "path" not in option:
        raise wrong(model, name, "a call is a mapping and needs at least a path")
    for field, value in option.items():
        if field not in _FIELDS or not isinstance(value, _FIELDS[field]):  # type: ignore[arg-type]
            raise wrong(
                model, name, f"{field} is no field of a call, or not of its type; a call has {', '.join(_FIELDS)}"
            )
    return Call(**{"method": "POST", **option})


def _wrong_command(model: ModelConfig, what: str) -> ConfigError:
    where = f"{model.where}: " if model.where else ""
    return ConfigError(f"{where}models.{model.name}.command {what}")
