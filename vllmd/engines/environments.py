"""Engines' own Python environments: where they are, and which one of a kind is in use.

::

    /var/lib/vllmd/engines/KIND/VERSION/                 the machine's, for its daemon and everybody's
    $XDG_DATA_HOME/vllmd/engines/KIND/VERSION/           one user's (~/.local/share where that is not set)
    .../KIND/current                                     a link to the VERSION in use; without it the newest

Each is a Python environment as ``python3 -m venv`` and uv make them, with the engine's program in its ``bin``;
``vllmd/installer`` makes them. ``VLLMD_ENGINES`` names a folder to look in instead of these two. What an administrator
has put into PATH goes before any of them, the version that a model names (``engine_version``) before PATH, and a
model's ``command`` before everything.

An engine runs in the environment that it was started in for as long as it lives: what is installed or chosen later
is for the next start.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllmd.config.engine_kinds import one_name
from vllmd.config.types import ModelConfig
from vllmd.engines.looks import looked_at_once
from vllmd.errors import OUT_OF_FILES, ConfigError
from vllmd.frozen import frozen

SYSTEM = Path("/var/lib/vllmd/engines")
CURRENT = "current"
# The PATH that the launcher gives to engines of another user; an engine of the same user keeps the user's own.
PATH = "/usr/local/bin:/usr/bin:/bin"
# The kinds that have environments, each with the program that is looked for in PATH before; "": none is.
PROGRAMS: dict[str, str] = {"vllm": "vllm", "llama.cpp": "llama-server", "sglang": "", "transformers": "transformers"}
_PYTHON = re.compile(r"#!\s*(/\S*/python[\d.]*)\b")


@frozen
class Environment:
    """The environment of one version of an engine."""

    kind: str
    version: str
    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin/python"

    def program(self, name: str) -> Path | None:
        """The full path of a program that it has."""
        program = self.path / "bin" / name
        return program if os.access(program, os.X_OK) else None


def roots(variables: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """The folders in which environments are looked for, the user's own before the machine's."""
    if folder := variables.get("VLLMD_ENGINES"):
        return (Path(folder),)
    data = variables.get("XDG_DATA_HOME") or (f"{home}/.local/share" if (home := variables.get("HOME")) else "")
    return (Path(data) / "vllmd/engines", SYSTEM) if data.startswith("/") else (SYSTEM,)


def installed(kind: str, variables: Mapping[str, str] = os.environ) -> list[Environment]:
    """All versions of a kind, the newest first; of two alike the user's own."""
    environments: dict[str, Environment] = {}
    for root in roots(variables):
        for path in _folders(root / kind):
            environments.setdefault(path.name, Environment(kind, path.name, path))
    return sorted(environments.values(), key=lambda one: _age(one.version), reverse=True)


def in_use(kind: str, version: str = "", variables: Mapping[str, str] = os.environ) -> Environment | None:
    """The environment that a kind's engines run in: of this version, else the current one, else the newest."""
    if version:
        return next((one for one in installed(kind, variables) if one.version == version), None)
    for root in roots(variables):
        linked = root / kind / CURRENT
        if os.path.islink(linked) and os.path.exists(linked / "bin/python"):  # no folder that is closed to us raises
            target = linked.resolve()
            return Environment(kind, target.name, target)
    return next(iter(installed(kind, variables)), None)


def chosen(model: ModelConfig) -> Environment | None:
    """The environment that an engine of this model is started in; None: it runs without one, or is not installed.

    Raises ConfigError for a version that is not here.
    """
    kind = one_name(model.engine)
    if kind not in PROGRAMS or model.command:
        return None
    if version := model.engine_version:
        found = in_use(kind, version)
        if found is None:
            raise ConfigError(f"{f'{model.where}: ' if model.where else ''}models.{model.name}.engine_version: "
                              f"{absent(kind, version)}")  # fmt: skip
        return found
    return None if PROGRAMS[kind] and in_path(model, PROGRAMS[kind]) else _current(kind)


@looked_at_once
def _current(kind: str) -> Environment | None:
    return in_use(kind)


def absent(kind: str, version: str) -> str:
    """That a version is not installed, what is, and what helps."""
    here = ", ".join(one.version for one in installed(kind)) or "none"
    wanted = shlex.quote(f"{kind}=={version}")
    return f"{kind} {version} is not installed (here: {here}); vllmctl engine install {wanted}"


def program(model: ModelConfig, name: str) -> str:
    """The program ``name`` that an engine of this model runs: of its environment, else ``name`` itself."""
    environment = chosen(model)
    found = environment.program(name) if environment else None
    return str(found or name)


def in_path(model: ModelConfig, name: str) -> str | None:
    """Where the engine of a model finds a program, as its user and with its variables."""
    return _which(name, str(model.env.get("PATH") or os.environ.get("PATH") or PATH))


@looked_at_once
def _which(name: str, path: str) -> str | None:
    """As ``shutil.which``, which every daemon would have in memory, with its archives of three kinds."""
    places = [name] if "/" in name else [os.path.join(folder, name) for folder in path.split(os.pathsep)]
    return next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)


def interpreter_of(script: str | None) -> str:
    """The Python that a script's first line names; "" for any other program."""
    try:
        with open(script or "", "rb") as file:
            found = _PYTHON.match(file.readline(300).decode(errors="replace"))
    except OSError:
        return ""
    return found[1] if found else ""


def interpreter(model: ModelConfig, argv: Sequence[str]) -> str:
    """The Python that runs this command of a model's engine; "" for any other program."""
    program = in_path(model, argv[0]) if argv else None
    return program if program and _PYTHON.fullmatch(f"#!{program}") else interpreter_of(program)


def _folders(kind: Path) -> list[Path]:
    """Environments that are whole: a Python is the first thing in one, a name with a dot before it is not finished."""
    try:
        entries = sorted(kind.iterdir())
    except OSError as error:
        if error.errno in OUT_OF_FILES:  # it is not known that nothing is installed, which would be told for good
            raise
        return []
    folders = [one for one in entries if one.name[0] != "." and not os.path.islink(one)]
    return [one for one in folders if os.path.exists(one / "bin/python")]


def _age(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts versions by their numbers, 0.9 before 0.10; letters come before the end (0.10rc1 before 0.10)."""
    parts = re.findall(r"\d+|[A-Za-z]+", version)
    return (*((2, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts), (1, 0, ""))
