"""Show a model: engine, source, files and their size, names, context, capabilities."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from urllib.parse import quote

from vllmd.api.answers import Cached, CachedModel, ModelLine
from vllmd.api.json_types import ForeignJson
from vllmd.api.verbs import verb
from vllmd.cli import models, show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import Failure
from vllmd.cli.verbs import ps


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status, cached = admin.status(), admin.perform(verb("cached"), Cached, {}).cached
    try:
        line, facts = models.find(status, arguments.model), dict[str, object]()
    except Failure:
        facts = of_cache(arguments.model, cached)  # a name of the cache, which need not be a model's
        if not facts:
            raise
    else:
        name = line.replica_of or line.name
        card = admin.get(f"/v1/models/{quote(name, safe='')}")
        facts = of_model(line, card, [one for one in cached if name in one.models])
    if arguments.json:
        print(show.as_json(facts))
    else:
        print(show.pairs({name: value for name, value in facts.items() if value not in ("", None, [])}))
    return 0


def of_cache(name: str, cached: Sequence[CachedModel]) -> dict[str, object]:
    """The facts of a model in the cache; empty if it is not there."""
    found = next((one for one in cached if name in (one.name, one.path)), None)
    return {"model": name, "state": f"cached; vllmctl add {name} serves it", **_files([found])} if found else {}


def of_model(line: ModelLine, card: ForeignJson, cached: Sequence[CachedModel]) -> dict[str, object]:
    """The facts of a configured model, from its status line, its card and its entries in the cache."""
    config, phases = line.config, show.phases(line)
    start: dict[str, object] = {"start so far": phases}
    if line.state != "starting":
        last = f"{show.age(line.last_start_seconds)}{f': {phases}' if phases else ''}"
        start = {"last start": last if line.last_start_seconds else ""}
    return {
        "model": line.name,
        "state": line.state,
        "note": ps.note(line),
        **start,
        "engine": f"{config.engine or ''} {line.version}".strip(),
        "source": config.model or line.name,
        **_files(cached),
        "aliases": ", ".join(config.aliases or ()),
        "context": card.get("max_model_len") or "",
        "can": ", ".join(card.get("capabilities", ())),
        "memory": show.size(line.memory) if line.memory else "",
        "description": card.get("description", ""),
    }


def _files(cached: Sequence[CachedModel]) -> dict[str, object]:
    return {
        "files": ", ".join(one.path for one in cached),
        "size": show.size(sum(one.size for one in cached)) if cached else "",
        "quantisations": ", ".join(name for one in cached for name in one.files),
    }
