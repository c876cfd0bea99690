"""Install engines, and choose between their versions.

install makes an environment for llama.cpp, vllm, sglang or transformers, such
as vllm==0.33.0, without a version for the newest; it is used once it has shown
that it starts. list shows what is installed. use chooses another version,
rollback the one before, remove deletes one. warm starts each model of an engine that has
not been started in the version in use, and stops it again: it compiles then,
and not when somebody waits for it. An engine that runs goes on as it
is: vllmctl reload moves models that are loaded over, once their requests have
ended. On a machine with vllmd's units the engines are everybody's, installed by
a service of its own, which root and the group vllmd-admin may ask; with --user,
or without the units, they are yours. A proxy is named by HTTPS_PROXY.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from vllmd.cli import show
from vllmd.cli.failures import EX_UNAVAILABLE, EX_USAGE, Failure
from vllmd.frozen import frozen

ALIASES = ("engines",)
ACTIONS = ("install", "list", "use", "rollback", "remove", "warm", "serve")


@frozen
class Line:
    """An environment as ``engine list`` tells it. ``size`` in bytes; ``installed``: Unix time."""

    engine: str
    version: str
    in_use: bool
    build: str
    size: int
    installed: float
    path: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", metavar="install|list|use|rollback|remove|warm")
    parser.add_argument("engine", nargs="?", default="", metavar="ENGINE[==VERSION]")
    parser.add_argument("version", nargs="?", default="", metavar="VERSION")
    parser.add_argument(
        "--build", choices=("auto", "cpu", "cuda"), default="auto", help="instead of what this machine is for"
    )
    parser.add_argument("--index-url", metavar="URL", default="", help="take packages from there and nowhere else")
    parser.add_argument("--offline", metavar="DIR", default="", help="take packages from this folder of wheels")
    parser.add_argument("--python", metavar="PATH", default="", help="the Python that runs it (default: vllmctl's own)")
    parser.add_argument("--no-use", action="store_true", help="install it, and go on with the version in use")


def run(arguments: argparse.Namespace) -> int:
    kind, _, version = arguments.engine.partition("==")
    if arguments.version and version:
        raise Failure(f"two versions: {version} and {arguments.version}", EX_USAGE)
    version = version or arguments.version
    match arguments.action:
        case "list":
            return listed(arguments, kind)
        case "serve":
            from vllmd.installer.service import serve

            return serve()
        case "warm" if kind:
            return warm(arguments, kind)
        case "install" | "rollback" if kind:
            return (install if arguments.action == "install" else changed)(arguments, kind, version)
        case "use" | "remove" if kind and version:
            return changed(arguments, kind, version)
        case "install" | "rollback" | "use" | "remove" | "warm" as action:
            words = {"install": "ENGINE[==VERSION]", "rollback": "ENGINE", "warm": "ENGINE"}
            raise Failure(f"say which: vllmctl engine {action} {words.get(action, 'ENGINE VERSION')}", EX_USAGE)
        case action:
            raise Failure(f"vllmctl engine cannot {action!r}; it can {', '.join(ACTIONS[:-1])}", EX_USAGE)


def install(arguments: argparse.Namespace, kind: str, version: str) -> int:
    from vllmd.cli import installing

    folder = str(Path(arguments.offline).absolute()) if arguments.offline else ""
    done = installing.install(
        arguments,
        kind,
        version=version,
        build=arguments.build,
        index_url=arguments.index_url,
        offline=folder,
        python=arguments.python,
        use=not arguments.no_use,
    )
    if arguments.json:
        print(show.as_json(asdict(done)))
        return 0
    build = installing.CALLED.get(done.build, "")
    is_ = "is installed" if done.fresh else "was installed already"
    show.say(" ".join(filter(None, (kind, done.version, build, is_, f"in {done.path}"))))
    if done.lacks:
        show.say(f"without {done.lacks}, which was not to be had: vllmctl pull finds nothing on the hub", sys.stderr)
    if done.used:
        _say_use(kind, done.version, done.before)
    else:
        show.say(f"vllmctl engine use {kind} {done.version} lets models be started in it")
    _say_hidden(kind)
    return 0


def changed(arguments: argparse.Namespace, kind: str, version: str) -> int:
    """Do ``use``, ``rollback`` or ``remove``, and print the result."""
    from vllmd.cli import installing
    from vllmd.installer.requests import Chosen, Removed

    request = {"verb": arguments.action, "kind": kind, "version": version}
    if arguments.action == "remove":
        from vllmd.engines import compile_caches, environments

        # The homes in which the version may have left what it compiled, which no other version uses.
        known = environments.in_use(kind, version)
        homes = compile_caches.homes(known.path.parent.parent) if known else []
        removed = installing.perform(arguments, request, Removed)
        for home in homes:
            if why := compile_caches.remove(home, kind, version):
                place = compile_caches.place(home, kind, version)
                show.say(f"what it compiled is still there ({why}); as root: rm -r {place}", sys.stderr)
        now = f"; {removed.now} is in use" if removed.now else f"; no {kind} is installed any more"
        print(show.as_json(asdict(removed))) if arguments.json else show.say(f"{kind} {version} is removed{now}")
        return 0
    chosen = installing.perform(arguments, request, Chosen)
    if arguments.json:
        print(show.as_json(asdict(chosen)))
    else:
        _say_use(kind, chosen.version, chosen.before)
        _say_hidden(kind)
    return 0


def warm(arguments: argparse.Namespace, kind: str) -> int:
    """Start and stop each model that has not run in the version in use, so that it compiles now."""
    from vllmd.api.verbs import verb
    from vllmd.cli import models
    from vllmd.cli.admin import Admin
    from vllmd.config.engine_kinds import one_name
    from vllmd.engines import environments
    from vllmd.installer import folders

    kind = folders.known_kind(kind)
    used = environments.in_use(kind)
    if used is None:
        raise Failure(f"no {kind} is installed; vllmctl engine install {kind}", EX_USAGE)
    admin, warmed, failed = Admin(arguments), list[str](), False
    of_kind = [line for line in admin.status().models if one_name(line.config.engine or "") == kind]
    for line in of_kind:
        if line.state != "stopped" or line.disabled or line.version == used.version:
            continue
        try:
            for each in ("load", "unload"):
                models.change(admin, line.name, verb(each), {}, quiet=arguments.json)
            warmed.append(line.name)
        except Failure as failure:  # the others may be well
            failed = True
            show.say(f"vllmctl: {failure}", sys.stderr)
    if arguments.json:
        print(show.as_json(warmed))
    elif not warmed and not failed:
        show.say(f"every model of {kind} is loaded, or has been started in {kind} {used.version}")
    return EX_UNAVAILABLE if failed else 0


def _say_use(kind: str, version: str, before: str) -> None:
    if before in ("", version):
        show.say(f"{kind} {version} is in use")
    else:
        show.say(f"{kind} {version} is in use, {before} was: vllmctl reload moves models over that are loaded, "
                 f"vllmctl engine warm {kind} has the others compile now, "
                 f"vllmctl engine rollback {kind} goes back")  # fmt: skip


def _say_hidden(kind: str) -> None:
    """Say that a program in PATH is used instead of the environments, where there is one."""
    import shutil

    from vllmd.engines import environments

    program = environments.PROGRAMS[kind]
    if program and (found := shutil.which(program)):
        show.say(f"models run {found} all the same, which is in PATH, unless engine_version says a version", sys.stderr)


def listed(arguments: argparse.Namespace, kind: str) -> int:
    from vllmd.engines import environments
    from vllmd.installer import folders

    kinds = [folders.known_kind(kind)] if kind else list(environments.PROGRAMS)
    lines: list[Line] = []
    for each in kinds:
        used = environments.in_use(each)
        for one in environments.installed(each):
            note = folders.noted(one)
            in_use = used is not None and used.path == one.path
            lines.append(Line(each, one.version, in_use, note.build, note.size, note.at, str(one.path)))
    if arguments.json:
        print(show.as_json([asdict(line) for line in lines]))
    elif not lines:
        show.say(f"no engine is installed; vllmctl engine install {kind or 'llama.cpp'}")
    else:
        head = ("", "ENGINE", "VERSION", "BUILD", "SIZE", "PATH")
        rows = [("*" if line.in_use else "", line.engine, line.version, line.build or show.EMPTY,
                 show.size(line.size), line.path) for line in lines]  # fmt: skip
        print(show.table(head, rows, right=("SIZE",), beneath=("PATH",)))
        for each in {line.engine for line in lines}:
            _say_hidden(each)
    return 0
