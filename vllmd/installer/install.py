"""An environment is made beside the others, proved, and put in its place by one rename.

pip installs into a folder from which nothing is started. When the engine has shown that it starts, the folder's name is
replaced in its scripts, and the folder is renamed. Whatever stops this before then, such as Ctrl-C, a full disk or a
power cut, leaves a folder that the next installation removes, and every installed version as it was.
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
from dataclasses import field, replace
from pathlib import Path

from vllmd.engines.environments import Environment
from vllmd.errors import BadRequest, InstallFailed
from vllmd.frozen import frozen
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


@frozen
class Wanted:
    """An engine to be installed. ``version`` "": the newest. ``build`` "auto": the one for this machine.

    ``index_url``, ``offline``: where packages come from instead: another index, a folder of wheels. ``python``: the
    interpreter; "": our own. ``env``: variables for pip, such as those that name a proxy.
    """

    kind: str
    version: str = ""
    build: str = "auto"
    index_url: str = ""
    offline: str = ""
    python: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    use: bool = True


@frozen
class Installed:
    """An installed engine, and the version that was in use before.

    ``fresh``: it was not installed before. ``lacks``: an optional package that could not be installed.
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
            return _use(folder, wanted.version, wanted, fresh=False)
        free = shutil.disk_usage(folder).free
        if free < recipe.space:
            raise InstallFailed(f"{wanted.kind} takes about {in_words(recipe.space)}, and {folder} has "
                                f"{in_words(free)} free: free some, or give it a larger disk")  # fmt: skip
        making = Path(tempfile.mkdtemp(prefix=folders.MAKING, dir=folder))
        try:
            return _Installation(wanted, recipe, build, folder, making, say).run()
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _use(folder: Path, version: str, wanted: Wanted, *, fresh: bool) -> Installed:
    """Use an installed version where that is wanted. Returns the answer to the request."""
    path = folder / version
    build = folders.noted(Environment(wanted.kind, version, path)).build
    before = folders.use(folder, version) if wanted.use else ""
    return Installed(wanted.kind, version, build, str(path), before, fresh, wanted.use)


