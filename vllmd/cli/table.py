"""Verbs of vllmctl that are rows of the table of operators' verbs: their arguments, and what they print.

A verb with more to show than a line for each thing done has a file in ``verbs/``, which takes its arguments from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from vllmd.api import verbs
from vllmd.api.kinds import Choice, Flag, ModelName, Seconds
from vllmd.api.verbs import Command, Param, Verb
from vllmd.cli import models, show
from vllmd.cli.admin import Admin


class TableVerb:
    """Has what a module of ``verbs/`` has: a docstring, ``ALIASES``, ``arguments`` and ``run``."""

    def __init__(self, verb: Verb, command: Command) -> None:
        self._verb = verb
        self._command = command
        self.__doc__ = f"{command.about}.\n\n{command.more}".strip()
        self.ALIASES = command.aliases

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """All parameters but those that the command has fixed."""
        add_arguments(parser, self._verb, self._command.fixed)

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it for each thing named."""
        if self._verb.settles:
            return models.follow(arguments, self._verb, given(arguments, self._verb), self._command.said)
        admin, answers = Admin(arguments), list[object]()
        for values in self._each(arguments):
            answers.append(admin.ask(self._verb, values))
            if not arguments.json:
                show.say(said(self._command, answers[-1], values))
        if arguments.json:
            print(show.as_json(answers if many(self._verb) else answers[0]))
        return 0

    def _each(self, arguments: argparse.Namespace) -> Iterator[Mapping[str, object]]:
        """The parameters of each thing named, with what is fixed."""
        values = {**given(arguments, self._verb), **self._command.fixed}
        several = many(self._verb)
        for each in getattr(arguments, dest(several)) if several else [None]:
            yield {**values, **({several.name: each} if several else {})}


class _Told(dict[str, object]):
    """What an answer does not tell is nothing."""

    def __missing__(self, key: str) -> str:
        return ""


def said(command: Command, answer: object, values: Mapping[str, object]) -> str:
    """What is printed when it is done; without words of its own the answer, a line for each of its fields."""
    told = answer if isinstance(answer, dict) else {}
    return command.said.format_map(_Told({**told, **values})) if command.said else show.pairs(told)


def commands() -> dict[str, TableVerb]:
    """All of them by name."""
    return {command.name: TableVerb(verb, command) for verb in verbs.VERBS for command in verb.commands}


def add_arguments(parser: argparse.ArgumentParser, verb: Verb, fixed: Mapping[str, object] | None = None) -> None:
    """An argument for each parameter of a row: a word for one of the path, an option for any other."""
    for param in verb.params:
        if param.name in (fixed or {}):
            continue
        if param.place == "path":
            name, several = dest(param), "+" if param.many else None
            parser.add_argument(name, nargs=several, type=_type(param), metavar=param.metavar, help=param.about)
        elif isinstance(param.kind, Flag):
            parser.add_argument(*_flags(param), dest=param.name, action="store_true", help=param.about)
        else:
            choices = param.kind.among if isinstance(param.kind, Choice) else None
            default, required = (None, True) if param.default is verbs.REQUIRED else (param.default, False)
            parser.add_argument(*_flags(param), dest=param.name, type=_type(param), choices=choices, default=default,
                                required=required, metavar=param.metavar or None, help=param.about)  # fmt: skip
    if verb.settles:
        parser.add_argument("--no-wait", action="store_true", help="ask for it and return")


def given(arguments: argparse.Namespace, verb: Verb) -> dict[str, object]:
    """The parameters that are on the command line, but for the words of which there may be several."""
    asked = vars(arguments)
    return {each.name: asked[each.name] for each in verb.params if each.name in asked}


def many(verb: Verb) -> Param | None:
    """The parameter of which several may be named."""
    return next((each for each in verb.params if each.many), None)


def dest(param: Param) -> str:
    """The name under which argparse keeps the parameter's value."""
    return f"{param.name}s" if param.many else param.name


def _flags(param: Param) -> tuple[str, ...]:
    return param.flags or (f"--{param.name.replace('_', '-')}",)


def _type(param: Param) -> Any:
    """What reads it; argparse reports what is wrong with it."""
    kind = param.kind
    if isinstance(kind, Seconds):
        from vllmd.cli.values import duration

        return duration
    if isinstance(kind, ModelName | Choice):
        return str if isinstance(kind, ModelName) else int

    def read(text: str) -> object:
        try:
            return kind.of_text(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.accepts}") from None

    return read
