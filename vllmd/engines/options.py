"""Reading a model's ``options``: the settings that only its engine kind knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from vllmd import sizes
from vllmd.config.types import ModelConfig
from vllmd.config.value_types import DURATION, SECONDS
from vllmd.errors import ConfigError
from vllmd.text import control_character

RULE = re.compile(r"(GET|POST|PUT|DELETE) /\S*")
NOTHING: frozenset[str] = frozenset()  # each new one takes 216 bytes
UPSTREAM = (
    "what of its own API /upstream/NAME passes on beside its routes: a list of methods and paths such as GET /info, "
    "in which {x} stands for a segment and {x:path} for several"
)


def wrong(model: ModelConfig, name: str, what: str) -> ConfigError:
    """The error for a wrong option: where it is, and what would be right; not its value, which may be a secret."""
    return wrong_setting(model, f"options.{name}", what)


def wrong_setting(model: ModelConfig, name: str, what: str) -> ConfigError:
    """The same for one of the model's settings that all kinds have."""
    where = f"{model.where}: " if model.where else ""
    return ConfigError(f"{where}models.{model.name}.{name}: {what}")


def unknown(model: ModelConfig, known: Collection[str]) -> None:
    """Raise ConfigError for an option that the kind does not know."""
    for name in model.options:
        if name not in known:
            import difflib  # for mistakes only

            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise wrong(model, name, f"unknown option{hint} (known: {', '.join(sorted(known))})")


def choice(model: ModelConfig, name: str, values: Sequence[str]) -> str:
    """One of ``values``; the first where the option is not there. Raises ConfigError."""
    value = model.options.get(name, values[0])
    if value not in values:
        raise wrong(model, name, f"right are {', '.join(values)}")
    return str(value)


def size(model: ModelConfig, name: str) -> int | None:
    """Bytes, from ``8GiB`` or a number; None where the option is not there. Raises ConfigError."""
    value = model.options.get(name)
    if value is None:
        return None
    size = None if isinstance(value, bool) else sizes.parse(str(value))
    if size is None:
        raise wrong(model, name, "it must be a size such as 8GiB or 512MiB")
    return size


def seconds(model: ModelConfig, name: str, default: float) -> float:
    """A time above 0, from ``250ms``, ``2s`` or a number of seconds. Raises ConfigError."""
    value = model.options.get(name, default)
    match = DURATION.fullmatch(str(value).strip())
    if isinstance(value, bool) or not match or not float(match[1]):
        raise wrong(model, name, "it must be a time such as 250ms or 2s")
    return float(match[1]) * SECONDS[match[2].lower()]


def text(model: ModelConfig, name: str, default: str = "") -> str:
    """A text. Raises ConfigError for anything but one."""
    value = model.options.get(name, default)
    if not isinstance(value, str):
        raise wrong(model, name, "it must be text")
    return _plain(model, name, value)


def words(model: ModelConfig, name: str) -> tuple[str, ...]:
    """A list of texts, or one. Raises ConfigError."""
    value = model.options.get(name, ())
    if isinstance(value, str):
        return (_plain(model, name, value),)
    if not isinstance(value, list | tuple):
        raise wrong(model, name, "it must be a list")
    return tuple(_plain(model, name, str(word)) for word in value)


def _plain(model: ModelConfig, name: str, value: str) -> str:
    if character := control_character(value):
        raise wrong(model, name, f"the control character {character} is not allowed")
    return value


def rules(model: ModelConfig, name: str) -> frozenset[str]:
    """A list of methods with paths, or one. Raises ConfigError."""
    given = words(model, name)
    for number, rule in enumerate(given, 1):
        if not RULE.fullmatch(rule):
            raise wrong(model, name, f"entry {number} is no method with a path such as GET /info")
    return frozenset(given) or NOTHING


def whole(model: ModelConfig, name: str) -> int | None:
    """A whole number, 0 or more; None where the option is not there. Raises ConfigError."""
    value = model.options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise wrong(model, name, "it must be a whole number")
    return int(str(value))


def switch(model: ModelConfig, name: str, *, default: bool = False) -> bool:
    """True or false. Raises ConfigError for anything else."""
    value = model.options.get(name, default)
    if not isinstance(value, bool):
        raise wrong(model, name, "right are true and false")
    return value