class _Installation:
    """One installation, until it is put in place or has failed."""

    def __init__(self, wanted: Wanted, recipe: Recipe, build: str, folder: Path, making: Path, say: Say) -> None:
        self._wanted, self._recipe, self._build, self._say = wanted, recipe, build, say
        self._folder, self._env = folder, making / "env"
        self._python = str(self._env / "bin/python")
        temporary = making / "tmp"
        temporary.mkdir()
        kept = {name: value for name, value in wanted.env.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(temporary), "LANG": "C.UTF-8",
                           **kept, "TMPDIR": str(temporary)}  # fmt: skip

    def run(self) -> Installed:
        """The whole procedure, see ``install``."""
        wanted, recipe = self._wanted, self._recipe
        # 1. An empty environment.
        self.make_environment()
        # 2. Nothing more, if the newest version is wanted and is here.
        here = [one.version for one in folders.here(self._folder.parent, wanted.kind)]
        if here and not wanted.version and (newest := self.newest_version()) in here:
            return _use(self._folder, newest, wanted, fresh=False)
        # 3. The engine's packages, and one that it can do without.
        status, lines = self._pip("install", "--no-compile", *self._requirements())
        if status:
            raise InstallFailed(f"{wanted.kind} was not installed: {self._why(lines)}")
        sources = self._sources() if wanted.offline or wanted.index_url else []
        failed = recipe.useful and self._pip("install", "--no-compile", recipe.useful, sources=sources)[0]
        version = self.installed_version()
        if version in here:  # a --offline folder may have another version than the one wanted
            return _use(self._folder, version, wanted, fresh=False)
        # 4. The name by which the engine's program looks for itself, where the distribution has another one.
        if recipe.named:
            build = "" if "+" in version else f"+{self._build}"
            info = self._site() / f"{recipe.named}-{version}{build}.dist-info"
            info.mkdir(exist_ok=True)
            metadata = f"Metadata-Version: 2.1\nName: {recipe.named}\nVersion: {version}{build}\n"
            (info / "METADATA").write_text(metadata)
        # 5. Proved, put in its place, and used.
        self.prove()
        self.put_in_place(version)
        return replace(_use(self._folder, version, wanted, fresh=True), lacks=recipe.useful if failed else "")

    def make_environment(self) -> None:
        """Make an empty environment. Raises InstallFailed."""
        self._say(Progress("making an environment"))
        python = self._wanted.python or sys.executable
        try:
            status, lines = self._run([python, "-I", "-m", "venv", str(self._env)], Progress("making an environment"))
        except OSError as error:
            raise InstallFailed(f"{python} cannot be run: {error.strerror}; --python names a Python") from None
        if status:
            output = "\n".join(lines)
            if "ensurepip" in output or "No module named venv" in output:
                raise InstallFailed(NO_VENV.format(python=python))
            raise InstallFailed(self._why(lines))

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
        """The cause of pip's failure in a sentence; the whole output goes into the service's log."""
        log.warning("%s", "\n".join(lines))
        python = ""
        if os.path.exists(self._python):
            done = subprocess.run([self._python, "-IV"], capture_output=True, text=True, check=False)
            python = done.stdout.removeprefix("Python ").strip()
        return pip.why(
            lines,
            kind=self._wanted.kind,
            name=self._recipe.packages[0],
            wanted=self._requirements()[0],
            version=self._wanted.version,
            machine=recipes.machine(python),
            where=self._wanted.offline or self._wanted.index_url or "the package index",
            root=str(self._folder),
            free=in_words(shutil.disk_usage(self._folder).free),
        )

    def newest_version(self) -> str:
        """The version that pip would install; "" if it does not say."""
        report = self._folder / self._variables["TMPDIR"] / "report.json"
        status, _ = self._pip("install", "--dry-run", "--ignore-installed", "--no-deps", f"--report={report}",
                              self._recipe.packages[0])  # fmt: skip
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if status == 0:
                return str(json.loads(report.read_text())["install"][0]["metadata"]["version"])
        return ""

    def installed_version(self) -> str:
        """The version that pip has installed. Raises InstallFailed."""
        name = self._recipe.packages[0].partition("[")[0].replace("-", "_")
        for path in self._site().glob("*.dist-info/METADATA"):
            metadata = email.message_from_string(path.read_text("utf-8", "replace"))
            if str(metadata["Name"]).replace("-", "_").lower() == name:
                return folders.known_version(str(metadata["Version"]))
        raise InstallFailed(f"pip installed no {self._recipe.packages[0]}, without saying why")

    def _site(self) -> Path:
        return next(iter(self._env.glob("lib/python3*/site-packages")))

    def prove(self) -> None:
        """Have the engine print its version or help, which shows missing system libraries. Raises InstallFailed."""
        places = {"python": self._python, "bin": str(self._env / "bin")}
        argv = [word.format(**places) for word in self._recipe.proof]
        began = Progress("looking whether it starts", self._wanted.kind)
        status, lines = self._run(argv, began, PROOF_LIMIT)
        if status == 0:
            return
        log.warning("%s", "\n".join(lines))
        output = [line.strip() for line in lines if line.strip()] or [f"exit status {status}"]
        for library, package in LIBRARIES.items():
            if any(f"{library}: cannot open shared object" in line for line in output):
                raise InstallFailed(f"{self._wanted.kind} does not start: it needs {library}: apt install {package}, "
                                    "then try again")  # fmt: skip
        raise InstallFailed(f"{self._wanted.kind} does not start, and was not kept: {output[-1]}")

    def put_in_place(self, version: str) -> None:
        """Write the new place into scripts, compile modules for it, and rename the folder."""
        old, new = os.fsencode(self._env), os.fsencode(self._folder / version)
        for script in [*(self._env / "bin").iterdir(), self._env / "pyvenv.cfg"]:
            if script.is_file() and not script.is_symlink() and old in (text := script.read_bytes()):
                script.write_bytes(text.replace(old, new))
        site = str(self._site())
        argv = [self._python, "-I", "-m", "compileall", "-qq", "-j0", "-s", os.fsdecode(old), "-p", os.fsdecode(new)]
        # Its exit status does not count: a file that cannot be compiled is no part of the program.
        self._run([*argv, site], Progress("byte-compiling", self._wanted.kind))
        folders.note(self._env, self._build)
        os.sync()
        self._env.rename(self._folder / version)
