"""Shared by the verbs on models: their argument, finding a model in the status, following a change of one."""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllmd.api.answers import ModelLine, Progress, Status
from vllmd.cli import show, standing
from vllmd.cli.admin import Admin, decoded, understood
from vllmd.cli.failures import EX_DATAERR, EX_UNAVAILABLE, Failure
from vllmd.cli.terminal import cut
from vllmd.errors import VllmdError

if TYPE_CHECKING:
    from vllmd.api.verbs import Verb


def argument(parser: argparse.ArgumentParser, many: bool = True, optional: bool = False) -> None:
    """Add the argument MODEL, several of it with ``many``, none with ``optional``."""
    about = "name, alias, or the end of a name that only one model has"
    if many:
        parser.add_argument("models", nargs="*" if optional else "+", metavar="MODEL", help=about)
    else:
        parser.add_argument("model", metavar="MODEL", help=about)


def find(status: Status, name: str) -> ModelLine:
    """The status line of a model or replica, by any name that the daemon would accept. Raises Failure."""
    from vllmd.api.names import Names  # most verbs leave it to the daemon

    lines = {line.name: line for line in status.models}
    replicas = {replica.name: replica for line in status.models for replica in line.replicas}
    names = Names(((line.name, line.config.aliases or ()) for line in status.models), (), "vllmctl models lists them")
    if not name:
        raise Failure("a model's name is empty", EX_DATAERR)
    try:
        configured = names.with_replica(name, replicas.__contains__)
    except VllmdError as error:
        raise Failure(error.message, EX_DATAERR) from None
    return replicas.get(configured) or lines[configured]


def every(status: Status) -> Iterator[tuple[ModelLine, list[str]]]:
    """The line of every model and replica, with all its names: a replica of ``m``, alias ``a``, is ``a@2`` as well."""
    for line in status.models:
        names = [line.name, *(line.config.aliases or ())]
        yield line, names
        for replica in line.replicas:
            yield replica, [name + replica.name.removeprefix(line.name) for name in names]


def each(arguments: Namespace, act: Callable[[Admin, str], Any]) -> int:
    """Call ``act`` for every model named; with --json print all answers in one list."""
    admin = Admin(arguments)
    answers = [act(admin, model) for model in arguments.models]
    if arguments.json:
        print(show.as_json(answers))
    return 0


def follow(arguments: Namespace, verb: Verb, given: Mapping[str, object], done: str = "") -> int:
    """Call a verb for every model named and show its progress; ``done`` is the end of the line printed then."""

    def act(admin: Admin, model: str) -> Any:
        if getattr(arguments, "no_wait", False):
            answer = admin.ask(verb, {**given, "model": model})
            if not arguments.json:
                show.say(f"{standing.now(understood(ModelLine, answer), made=True)}; vllmctl ps shows how it goes on")
            return answer
        return change(admin, model, verb, given, done, quiet=arguments.json)

    return each(arguments, act)


def change(
    admin: Admin, model: str, verb: Verb, given: Mapping[str, object], done: str = "", *, quiet: bool
) -> Progress:
    """Call a verb and show the model's progress until it has settled. Raises Failure if that fails."""
    line, began = show.StatusLine(quiet), time.monotonic()
    usual, last = usual_start(admin, model) if verb.name in ("load", "wake") else None, Progress()
    for text in admin.follow(verb, {**given, "model": model}):
        last = understood(Progress, decoded(text) or {})
        if last.error or last.done:
            break
        line.say(progress(model, last, usual), f"{last.state} {last.phase}")
    line.clear()
    if last.error:
        raise Failure(f"{model}: {last.error.message or 'failed'}", EX_UNAVAILABLE)
    if not quiet:
        took = show.age(time.monotonic() - began if last.seconds is None else last.seconds)
        show.say(f"{model} is {show.state(last.state)} after {took}{done.format(model=model)}")
    return last


def progress(model: str, line: Progress, usual: float | None) -> Callable[[float], str]:
    """A function of the seconds since: ``qwen: starting: weights 3/8, 12s of about 44s``, fit for one line."""
    state = ": ".join(filter(None, (line.state.replace("_", " "), show.phase(line))))
    about = f" of about {show.age(usual)}" if usual else ""

    def text(since: float) -> str:
        rest, seconds = f": {state}", f", {show.age((line.elapsed or 0.0) + since)}{about}"
        if (most := show.columns(sys.stderr)) is None:
            return model + rest + seconds
        room = most - 1 - show.width(seconds)
        return cut(show.shortened(model, max(12, room - show.width(rest))) + rest, room) + seconds

    return text


def usual_start(admin: Admin, model: str) -> float | None:
    """The seconds that the model's last start took, if they are known."""
    try:
        seconds = find(admin.status(), model).last_start_seconds
    except Failure:
        return None  # the verb itself will say what is wrong, in the daemon's words
    return seconds or None
