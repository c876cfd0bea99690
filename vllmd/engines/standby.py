"""Standbys: engines' processes that have imported their modules ahead of time, and can become any model's engine.

Nearly all of a vLLM's start is imports, once in each of three processes. A standby has them done, and forks the other
two. What it can become is bounded by what its imports have read: the program with its interpreter and version, and
every variable that is not known to be read late. Models for which all of that is equal share standbys (``Standby`` is
the key); any other model is started as ever.

``standby_main.py`` is the process; ``launcher.handover`` tells how it becomes an engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Launch
from vllmd.frozen import frozen

LARGEST = 2000  # bytes of the script of an entry point
SCRIPT = Path(__file__).with_name("standby_main.py")


@frozen
class Standby:
    """The properties of a standby. An engine can be made of one whose properties are all equal to those it needs.

    ``python``: the interpreter of ``program``, a script. ``imports``: modules. ``late``: names of variables that may
    differ at the start. ``ours``: variables that it is born with on its own account. ``adds``: variables that it adds
    at the start where the order has none. ``env``: the variables of the order that are not ``late``. ``then``: a file
    of Python that is executed when the imports are done.
    """

    python: str
    program: str
    imports: tuple[str, ...]
    late: frozenset[str]
    env: tuple[tuple[str, str], ...] = ()
    ours: tuple[tuple[str, str], ...] = ()
    adds: tuple[tuple[str, str], ...] = ()
    then: str = ""

    def argv(self) -> tuple[str, ...]:
        """The command of the process."""
        spec = {
            "program": self.program,
            "imports": self.imports,
            "late": sorted(self.late),
            "ours": [name for name, _ in self.ours],
            "set": dict(self.adds),
            "then": self.then,
        }
        return (self.python, str(SCRIPT), json.dumps(spec, separators=(",", ":")))

    def variables(self) -> dict[str, str]:
        """The environment of the process, over the launcher's base."""
        return {**dict(self.env), **dict(self.ours)}


@runtime_checkable
class CanStandBy(Protocol):
    """A kind of engine of which there can be standbys."""

    def standby(self, model: ModelConfig, launch: Launch) -> Standby | None:
        """What a standby has to be, ``env`` left out; None where this engine is started as ever."""


def is_script_of(program: str, line: str) -> bool:
    """Whether a program is the script that pip and uv make of an entry point, which is imported by that line.

    Any other program is unknown, and so is what it does before.
    """
    try:
        with open(program, "rb") as file:
            text = file.read(LARGEST + 1).decode(errors="replace")
    except OSError:
        return False
    return len(text) <= LARGEST and line in text.splitlines()


def early(env: Mapping[str, str], late: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The variables of an order that an import may read."""
    return tuple(sorted((name, value) for name, value in env.items() if name not in late))
