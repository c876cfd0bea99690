"""Whether the programs of configured engines are there and start, for the user that will run them.

Looked at before anything is started: by ``vllmd --check``, ``vllmctl config check`` and ``vllmctl doctor``. A program
is proved by what costs little and loads no model: llama-server and text-embeddings-router tell their version; a Python
tells whether it has the engine's module, by looking without importing (vLLM takes ten seconds to import); any other
program, such as a server that the kind ``command`` runs, is only checked for being executable.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllmd.config.types import OWN_USER, ModelConfig
from vllmd.engines import engine_of, environments
from vllmd.engines.base import Place
from vllmd.engines.llama_cpp import OWN_SERVER
from vllmd.errors import OUT_OF_FILES, ConfigError
from vllmd.frozen import frozen

LIMIT = 20.0  # seconds; a program that takes longer has started, which was the question
ENGINES_USER = "vllmd-engine"  # of the system's daemon, see units/vllmd-launcher.service
MODULES = {"vllm": "vllm", "sglang": "sglang", "transformers": "transformers"}
VERSION = frozenset({"llama-server", "text-embeddings-router", "tritonserver"})
# Variables of a model's ``env`` that decide what a program finds. (Not all of ``env``: each differing program is run.)
FINDS = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD")
_HAS_MODULE = (
    "import importlib.util, sys; name = sys.argv[1]; "
    "sys.exit(0 if importlib.util.find_spec(name) else f'No module named {name!r} ({sys.executable})')"
)


@frozen
class Trouble:
    """What keeps these models' engines from starting, and what would help."""

    models: tuple[str, ...]
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{', '.join(self.models)}: {self.what}" + (f"; {self.advice}" if self.advice else "")


@frozen
class Program:
    """A program and the user that runs it. ``proof``: the argv that shows that it starts; (): its file is enough.

    ``env``: what its model sets of ``FINDS``.
    """

    name: str
    proof: tuple[str, ...]
    path: str
    user: str  # "": ourselves
    env: tuple[tuple[str, str], ...]


def troubles(models: Iterable[ModelConfig], *, system: bool) -> list[Trouble]:
    """What is wrong with the programs of these models' engines; each program is looked at once.

    ``system``: they are the system daemon's, whose engines run as a user of their own and with a PATH of their own.
    """
    users: dict[Program, list[ModelConfig]] = {}
    absent: list[Trouble] = []
    for model in models:
        try:
            environments.chosen(model)
        except ConfigError as error:
            absent.append(Trouble((model.name,), *error.message.rpartition(f"models.{model.name}.")[2].split("; ", 1)))
        if program := _program(model, system):
            users.setdefault(program, []).append(model)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(_look, users))
    return absent + [
        Trouble(tuple(model.name for model in each), what, _advice(each[0], what))
        for each, what in zip(users.values(), answers, strict=True)
        if what
    ]


def system_daemon_is_meant() -> bool:
    """Whether the system's daemon is meant: where it is installed, and the caller is root."""
    return os.geteuid() == 0 and _user(ENGINES_USER) is not None


def _program(model: ModelConfig, system: bool) -> Program | None:
    """None for a remote server, and where the launch cannot be composed, which other checks report."""
    try:
        engine = engine_of(model)
        argv = engine.launch(model, Place(Path("/run/vllmd-engine/check"), port=1)).argv
    except ConfigError:
        return None
    if not argv or engine.kind == "sim":
        return None
    path = str(model.env.get("PATH") or ("" if system else os.environ.get("PATH", "")) or environments.PATH)
    own = model.user if model.user != OWN_USER else ""
    env = tuple((name, str(model.env[name])) for name in FINDS if name in model.env)
    return Program(argv[0], tuple(_proof(engine.kind, argv, path)), path, own or (ENGINES_USER if system else ""), env)


def _proof(kind: str, argv: Sequence[str], path: str) -> Iterator[str]:
    program = Path(argv[0]).name
    module = MODULES.get(kind, "")
    if str(OWN_SERVER) in argv[:3]:
        yield from (*argv[:3], "--version")
    elif program in VERSION:
        yield from (argv[0], "--version")
    elif program.startswith("python") and module:
        yield from (argv[0], "-c", _HAS_MODULE, module)
    elif module and (interpreter := environments.interpreter_of(shutil.which(argv[0], path=path))):
        yield from (interpreter, "-c", _HAS_MODULE, module)


def _look(program: Program) -> str:
    """The problem with a program; "" if there is none."""
    who = f" for {program.user}" if program.user else ""
    user = _user(program.user) if program.user and os.geteuid() == 0 else None
    if shutil.which(program.name, path=program.path) is None:
        if "/" in program.name and os.path.exists(program.name):
            return f"{program.name} cannot be executed: Permission denied"
        looked = "" if "/" in program.name else f": looked in {program.path}"
        return f"there is no command {program.name!r}{who}{looked}"
    command = program.proof or ("/bin/sh", "-c", 'test -x "$(command -v "$1")"', "sh", program.name)
    try:
        done = _run(command, program, user)
    except subprocess.TimeoutExpired:
        return ""
    except OSError as error:
        if error.errno in OUT_OF_FILES:  # of ours, which says nothing of the program
            return ""
        return f"{program.name} cannot be executed{who}: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if not program.proof:
        return f"{program.name} cannot be executed{who}: Permission denied"
    return f"{program.name} does not start{who}: {lines[-1] if lines else f'exit status {done.returncode}'}"


def _run(command: Sequence[str], program: Program, user: pwd.struct_passwd | None) -> subprocess.CompletedProcess[str]:
    """Run it with little environment, as ``user`` if that is another one. Raises OSError, TimeoutExpired."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LIMIT,
        check=False,
        cwd="/",
        env={"PATH": program.path, "LANG": "C.UTF-8", "HOME": user.pw_dir if user else "/", **dict(program.env)},
        user=user and user.pw_uid,
        group=user and user.pw_gid,
        extra_groups=user and os.getgrouplist(user.pw_name, user.pw_gid),
    )


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _advice(model: ModelConfig, what: str) -> str:
    """What the kind says to a start that failed so."""
    return engine_of(model).failure([what]).hint or "say where it is with command"
