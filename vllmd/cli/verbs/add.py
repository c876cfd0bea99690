"""Serve a model whose files are here already.

MODEL is a repository in the engines' cache (ORG/NAME, ORG/NAME:QUANT), or in
your own; the path of a GGUF file or of a folder; or with --ollama or --lmstudio
the name that it has there. Nothing is copied. Without MODEL they are listed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from vllmd.api.json_types import Settings
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_DATAERR, EX_NOINPUT, EX_UNAVAILABLE, EX_USAGE, Failure

HEAD = ("MODEL", "SIZE", "WHERE")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="repository, path, or a name there")
    parser.add_argument("--ollama", action="store_true", help="MODEL is one of Ollama's, such as llama3.2:1b")
    parser.add_argument("--lmstudio", action="store_true", help="MODEL is one of LM Studio's")
    parser.add_argument("--name", metavar="NAME", help="what it is called (default: as there)")
    parser.add_argument("--alias", action="append", default=[], metavar="NAME", help="another name; may be repeated")
    parser.add_argument("--engine", metavar="KIND", help="instead of the one that its files are for")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.model:
        return offer(arguments)
    admin = Admin(arguments)
    name, settings = name_and_settings(admin, arguments)
    if arguments.engine:
        settings["engine"] = arguments.engine
    if arguments.alias:
        settings["aliases"] = arguments.alias
    answer = admin.put(f"/admin/store/models/{quote(name, safe='')}", settings)
    if arguments.json:
        print(show.as_json(answer))
        return 0
    status, source = admin.status(), str(settings.get("model", ""))
    if never := next((line.never for line in status.models if line.name == name), ""):
        raise Failure(f"{name} was added, but it can never be loaded: {never}; its settings, which may help: "
                      f"{answer['file']}; vllmctl rm {name} takes it away again", EX_UNAVAILABLE)  # fmt: skip
    show.say(f"{name} is served from now on; vllmctl run {name} asks it. Its settings: {answer['file']}")
    if source.startswith("/") and status.backend == "systemd" and (advice := unreadable(Path(source))):
        show.say(advice)
    return 0


def offer(arguments: argparse.Namespace) -> int:
    """Show what could be added: the models in the caches of this machine."""
    from vllmd.store.elsewhere import everything, own_cache

    rows: list[tuple[str, str, str]] = []
    if not (arguments.ollama or arguments.lmstudio):
        cached = Admin(arguments).get("/admin/store")["cached"]
        rows += [(one["name"], show.size(one["size"]), "the engines' cache") for one in cached if not one["models"]]
        rows += [(name, show.size(size), "your own cache") for name, size in own_cache()]
    for each in everything():
        if arguments.ollama == arguments.lmstudio or (each.program == "Ollama") == arguments.ollama:
            flag = "--ollama" if each.program == "Ollama" else "--lmstudio"
            rows.append((each.name, show.size(each.size), f"{each.program} (vllmctl add {flag})"))
    data = [dict(zip(("model", "size", "where"), row, strict=True)) for row in rows]
    if arguments.json:
        print(show.as_json(data))
    elif rows:
        print(show.table(HEAD, rows, ("SIZE",), names=("MODEL",), beneath=("WHERE",)))
    else:
        show.say("nothing is here that could be added; vllmctl run smollm2 fetches a small model and asks it")
    return 0


def name_and_settings(admin: Admin, arguments: argparse.Namespace) -> tuple[str, Settings]:
    """The name of the model to be added, and its settings. Raises Failure where there are no such files."""
    from vllmd.store.elsewhere import own_path

    given = str(arguments.model)
    if arguments.ollama or arguments.lmstudio:
        return of_another_program(arguments, given)
    if given.startswith(("/", "./", "../", "~")) or given.endswith(".gguf"):
        path = Path(given).expanduser().absolute()
        name, settings = of_path(path)
        return arguments.name or name, settings
    repository, _, tag = given.partition(":")
    cached = {one["name"]: one for one in admin.get("/admin/store")["cached"]}
    name = arguments.name or given
    if repository in cached:
        engine = {"engine": cached[repository]["engine"]} if cached[repository]["engine"] or tag else {}
        engine = engine if not tag else {"engine": "llama.cpp"}
        return name, {**engine, **({"model": given} if name != given else {})}
    own = own_path(repository)
    if own is None:
        what = f"{given} is not in the engines' cache; vllmctl run {given} fetches and serves it"
        raise Failure(f"{what}, vllmctl add lists what is here", EX_DATAERR)
    return name, of_path(own)[1]


def of_another_program(arguments: argparse.Namespace, name: str) -> tuple[str, Settings]:
    """A model of Ollama's or LM Studio's. Raises Failure."""
    from vllmd.store.elsewhere import everything

    if arguments.ollama and arguments.lmstudio:
        raise Failure("say --ollama or --lmstudio, not both", EX_USAGE)
    program = "Ollama" if arguments.ollama else "LM Studio"
    known = {one.name: one for one in everything() if one.program == program}
    found = known.get(name) or known.get(f"{name}:latest")
    found = found or next((one for one in known.values() if one.path.name == name), None)
    if found is None:
        have = f"it has {', '.join(list(known)[:8])}" if known else f"none of {program}'s models are found here"
        raise Failure(f"{program} has no {name}; {have}", EX_DATAERR)
    short = found.path.stem if program == "LM Studio" else found.name.removesuffix(":latest")
    return arguments.name or short, {"engine": "llama.cpp", "model": str(found.path)}


def of_path(path: Path) -> tuple[str, Settings]:
    """A GGUF file, or a folder that an engine loads. Raises Failure."""
    if path.is_file() and path.suffix == ".gguf":
        return path.stem, {"engine": "llama.cpp", "model": str(path)}
    if not path.is_dir():
        there = "is no GGUF file" if path.exists() else "is not there, or you may not see it"
        raise Failure(f"{path} {there}", EX_NOINPUT)
    ggufs = sorted(each.name for each in path.iterdir() if each.suffix == ".gguf")
    if (path / "config.json").exists():
        return path.name, {"model": str(path)}
    if ggufs:
        return path.name, {"engine": "llama.cpp", "model": str(path / ggufs[0])}
    raise Failure(f"{path} has neither config.json nor a GGUF file: no engine would load it", EX_NOINPUT)


def unreadable(path: Path) -> str:
    """What to do where the engines' user may not read ``path``; "" where every user may."""
    closed = []
    for each in (path, *path.parents):
        try:
            mode = each.stat().st_mode
            needed = 0o001 if each.is_dir() else 0o004
        except OSError:
            mode, needed = 0, 0o004
        if not mode & needed:
            closed.append(each)
    if not closed:
        return ""
    places = " ".join(map(str, closed))
    return f"the engines' user may not read it yet: sudo setfacl -m u:vllmd-engine:rX {places}"
