"""The argument parser, built from the files in ``verbs/``.

A verb is a module there: its name is the file's (``_`` for ``-``), its help the
first line of its docstring, the rest of the docstring its description; it has
``arguments(parser)`` and ``run(arguments)``, and may have ``ALIASES`` or, to
read all its arguments itself, ``TAKES_ALL``. Only the verb that was asked for is
imported; all of them for help and for the manual.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from vllmd.cli.failures import EX_USAGE

PACKAGE = "vllmd.cli.verbs"
FOLDER = os.path.join(os.path.dirname(__file__), "verbs")
WITH_VALUE = ("--socket", "--url", "--key")


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
            raise argparse.ArgumentError(None, f"there is no verb {value!r}{hint}")
        super()._check_value(action, value)


def verbs() -> list[str]:
    """The names of all verbs, sorted."""
    files = (name[:-3] for name in os.listdir(FOLDER) if name.endswith(".py") and not name.startswith("_"))
    return sorted(name.replace("_", "-") for name in files)


def module(verb: str) -> ModuleType:
    """A verb's module."""
    return importlib.import_module(f"{PACKAGE}.{verb.replace('-', '_')}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with ``run`` of the verb; exits with EX_USAGE if they are wrong."""
    names = wanted(argv)
    if len(names) == 1 and getattr(module(names[0]), "TAKES_ALL", False):
        rest = list(argv[argv.index(names[0]) + 1 :])
        return argparse.Namespace(run=module(names[0]).run, rest=rest)
    arguments = build(names).parse_args(argv)
    for name, value in (("socket", None), ("url", None), ("key", None), ("user", False), ("json", False)):
        arguments.__dict__.setdefault(name, value)
    return arguments


def wanted(argv: Sequence[str]) -> list[str]:
    """The verbs that must be imported to understand ``argv``."""
    words = iter(argv)
    for word in words:
        if word in WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return [word] if word in verbs() else verbs()
    return verbs()


def build(names: Sequence[str]) -> Parser:
    """A parser that knows the verbs ``names``."""
    import vllmd

    everywhere = common()
    parser = Parser(
        "vllmctl",
        description="Look at and steer the models of vllmd.",
        epilog="See vllmctl(1), vllmd.yaml(5) and vllmd(8).",
        parents=[everywhere],
    )
    parser.add_argument("--version", action="version", version=f"vllmctl {vllmd.__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", dest="verb", required=True, parser_class=Parser)
    for name in names:
        add(subparsers, name, everywhere)
    return parser


def add(subparsers: Any, name: str, everywhere: argparse.ArgumentParser) -> None:
    """One verb with its aliases."""
    verb = module(name)
    summary, _, rest = (verb.__doc__ or "").partition("\n")
    parser = subparsers.add_parser(
        name,
        help=summary.rstrip("."),
        description=(summary + "\n" + rest).strip(),
        aliases=getattr(verb, "ALIASES", ()),
        parents=[everywhere],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.arguments(parser)
    parser.set_defaults(run=verb.run)


def common() -> argparse.ArgumentParser:
    """What may stand before and after the verb."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where = parser.add_argument_group("which vllmd")
    where.add_argument("--socket", metavar="PATH", help="admin socket (default: /run/vllmd/admin.sock)")
    where.add_argument("--user", action="store_true", help="the vllmd of systemctl --user")
    where.add_argument("--url", help="over HTTP, such as http://gpu1:33258; needs a key with the scope admin")
    where.add_argument("--key", help="API key for --url (default: $VLLMD_API_KEY)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
