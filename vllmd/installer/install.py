"""An environment is made beside the others, proved, and put in its place by one rename.

pip installs into a folder that nobody looks into. When the engine has shown that it starts, the folder's own name is
replaced wherever scripts have it, and it is renamed. What stops this before then, be it Ctrl-C, a full disk or a power
cut, leaves a folder that the next installation removes, and every version as it was.
"""

from __future__ import annotations

import contextlib
import email
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllmd.engines.environments import Environment
from vllmd.errors import BadRequest, InstallFailed
from vllmd.installer import folders, pip, recipes
from vllmd.installer.pip import Progress, Say
from vllmd.installer.recipes import Recipe
from vllmd.sizes import in_words

log = logging.getLogger("vllmd.installer")
PROOF_LIMIT = 600.0  # seconds in which an engine must have shown that it starts
NO_VENV = "there is no venv module for {python}: apt install python3-venv, then try again"
# Packages whose libraries wheels take from the system.
LIBRARIES = {
    "libgomp.so.1": "libgomp1",
    "libnuma.so.1": "libnuma1",
    "libGL.so.1": "libgl1",
    "libstdc++.so.6": "libstdc++6",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be installed. ``version`` "": the newest. ``build`` "auto": what the machine is for.

    ``index_url``, ``offline``: where packages come from instead: another index, a folder of wheels. ``python``: for
    which interpreter; "": our own. ``env``: variables for pip, such as those that name a proxy.
    """

    kind: str
    version: str = ""
    build: str = "auto"
    index_url: str = ""
    offline: str = ""
    python: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    use: bool = True


@dataclass(frozen=True, slots=True)
class Installed:
    """What was installed, and which version was in use before.

    ``fresh``: it was not there before. ``lacks``: a package that was not to be had, and that it can do without.
    """

    kind: str
    version: str
    build: str
    path: str
    before: str = ""
    fresh: bool = True
    used: bool = True
    lacks: str = ""


def install(wanted: Wanted, root: Path, say: Say) -> Installed:
    """Install a version, and use it. Raises BadRequest, NotFound, Conflict, Forbidden, InstallFailed."""
    folders.known_kind(wanted.kind)
    if wanted.version:
        folders.known_version(wanted.version)
    if wanted.offline and not os.access(wanted.offline, os.R_OK | os.X_OK):
        raise BadRequest(f"{wanted.offline} is no folder that the installer's user may read; a place for wheels that "
                         "everybody may read is /srv/wheels")  # fmt: skip
    build = recipes.build_here(wanted.kind) if wanted.build == "auto" else wanted.build
    recipe = recipes.recipe(wanted.kind, build)
    with folders.changing(root, wanted.kind) as folder:
        if wanted.version in [one.version for one in folders.here(root, wanted.kind)]:
            return _used(folder, wanted.version, wanted, fresh=False)
        _room(folder, recipe, wanted.kind)
        making = Path(tempfile.mkdtemp(prefix=folders.MAKING, dir=folder))
        try:
            return _Making(wanted, recipe, build, folder, making, say).made()
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _used(folder: Path, version: str, wanted: Wanted, *, fresh: bool) -> Installed:
    """Say what came of it, and use it where that is wanted."""
    path = folder / version
    build = folders.noted(Environment(wanted.kind, version, path)).build
    before = folders.use(folder, version) if wanted.use else ""
    return Installed(wanted.kind, version, build, str(path), before, fresh, wanted.use)


def _room(folder: Path, recipe: Recipe, kind: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < recipe.space:
        raise InstallFailed(f"{kind} takes about {in_words(recipe.space)}, and {folder} has {in_words(free)} free: "
                            "free some, or give it a larger disk")  # fmt: skip


class _Making:
    """One installation under way, until it is put in place or has failed."""

    def __init__(self, wanted: Wanted, recipe: Recipe, build: str, folder: Path, making: Path, say: Say) -> None:
        self._wanted, self._recipe, self._build, self._say = wanted, recipe, build, say
        self._folder, self._env = folder, making / "env"
        self._python = str(self._env / "bin/python")
        temporary = making / "tmp"
        temporary.mkdir()
        kept = {name: value for name, value in wanted.env.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(temporary), "LANG": "C.UTF-8",
                           **kept, "TMPDIR": str(temporary)}  # fmt: skip

    def made(self) -> Installed:
        """The whole procedure; see ``install``."""
        self._make_environment()
        here = [one.version for one in folders.here(self._folder.parent, self._wanted.kind)]
        if here and not self._wanted.version and (newest := self._newest()) in here:
            return _used(self._folder, newest, self._wanted, fresh=False)
        self._install()
        lacks = "" if self._add(self._recipe.useful) else self._recipe.useful
        version = self._version()
        if version in here:  # a --offline folder may have another than was asked for
            return _used(self._folder, version, self._wanted, fresh=False)
        self._name(version)
        self._prove()
        self._put_in_place(version)
        return replace(_used(self._folder, version, self._wanted, fresh=True), lacks=lacks)

    def _make_environment(self) -> None:
        self._say(Progress("making an environment"))
        python = self._wanted.python or sys.executable
        try:
            status, lines = self._run([python, "-I", "-m", "venv", str(self._env)], Progress("making an environment"))
        except OSError as error:
            raise InstallFailed(f"{python} cannot be run: {error.strerror}; --python names a Python") from None
        if status:
            said = "\n".join(lines)
            if "ensurepip" in said or "No module named venv" in said:
                raise InstallFailed(NO_VENV.format(python=python))
            raise InstallFailed(self._why(lines))

    def _install(self) -> None:
        status, lines = self._pip("install", "--no-compile", *self._requirements())
        if status:
            raise InstallFailed(f"{self._wanted.kind} was not installed: {self._why(lines)}")

    def _add(self, package: str) -> bool:
        """Install a package that is useful, from wherever everything else is; whether that was possible."""
        if not package:
            return True
        sources = self._sources() if self._wanted.offline or self._wanted.index_url else []
        return self._pip("install", "--no-compile", package, sources=sources)[0] == 0

    def _pip(self, verb: str, *words: str, sources: list[str] | None = None) -> tuple[int, list[str]]:
        options = ("--disable-pip-version-check", "--no-input", "--prefer-binary", "--progress-bar=off", "--retries=3")
        argv = [
            self._python,
            "-I",
            "-m",
            "pip",
            verb,
            *options,
            *(self._sources() if sources is None else sources),
            *words,
        ]
        return self._run(argv, Progress("resolving", self._wanted.kind))

    def _run(self, argv: list[str], began: Progress, limit: float | None = None) -> tuple[int, list[str]]:
        return pip.run(argv, self._variables, self._say, began, limit)

    def _sources(self) -> list[str]:
        if self._wanted.offline:
            return ["--no-index", f"--find-links={self._wanted.offline}"]
        if self._wanted.index_url:
            return [f"--index-url={self._wanted.index_url}"]
        index = self._recipe.index.format(cuda=recipes.cuda_tag())
        return [*([f"--index-url={index}"] if index else []),
                *([f"--extra-index-url={self._recipe.beside}"] if self._recipe.beside else [])]  # fmt: skip

    def _requirements(self) -> list[str]:
        first, *others = self._recipe.packages
        return [f"{first}=={self._wanted.version}" if self._wanted.version else first, *others]

    def _why(self, lines: list[str]) -> str:
        """The cause in a sentence; all that pip said is in the service's log."""
        log.warning("%s", "\n".join(lines))
        return pip.why(lines, **self._words())

    def _words(self) -> dict[str, str]:
        """What the sentence about a failure is made of."""
        where = self._wanted.offline or self._wanted.index_url or "the package index"
        told = subprocess.run([self._python, "-IV"], capture_output=True, text=True, check=False) if os.path.exists(
            self._python) else None  # fmt: skip
        python = told.stdout.removeprefix("Python ").strip() if told else ""
        return {
            "kind": self._wanted.kind,
            "name": self._recipe.packages[0],
            "wanted": self._requirements()[0],
            "version": self._wanted.version,
            "machine": recipes.machine(python),
            "where": where,
            "root": str(self._folder),
            "free": in_words(shutil.disk_usage(self._folder).free),
        }

    def _newest(self) -> str:
        """The version that pip would install; "" if it does not say."""
        report = self._folder / self._variables["TMPDIR"] / "report.json"
        status, _ = self._pip("install", "--dry-run", "--ignore-installed", "--no-deps", f"--report={report}",
                              self._recipe.packages[0])  # fmt: skip
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if status == 0:
                return str(json.loads(report.read_text())["install"][0]["metadata"]["version"])
        return ""

    def _version(self) -> str:
        """The version of what was installed."""
        name = self._recipe.packages[0].partition("[")[0].replace("-", "_")
        for path in self._site().glob("*.dist-info/METADATA"):
            told = email.message_from_string(path.read_text("utf-8", "replace"))
            if str(told["Name"]).replace("-", "_").lower() == name:
                return folders.known_version(str(told["Version"]))
        raise InstallFailed(f"pip installed no {self._recipe.packages[0]}, without saying why")

    def _site(self) -> Path:
        return next(iter(self._env.glob("lib/python3*/site-packages")))

    def _name(self, version: str) -> None:
        """Give it the name that its own program asks for, where the distribution is called something else."""
        if not self._recipe.named:
            return
        build = "" if "+" in version else f"+{self._build}"
        info = self._site() / f"{self._recipe.named}-{version}{build}.dist-info"
        info.mkdir(exist_ok=True)
        told = f"Metadata-Version: 2.1\nName: {self._recipe.named}\nVersion: {version}{build}\n"
        (info / "METADATA").write_text(told)

    def _prove(self) -> None:
        """Start it as far as it tells its version: what it lacks of the system shows."""
        places = {"python": self._python, "bin": str(self._env / "bin")}
        argv = [word.format(**places) for word in self._recipe.proof]
        began = Progress("looking whether it starts", self._wanted.kind)
        status, lines = self._run(argv, began, PROOF_LIMIT)
        if status == 0:
            return
        log.warning("%s", "\n".join(lines))
        said = [line.strip() for line in lines if line.strip()] or [f"exit status {status}"]
        for library, package in LIBRARIES.items():
            if any(f"{library}: cannot open shared object" in line for line in said):
                raise InstallFailed(f"{self._wanted.kind} does not start: it needs {library}: apt install {package}, "
                                    "then try again")  # fmt: skip
        raise InstallFailed(f"{self._wanted.kind} does not start, and was not kept: {said[-1]}")

    def _put_in_place(self, version: str) -> None:
        """Scripts learn their new place, modules are compiled for it, and the folder goes there."""
        old, new = os.fsencode(self._env), os.fsencode(self._folder / version)
        for script in [*(self._env / "bin").iterdir(), self._env / "pyvenv.cfg"]:
            if script.is_file() and not script.is_symlink() and old in (text := script.read_bytes()):
                script.write_bytes(text.replace(old, new))
        site = str(self._site())
        argv = [self._python, "-I", "-m", "compileall", "-qq", "-j0", "-s", os.fsdecode(old), "-p", os.fsdecode(new)]
        self._run([*argv, site], Progress("byte-compiling", self._wanted.kind))  # what cannot be compiled is no program
        folders.note(self._env, self._build)
        os.sync()
        self._env.rename(self._folder / version)
