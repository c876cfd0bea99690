"""The argument parser, built from the files in ``verbs/`` and the table of operators' verbs (``table``).

A verb is a module there: its name is the file's (``_`` for ``-``), its help the first line of its docstring, the rest
of the docstring its description; it has ``arguments(parser)`` and ``run(arguments)``, and may have ``ALIASES`` or, to
parse all its arguments itself, ``TAKES_ALL``. Only the verb that is called is imported; all of them for help and for
the manual. So a module that few verbs need (the configuration, engines, the table) is imported where it is used.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from vllmd.cli.failures import EX_USAGE

if TYPE_CHECKING:
    from vllmd.cli.table import TableVerb

PACKAGE = "vllmd.cli.verbs"
FOLDER = os.path.join(os.path.dirname(__file__), "verbs")
WITH_VALUE = ("--socket", "--url", "--key")

# Verbs of other programs, and what does their work here.
VERBS_ELSEWHERE = {
    "create": "vllmctl add serves a model whose files are here, vllmctl pull fetches one",
    "download": "vllmctl pull fetches a model",
    "install": "vllmctl run MODEL fetches a model and asks it",
    "cp": "aliases: in the configuration gives a model another name",
    "push": "models are not pushed anywhere",
    "serve": "vllmd serve does that by hand, systemctl enable --now vllmd.socket for good",
    "enable": "systemctl enable --now vllmd.socket",
    "edit": "edit /etc/vllmd/vllmd.yaml, then vllmctl reload",
    "check": "vllmctl config check looks at the file, vllmd --check at models and devices as well",
    "devices": "vllmctl gpus",
    "metrics": "curl http://127.0.0.1:33258/metrics",
    "tail": "vllmctl logs -f MODEL",
    "journal": "vllmctl logs MODEL, or journalctl -u vllmd",
    "health": "vllmctl status, or vllmctl doctor",
}
FIRST_STEPS = """\
first steps:
  vllmctl run smollm2 "Hello"   fetch a small model, serve it and ask it
  vllmctl status                how vllmd and its models are
  vllmctl why MODEL             why one waits, or has failed
  vllmctl doctor                what is wrong with this machine, what helps

