"""Verbs of vllmctl that are rows of the table of operators' verbs: their arguments, and the lines they print.

A verb that shows more than a line for each thing done has a file in ``verbs/`` instead.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
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
        """Call the verb for each thing named on the command line, and print a line for each."""
        values = given(arguments, self._verb)
        if self._verb.settles:
            return models.follow(arguments, self._verb, values, self._command.printed)
        admin, answers, values = Admin(arguments), list[object](), {**values, **self._command.fixed}
        several = next((each for each in self._verb.params if each.many), None)
        for each in getattr(arguments, dest(several)) if several else [None]:
            values |= {several.name: each} if several else {}
            answer = admin.ask(self._verb, values)
            answers.append(answer)
            if not arguments.json:
                fields = answer if isinstance(answer, dict) else {}
                text = self._command.printed
                # An older daemon's answer may lack a field that the text has.
                show.say(text.format_map(defaultdict(str, {**fields, **values})) if text else show.pairs(fields))
        if arguments.json:
            print(show.as_json(answers if several else answers[0]))
        return 0


def commands() -> dict[str, TableVerb]:
    """The table's verbs of vllmctl by name."""
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
    """The parameters that are on the command line, but for the word that may be given several times."""
    values = vars(arguments)
    return {each.name: values[each.name] for each in verb.params if each.name in values}


def dest(param: Param) -> str:
    """The attribute in which argparse keeps the parameter's value."""
    return f"{param.name}s" if param.many else param.name


def _flags(param: Param) -> tuple[str, ...]:
    return param.flags or (f"--{param.name.replace('_', '-')}",)


def _type(param: Param) -> Any:
    """The function that parses the parameter for argparse, which reports its errors."""
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
