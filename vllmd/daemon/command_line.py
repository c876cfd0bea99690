"""The command line of ``vllmd``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import vllmd
from vllmd.config.settings import flags

EX_USAGE = 64


def arguments(given: Sequence[str]) -> tuple[Path | None, bool, Mapping[str, str]]:
    """The configuration file, whether it is only to be checked, and settings by their paths."""
    parsed = parser().parse_args(given)
    values = {leaf.path: getattr(parsed, flag.lstrip("-").replace("-", "_")) for flag, leaf in flags().items()}
    return parsed.config, parsed.check, {path: value for path, value in values.items() if value is not None}


class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage ends with EX_USAGE."""

    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {message}\n{self.format_usage()}")


def parser() -> argparse.ArgumentParser:
    """The parser, of which the manual is made, too."""
    made = Parser("vllmd", description="A shared model server for the GPUs of this machine.")
    made.add_argument("verb", nargs="?", choices=["serve"], help="serve is what it does anyway")
    made.add_argument("--config", type=Path, metavar="FILE", help="instead of the standard places, see vllmd.yaml(5)")
    made.add_argument("--check", action="store_true", help="say whether the configuration is valid, and exit")
    made.add_argument("--version", action="version", version=f"vllmd {vllmd.__version__}")
    for flag, leaf in flags().items():
        made.add_argument(flag, help=leaf.row.doc)
    return made
