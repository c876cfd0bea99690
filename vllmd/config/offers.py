"""The names that clients may ask for beside those of models: adapters, variants, pools.

Each is one name of one thing: a name that two things have is an error of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllmd.config.engine_kinds import ENGINE_KINDS, one_name
from vllmd.config.types import Config, ModelConfig, PoolConfig

LORA_MODULES = "--lora-modules"  # vLLM's
LOAD_LATE = frozenset({"vllm", "sim"})
WITH_ADAPTERS = frozenset({"vllm", "llama.cpp", "sim"})  # and plug-ins that say so


def lora_modules(argv: Sequence[str]) -> dict[str, str]:
    """The adapters that flags of vLLM's name, each with its path: ``NAME=PATH`` or JSON, several after one flag."""
    found: dict[str, str] = {}
    words = iter(argv)
    taking = False
    for word in words:
        flag, equals, rest = word.partition("=")
        if word.startswith("-"):
            taking = flag.replace("_", "-") == LORA_MODULES
            word = rest if equals else ""
        if taking and word:
            found.update(_module(word))
    return found


def _module(word: str) -> dict[str, str]:
    if word.startswith(("{", "[")):
        import json  # most configurations have none, and the first request waits for imports

        try:
            told = json.loads(word)
        except ValueError:
            return {}
        entries = told if isinstance(told, list) else [told]
        named = [each for each in entries if isinstance(each, Mapping) and isinstance(each.get("name"), str)]
        return {each["name"]: str(each.get("path", "")) for each in named}
    name, equals, path = word.partition("=")
    return {name: path} if equals and name else {}


def adapters_of(model: ModelConfig) -> dict[str, str]:
    """The adapters of a model by name, with their paths: its own setting, and vLLM's flags."""
    flags = lora_modules(model.extra_args) if one_name(model.engine) in ("vllm", "sim") else {}
    return {**flags, **{name: adapter.path for name, adapter in model.adapters.items()}}


def names_of(config: Config) -> dict[str, str]:
    """Every name but those of pools, each with what it is, in words."""
    found = dict.fromkeys(config.models, "a model")
    for model in config.models.values():
        found.update((alias, f"an alias of {model.name!r}") for alias in model.aliases)
        found.update((name, f"an adapter of {model.name!r}") for name in adapters_of(model))
        found.update((name, f"a variant of {model.name!r}") for name in model.variants)
    return found


def wrong(config: Config) -> Iterator[tuple[str, str, str]]:
    """What cannot work: whose it is (a model's name, "" for pools), the setting's path, and what is wrong."""
    owner: dict[str, str] = dict.fromkeys(config.models, "a model")
    for model in config.models.values():
        owner.update((alias, f"an alias of {model.name!r}") for alias in model.aliases if alias not in owner)
    for model in config.models.values():
        yield from _of_model(model, owner)
    for name, pool in config.pools.items():
        if name in owner:
            yield "", f"pools.{name}", f"{name!r} is {owner[name]} already"
        yield from _members(name, pool, config, owner)


def _of_model(model: ModelConfig, owner: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    kind = one_name(model.engine)
    if model.adapters and kind in ENGINE_KINDS and kind not in WITH_ADAPTERS:
        what = f"the engine {kind} has no adapters here; {', '.join(sorted(WITH_ADAPTERS - {'sim'}))} have"
        yield model.name, f"models.{model.name}.adapters", what
    if model.runtime_adapters and kind in ENGINE_KINDS and kind not in LOAD_LATE:
        what = f"the engine {kind} loads no adapters while it runs; vllm does"
        yield model.name, f"models.{model.name}.runtime_adapters", what
    for name, adapter in model.adapters.items():
        if not adapter.path or adapter.path.startswith("-"):
            what = (
                "path is missing: its folder, or a repository id" if not adapter.path else "a path cannot begin with -"
            )
            yield model.name, f"models.{model.name}.adapters.{name}", what
    offered = [("adapters", name) for name in adapters_of(model)] + [("variants", name) for name in model.variants]
    for setting, name in offered:
        if name in owner:
            yield model.name, f"models.{model.name}.{setting}.{name}", f"{name!r} is {owner[name]} already"
        owner.setdefault(name, f"{'an adapter' if setting == 'adapters' else 'a variant'} of {model.name!r}")


def _members(name: str, pool: PoolConfig, config: Config, known: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """``known``: every name but those of pools."""
    path = f"pools.{name}.models"
    if not pool.models:
        yield "", path, "it names no model"
    for member in dict.fromkeys(pool.models):
        if member in config.pools:
            itself = "the pool itself" if member == name else "a pool, and a pool is made of models"
            yield "", path, f"{member!r} is {itself}"
        elif member not in known and not config.discover:
            import difflib

            near = difflib.get_close_matches(member, known, 1, 0.6)
            yield "", path, f"there is no model {member!r}" + (f'; did you mean "{near[0]}"?' if near else "")
