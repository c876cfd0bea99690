"""vLLM's arguments by name: checked when they are given, and turned into what vLLM's command line takes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmd.client.vllm_arguments import APPENDED, LISTS, NAMES, ONLY_ON, SWITCHES

# What the manager itself decides: where the engine listens and under which name.
OURS = frozenset({"model", "port", "served_model_name"})
NOT_HERE = frozenset({"host", "uds", "config", "api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "root_path"})


class VLLMEngineArgs:
    """Any argument of ``vllm serve`` by its Python name: ``VLLMEngineArgs(model="...", max_model_len=8192)``.

    ``False`` becomes ``--no-...``, a list several values, a mapping JSON, ``None`` nothing. ``extra_args`` are words
    of the command line for what a newer vLLM has. Raises TypeError for a name or a value that vLLM would not take.
    """

    def __init__(self, model: str | os.PathLike[str], *, extra_args: Sequence[str] = (), **arguments: Any) -> None:
        self.model = os.fspath(model)
        if not self.model.strip("/"):
            raise TypeError("model must be a path or a repository id such as Qwen/Qwen3-0.6B")
        self.extra_args = tuple(map(str, extra_args))
        for name, value in arguments.items():
            _check(name, value)
        self.arguments: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}

    @classmethod
    def of(cls, given: Any) -> VLLMEngineArgs:
        """From one of these, a mapping, or vLLM's own EngineArgs, of which what is not the default counts."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(**given)
        if dataclasses.is_dataclass(given) and not isinstance(given, type):
            return cls(**changed_fields(given))
        raise TypeError(f"engine_args must be VLLMEngineArgs, EngineArgs or a mapping, not {type(given).__name__}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["arguments"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} was not given {name!r}") from None

    def __repr__(self) -> str:
        given = {"model": self.model, **self.arguments}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VLLMEngineArgs) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def source(self) -> str:
        """The model as an engine elsewhere finds it: an absolute path, or a repository id."""
        path = os.path.expanduser(self.model)
        is_path = path.startswith((".", "/")) or os.path.isdir(path)
        return os.path.abspath(path) if is_path else self.model.strip("/")

    @property
    def name(self) -> str:
        """``served_model_name`` if given, else the last two parts of the model's path."""
        given = self.arguments.get("served_model_name")
        if given:
            return str(given if isinstance(given, str) else given[0])
        parts = [part for part in self.source.split("/") if part]
        cached = next((part for part in reversed(parts) if part.startswith("models--")), "")
        return cached.removeprefix("models--").replace("--", "/", 1) if cached else "/".join(parts[-2:])

    def argv(self, without: Iterable[str] = OURS) -> list[str]:
        """The words of vLLM's command line for everything but ``without`` and the model."""
        words = [word for name, value in self.arguments.items() if name not in without for word in _words(name, value)]
        return [*words, *self.extra_args]

    def settings(self) -> dict[str, Any]:
        """What vllmd is told of the model: the settings it reckons with, and the flags. Raises TypeError."""
        if refused := sorted(NOT_HERE & self.arguments.keys()):
            raise TypeError(f"{', '.join(refused)}: where and how the engine listens is decided by vllmd; leave it out")
        given = self.arguments
        settings: dict[str, Any] = {"engine": "vllm", "model": self.source}
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "dtype", "trust_remote_code"):
            if name in given:
                settings[name] = given[name]
        if isinstance(given.get("max_model_len"), int):
            settings["max_model_len"] = given["max_model_len"]
        if "gpu_memory_utilization" in given:
            settings["gpu_memory"] = float(given["gpu_memory_utilization"])
        if isinstance(given.get("hf_token"), str):
            settings["hf_token"] = given["hf_token"]
        # The share is passed as a flag, too: without a GPU vllmd would not say it, and vLLM for the CPU wants it.
        said = {*settings, *OURS, "hf_token"}
        return {**settings, "extra_args": self.argv(without=said)}


def changed_fields(given: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults."""
    changed = {}
    for each in dataclasses.fields(given):
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        value = getattr(given, each.name)
        if value != default:
            changed[each.name] = value
    return changed


def _check(name: str, value: Any) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "what a newer vLLM has goes into extra_args"
        raise TypeError(f"vLLM has no argument {name!r}; {hint}")
    if name in SWITCHES | ONLY_ON and not isinstance(value, bool | None):
        raise TypeError(f"{name} takes True or False, not {value!r}")
    if isinstance(value, bool) and name not in SWITCHES | ONLY_ON | {"hf_token"}:
        raise TypeError(f"{name} takes a value, not {value!r}")


def _words(name: str, value: Any) -> list[str]:
    """An argument as words of the command line."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{flag[2:]}"] if name in SWITCHES else []
    if isinstance(value, list | tuple | set | frozenset) and name in LISTS | APPENDED:
        texts = [_text(item) for item in value]
        if name in APPENDED:
            return [word for text in texts for word in (flag, text)]
        return [flag, *texts] if texts else []
    return [flag, _text(value)]


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = changed_fields(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return os.fspath(value) if isinstance(value, Path) else str(value)
