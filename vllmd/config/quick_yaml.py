"""Imports PyYAML in half of the time that it takes, for whom ``import yaml`` comes after this.

The problem. PyYAML's own reader has one pattern, of all characters that YAML allows, which takes longer to compile than
the rest of the package to import: of all that the daemon does before its first answer, a twelfth. libyaml's loader,
which is used here, never asks that pattern. But nobody can have the loader without the reader's module.

So while that module is imported, and for it alone, ``re.compile`` gives a pattern that is compiled at its first use.
Who uses PyYAML's own reader in this process finds it working.
"""

from __future__ import annotations

import re
import sys
from typing import Any


class PatternLater:
    """A pattern that is compiled when something of it is used; ``re`` keeps what it has compiled."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._given = (pattern, flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(re.compile(*self._given), name)


def _import() -> None:
    at_once = re.compile

    def compiled(pattern: Any, flags: int = 0) -> Any:
        by_reader = sys._getframe(1).f_globals.get("__name__") == "yaml.reader"
        return PatternLater(pattern, flags) if by_reader else at_once(pattern, flags)

    re.compile = compiled
    try:
        import yaml  # noqa: F401  # it stays in sys.modules
    finally:
        re.compile = at_once


_import()