See vllmctl(1), vllmd.yaml(5) and vllmd(8).
"""
VERBS_ELSEWHERE |= dict.fromkeys(("delete", "del", "uninstall"), "vllmctl rm removes a model")


class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage ends with EX_USAGE and offers the nearest verb."""

    def error(self, message: str) -> NoReturn:
        from vllmd.cli.terminal import columns, wrapped

        self.exit(EX_USAGE, wrapped(f"{self.prog}: {message}", columns(sys.stderr)) + f"\n{self.format_usage()}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            import difflib

            near = difflib.get_close_matches(str(value), action.choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; {self.prog} --help lists them"
            hint = f"; {VERBS_ELSEWHERE[value]}" if value in VERBS_ELSEWHERE else hint
            raise argparse.ArgumentError(None, f"there is no verb {value!r}{hint}")
        super()._check_value(action, value)


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, but fills a paragraph anew that the terminal is too narrow for."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = super()._fill_text(text, width, indent).split("\n\n")
        return "\n\n".join(_filled(paragraph.splitlines(), width) for paragraph in paragraphs)


def _filled(lines: list[str], width: int) -> str:
    """Lines that are indented are no text that flows: each is only cut in two where it has to be."""
    if all(len(line) <= width for line in lines):
        return "\n".join(lines)
    if any(line.startswith(" ") for line in lines):
        return "\n".join(part for line in lines for part in (textwrap.wrap(line, width) or [""]))
    return "\n".join(textwrap.wrap(" ".join(lines), width))


def verbs() -> list[str]:
    """The names of all verbs, sorted."""
    from vllmd.cli import table

    files = (name[:-3] for name in os.listdir(FOLDER) if name.endswith(".py") and not name.startswith("_"))
    return sorted({*(name.replace("_", "-") for name in files), *table.commands()})


def module(verb: str) -> ModuleType | TableVerb:
    """A verb's module, or what a row of the table has in its place."""
    if _has_file(verb):
        return importlib.import_module(f"{PACKAGE}.{verb.replace('-', '_')}")
    from vllmd.cli import table

    return table.commands()[verb]


def _has_file(verb: str) -> bool:
    name = verb.replace("-", "_")
    return name.isidentifier() and not name.startswith("_") and os.path.exists(os.path.join(FOLDER, f"{name}.py"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with ``run`` of the verb; exits with EX_USAGE if they are wrong."""
    names = wanted(argv)
    if len(names) == 1 and getattr(module(names[0]), "TAKES_ALL", False):
        rest = list(argv[argv.index(names[0]) + 1 :])
        return argparse.Namespace(run=module(names[0]).run, rest=rest)
    parser = build(names)
    arguments, unknown = parser.parse_known_args(in_order(parser, argv))
    if unknown:  # with the verb's usage: argparse itself would show that of vllmctl
        verb = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        verb.choices[arguments.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, value in (("socket", None), ("url", None), ("key", None), ("user", False), ("json", False)):
        arguments.__dict__.setdefault(name, value)
    return arguments


def in_order(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The verb, its options, then its words: options may stand anywhere.

    argparse of Python 3.11 takes no more words once an option stood between two of them.
    """
    place = _verb(argv)
    choices = next(each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    verb = choices.get(argv[place]) if choices is not None and place < len(argv) else None
    if verb is None or any(isinstance(each, argparse._SubParsersAction) for each in verb._actions):
        return list(argv)
    options, words, rest = list[str](), list[str](), iter(argv[place + 1 :])
    for word in rest:
        if word == "--":
            words += rest
        elif len(word) > 1 and word.startswith("-"):
            value = next(rest, None) if _takes_value(verb, word) else ""
            if value is None:
                return list(argv)  # which is an error
            # In one word, as a value may begin with a dash, too: --since -1h.
            options.append(word + ("=" * word.startswith("--") + value if value else ""))
        else:
            words.append(word)
    ends = ["--"] if any(word.startswith("-") for word in words) else []
    return [*argv[: place + 1], *options, *ends, *words]


def _takes_value(parser: argparse.ArgumentParser, word: str) -> bool:
    """Whether the next word is the value of this option: the option has one, and not in the same word."""
    if "=" in word or (not word.startswith("--") and len(word) > 2):
        return False
    known = parser._option_string_actions
    options = [known[word]] if word in known else [action for name, action in known.items() if name.startswith(word)]
    return bool(options) and options[0].nargs != 0


def _verb(argv: Sequence[str]) -> int:
    """The place of the verb among the words of the command line."""
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        place += 2 if argv[place] in WITH_VALUE else 1
    return place


def wanted(argv: Sequence[str]) -> list[str]:
    """The verbs that must be imported to understand ``argv``."""
    verb = argv[_verb(argv) :][:1]
    return list(verb) if verb and (_has_file(verb[0]) or verb[0] in verbs()) else verbs()


def build(names: Sequence[str]) -> Parser:
    """A parser that knows the verbs ``names``."""
    import vllmd

    everywhere = common()
    parser = Parser(
        "vllmctl",
        description="Look at and steer the models of vllmd.",
        epilog=FIRST_STEPS,
        formatter_class=Help,
        parents=[everywhere],
    )
    parser.add_argument("--version", action="version", version=f"vllmctl {vllmd.__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", dest="verb", required=True, parser_class=Parser)
    for name in names:
        add(subparsers, name, everywhere)
    return parser


def add(subparsers: Any, name: str, everywhere: argparse.ArgumentParser) -> None:
    """Add a verb's parser, under its aliases as well."""
    verb = module(name)
    summary, _, rest = (verb.__doc__ or "").partition("\n")
    parser = subparsers.add_parser(
        name,
        help=summary.rstrip("."),
        description=(summary + "\n" + rest).strip(),
        aliases=getattr(verb, "ALIASES", ()),
        parents=[everywhere],
        formatter_class=Help,
    )
    verb.arguments(parser)
    parser.set_defaults(run=verb.run)


def common() -> argparse.ArgumentParser:
    """The options that may stand before or after the verb."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where = parser.add_argument_group("which vllmd")
    where.add_argument("--socket", metavar="PATH", help="admin socket (default: /run/vllmd/admin.sock)")
    where.add_argument("--user", action="store_true", help="the vllmd of systemctl --user")
    where.add_argument("--url", help="over HTTP, such as http://gpu1:33258; needs a key with the scope admin")
    where.add_argument("--key", help="API key for --url (default: $VLLMD_API_KEY)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
