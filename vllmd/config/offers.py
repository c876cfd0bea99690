"""The names that clients may ask for beside those of models: adapters, variants, pools.

Each is one name of one thing: a name that two things have is an error of the configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from vllmd.config.engine_kinds import ENGINE_KINDS, one_name
from vllmd.config.types import Config, ModelConfig, PoolConfig

LORA_MODULES = "--lora-modules"  # vLLM's
LOAD_LATE = frozenset({"vllm", "sim"})
WITH_ADAPTERS = frozenset({"vllm", "llama.cpp", "sim"})  # and plug-ins that say so


def lora_modules(argv: Sequence[str]) -> dict[str, str]:
    """The adapters that flags of vLLM's name, each with its path: ``NAME=PATH`` or JSON, several after one flag."""
    adapters: dict[str, str] = {}
    is_value = False
    for word in argv:
        flag, equals, rest = word.partition("=")
        if word.startswith("-"):
            is_value = flag.replace("_", "-") == LORA_MODULES
            word = rest if equals else ""
        if not is_value or not word:
            continue
        if word.startswith(("{", "[")):
            import json  # most configurations have none, and the first request waits for imports

            with contextlib.suppress(ValueError):
                parsed = json.loads(word)
                for each in parsed if isinstance(parsed, list) else [parsed]:
                    if isinstance(each, Mapping) and isinstance(each.get("name"), str):
                        adapters[each["name"]] = str(each.get("path", ""))
        else:
            name, equals, path = word.partition("=")
            adapters |= {name: path} if equals and name else {}
    return adapters


def adapters_of(model: ModelConfig) -> dict[str, str]:
    """The adapters of a model by name, with their paths: its own setting, and vLLM's flags."""
    flags = lora_modules(model.extra_args) if one_name(model.engine) in ("vllm", "sim") else {}
    return {**flags, **{name: adapter.path for name, adapter in model.adapters.items()}}


def names_of(config: Config) -> dict[str, str]:
    """Every name but those of pools, each with what it is, in words."""
    names = dict.fromkeys(config.models, "a model")
    for model in config.models.values():
        names.update((alias, f"an alias of {model.name!r}") for alias in model.aliases)
        names.update((name, f"an adapter of {model.name!r}") for name in adapters_of(model))
        names.update((name, f"a variant of {model.name!r}") for name in model.variants)
    return names


def wrong(config: Config) -> Iterator[tuple[str, str, str]]:
    """What cannot work: the model's name ("" for pools), the setting's path, and what is wrong."""
    owner: dict[str, str] = dict.fromkeys(config.models, "a model")  # of each name, in words
    for model in config.models.values():
        owner.update((alias, f"an alias of {model.name!r}") for alias in model.aliases if alias not in owner)
    for model in config.models.values():
        yield from adapters_and_variants(model, owner)
    for name, pool in config.pools.items():
        if name in owner:
            yield "", f"pools.{name}", f"{name!r} is {owner[name]} already"
        yield from pool_members(name, pool, config, owner)


def adapters_and_variants(model: ModelConfig, owner: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a model's adapters and variants; their names are added to ``owner``."""
    if not model.adapters and not model.variants and not model.runtime_adapters and not adapters_of(model):
        return
    kind = one_name(model.engine)
    if model.adapters and kind in ENGINE_KINDS and kind not in WITH_ADAPTERS:
        what = f"the engine {kind} has no adapters here; {', '.join(sorted(WITH_ADAPTERS - {'sim'}))} have"
        yield model.name, f"models.{model.name}.adapters", what
    if model.runtime_adapters and kind in ENGINE_KINDS and kind not in LOAD_LATE:
        what = f"the engine {kind} loads no adapters while it runs; vllm does"
        yield model.name, f"models.{model.name}.runtime_adapters", what
    for name, adapter in model.adapters.items():
        if not adapter.path or adapter.path.startswith("-"):
            what = "a path cannot begin with -" if adapter.path else "path is missing: its folder, or a repository id"
            yield model.name, f"models.{model.name}.adapters.{name}", what
    offered = [("adapters", name) for name in adapters_of(model)] + [("variants", name) for name in model.variants]
    for setting, name in offered:
        if name in owner:
            yield model.name, f"models.{model.name}.{setting}.{name}", f"{name!r} is {owner[name]} already"
        owner.setdefault(name, f"{'an adapter' if setting == 'adapters' else 'a variant'} of {model.name!r}")


def pool_members(
    name: str, pool: PoolConfig, config: Config, known: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the models of a pool. ``known``: every name but those of pools."""
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
