"""Other systems' configurations as files for models.d; nothing is dropped without a word."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from vllmd.config import secrets
from vllmd.config.settings import LEGACY, MODEL

Converted = tuple[dict[str, Any], list[str]]  # models, and what has no counterpart


def convert(system: str, text: str, source: str) -> tuple[str, list[str]]:
    """The text of a models.d file, and a line for each thing that was left out. Raises ValueError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"line {mark.line + 1}: not valid YAML" if mark else "not valid YAML") from None
    if not isinstance(data, dict):
        raise ValueError(f"this is no configuration of {system}: it is not a mapping")
    models, dropped = CONVERTERS[system](data)
    if not models:
        raise ValueError("there are no models in it")
    notes = "".join(f"# not taken over: {line}\n" for line in dropped)
    body = yaml.safe_dump({"models": models}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return f"# Imported from {system}'s {source} by vllmctl import.\n{notes}{body}", dropped


def from_vllama(data: dict[str, Any]) -> Converted:
    """A flat mapping from model to settings, whose names are known here."""
    return _known_settings(data, "")


def from_vllm_proxy(data: dict[str, Any]) -> Converted:
    """The models of vllm-proxy's file; its sections gpu and proxy concern the whole daemon."""
    models, dropped = _known_settings(data.get("models") or {}, "models.")
    paths = {row.key: row.path for row in LEGACY}
    for section, entries in data.items():
        if section == "models":
            continue
        for name, value in entries.items() if isinstance(entries, dict) else [("", entries)]:
            key = f"{section}.{name}".rstrip(".")
            advice = f"; in vllmd.yaml it is {paths[key]}" if key in paths else ""
            dropped.append(f"{key}: {_shown(key, value)}{advice}")
    return models, dropped


def _known_settings(data: Any, prefix: str) -> Converted:
    """Models by name with the settings that are called so here, too."""
    models: dict[str, Any] = {}
    dropped = []
    if not isinstance(data, dict):
        raise ValueError("the models are not a mapping")
    for name, settings in data.items():
        models[str(name)] = kept = {}
        for key, value in (settings or {}).items() if isinstance(settings or {}, dict) else ():
            if MODEL.row(str(key)) and value not in (None, {}, []):
                kept[str(key)] = value
            elif not MODEL.row(str(key)):
                dropped.append(f"{prefix}{name}.{key}: {_shown(str(key), value)}")
    return models, dropped


def _shown(name: str, value: Any) -> Any:
    """A value for a message, unless it may be, or hold, a secret."""
    return "(hidden)" if secrets.is_secret_name(name) or isinstance(value, dict | list) else value


def from_llama_swap(data: dict[str, Any]) -> Converted:
    """The models of llama-swap's file, which are commands: those that run vLLM become vLLM models, others the engine
    ``command``.
    """
    models: dict[str, Any] = {}
    taken = ("models", "macros", "healthCheckTimeout")
    dropped = [f"{key}: {_shown(str(key), data[key])}" for key in data if key not in taken]
    for name, settings in (data.get("models") or {}).items():
        if not isinstance(settings, dict) or not settings.get("cmd"):
            raise ValueError(f"models.{name}: cmd is missing")
        command = str(settings["cmd"])
        for macro, text in (data.get("macros") or {}).items():
            command = command.replace(f"${{{macro}}}", str(text))
        models[str(name)] = model = model_of_command(command)
        if data.get("healthCheckTimeout"):
            model["start_timeout"] = data["healthCheckTimeout"]
        dropped += [f"models.{name}.{line}" for line in add_swap_settings(model, settings)]
    return models, dropped


def add_swap_settings(model: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Add llama-swap's settings of a model to ``model``, by our names. Returns a line for each without counterpart."""
    dropped = []
    for key, value in settings.items():
        if key == "aliases":
            model["aliases"] = value
        elif key == "ttl":
            model["idle"] = {"level": 3, "sleep_after": value} if value and value > 0 else "never"
        elif key == "env":
            model["env"] = dict(str(entry).partition("=")[::2] for entry in value)
        elif key == "checkEndpoint" and "engine" in model:
            model.setdefault("options", {})["health"] = value
        elif key == "useModelName" and "engine" in model:
            model.setdefault("options", {})["served_name"] = value
        elif key == "concurrencyLimit":
            model["concurrency"] = value or None
        elif key != "cmd":
            dropped.append(f"{key}: {_shown(str(key), value)}")
    return dropped


def model_of_command(line: str) -> dict[str, Any]:
    """A command line of llama-swap as a model of the engine vllm, if it runs that, else of the engine ``command``."""
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    if len(words) > 2 and words[0].rpartition("/")[2] == "vllm" and words[1] == "serve":
        flags, rest, arguments = ("--port", "--host", "--uds"), list[str](), iter(words[3:])
        for word in arguments:  # vllmd decides where the engine listens
            if word in flags:
                next(arguments, None)  # its value
            elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
                rest.append(word)
        return {"model": words[2], "command": [words[0]], **({"extra_args": rest} if rest else {})}
    # llama-swap's variables become those of the engine ``command``; any other dollar sign stands for itself.
    escaped = (word.replace("$", "$$") for word in words)
    command = [word.replace("$${PORT}", "${PORT}").replace("$${MODEL_ID}", "${NAME}") for word in escaped]
    return {"engine": "command", "command": command}


CONVERTERS: dict[str, Callable[[dict[str, Any]], Converted]] = {
    "vllama": from_vllama,
    "vllm-proxy": from_vllm_proxy,
    "llama-swap": from_llama_swap,
}
