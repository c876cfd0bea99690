"""Advice for a machine without models: lines with commands that work as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.api.answers import CachedModel, Status

FIRST_LINE = "no models yet; vllmctl run smollm2 fetches a small one, serves it and asks it"


def advice(status: Status, cached: Sequence[CachedModel] = ()) -> list[str]:
    """Lines of advice, with models of the engines' cache (``cached``) and of the user's own that could be added."""
    lines = [FIRST_LINE]
    names = [one.name for one in cached]
    lines += [f"in the engines' cache: {name}; vllmctl add {name} serves it" for name in names[:3]]
    if len(names) > 1:
        lines.append(f"all of the cache: discover: true in {file_of(status)}, then vllmctl reload")
    from vllmd.store.elsewhere import own_cache

    own = [name for name, _ in own_cache() if name not in names]
    if own:
        lines.append(f"in your own cache: {', '.join(own[:3])}; vllmctl add {own[0]} serves it from there")
    lines.append(f"the configuration is {file_of(status)}, see vllmd.yaml(5)")
    return lines


def file_of(status: Status) -> str:
    """The main file of the configuration."""
    files = status.configuration.files
    return str(files[0]) if files else "/etc/vllmd/vllmd.yaml"
