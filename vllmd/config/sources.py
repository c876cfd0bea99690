"""Where settings come from, each as a tree of nodes: the files, the environment, the command line."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vllmd.config.findings import Findings
from vllmd.config.nodes import Node, Where, compose, from_plain, from_text
from vllmd.config.settings import LEGACY, LEGACY_SECTIONS, ROOT, flags, variables
from vllmd.config.trees import put
from vllmd.config.user_home import user_home

SYSTEM_ADDED = Path("/var/lib/vllmd/models.d")


def default_file(env: Mapping[str, str] = os.environ) -> Path:
    """``VLLMD_CONFIG``, else /etc/vllmd/vllmd.yaml for root and system users, else ~/.config/vllmd/vllmd.yaml."""
    if env.get("VLLMD_CONFIG"):
        return Path(env["VLLMD_CONFIG"])
    if os.getuid() < 1000:
        return Path("/etc/vllmd/vllmd.yaml")
    home, system = user_home(env), Path("/etc/vllmd/vllmd.yaml")
    given = env.get("XDG_CONFIG_HOME") or (home and home / ".config")
    own = Path(given) / "vllmd" / "vllmd.yaml" if given else system
    return own if os.path.exists(own) or not os.path.exists(system) else system


def added_folder(main: Path, env: Mapping[str, str]) -> Path:
    """The folder of the models that ``vllmctl add`` has the daemon write: ``VLLMD_MODELS``, else by the main file.

    The system's daemon may not write into /etc, and shall not: what it could change there an administrator would have
    to doubt. What it adds is in its own state, which is read beside /etc/vllmd/models.d and gives way to it.
    """
    if env.get("VLLMD_MODELS"):
        return Path(env["VLLMD_MODELS"])
    return SYSTEM_ADDED if main == Path("/etc/vllmd/vllmd.yaml") else main.parent / "models.d"


class Files:
    """The main file, those in ``models.d`` beside it, and those that the daemon has written into ``added``.

    ``texts``: contents that are about to be written, by file, in place of what the disk has.
    """

    def __init__(self, findings: Findings, texts: Mapping[Path, str], added: Path | None = None) -> None:
        self.findings, self.texts, self.added = findings, texts, added
        self.read: list[Path] = []

    def tree(self, main: Path, required: bool) -> Node:
        """All files as one tree; a missing main file is a problem if it is ``required``."""
        root = self.file(main, required) or Node(Where(str(main)), {})
        own = main.parent / "models.d"
        for extra in self.directory(own):
            node = self.file(extra, True)
            if node is not None:
                root = self.add_models(root, node)
        for extra in self.directory(self.added) if self.added is not None and self.added != own else ():
            node = self.file(extra, True)
            if node is not None:
                root = self.add_models(root, node, yields=True)
        return root

    def directory(self, path: Path) -> list[Path]:
        """The YAML files in a folder by name; none where there is no such folder."""
        try:
            names = sorted(os.listdir(path))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.unreadable(path, error)
            return []
        found = [path / name for name in names if name.endswith((".yaml", ".yml")) and not name.startswith(".")]
        return [file for file in found if self.is_file(file)]

    def is_file(self, path: Path) -> bool:
        """Whether it can be read to its end; complain where it cannot: a FIFO has nobody who writes, a device no end.

        A file that is empty by being a link to ``/dev/null`` can. So can what is not there: reading it tells why.
        """
        with contextlib.suppress(OSError):
            found = path.stat()
            special = not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode)
            if special and found.st_rdev != os.stat(os.devnull).st_rdev:
                self.findings.complain(Where(str(path)), "", "this is a device, a FIFO or a socket, and no file")
                return False
        return True

    def file(self, path: Path, required: bool) -> Node | None:
        """The root of one file; None where it is empty, missing or broken (which is complained of)."""
        source = str(path)
        try:
            data = self.texts[path].encode() if path in self.texts else path.read_bytes()
        except FileNotFoundError:
            if required:
                self.findings.complain(Where(source), "", "there is no such file")
            return None
        except OSError as error:
            self.unreadable(path, error)
            return None
        self.read.append(path)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            self.findings.complain(Where(source, line), "", "this is not UTF-8 text")
            return None
        node = compose(text, source, lambda where, what: self.findings.complain(where, "", what))
        return self.findings.mapping(node, "", ROOT.accepts) if node is not None and node.value is not None else None

    def unreadable(self, path: Path, error: OSError) -> None:
        """Complain of a file that cannot be read; the person who edits it may well be able to, so name our user."""
        what = f"cannot be read: {error.strerror}"
        if isinstance(error, PermissionError):
            import pwd

            user = str(os.geteuid())
            with contextlib.suppress(KeyError):
                user = pwd.getpwuid(os.geteuid()).pw_name
            what += f"; the user {user} must be able to read it"
        self.findings.complain(Where(str(path)), "", what)

    def add_models(self, root: Node, extra: Node, *, yields: bool = False) -> Node:
        """``root`` with the models of a file of models.d, which has them below ``models:`` or, flat, at the top.

        A model that is configured twice is a problem; with ``yields`` the first one counts, and that is a warning.
        """
        sectioned = "models" in extra.value
        for name, node in extra.value.items():
            known = ROOT.row(name) or name in LEGACY_SECTIONS
            if name != "models" and (sectioned or known):
                self.findings.complain(node.key or node.where, name, "a file in models.d holds models only", "models")
        more = extra.value.get("models") if sectioned else extra
        if more is None or more.value is None or self.findings.mapping(more, "models", "models by name") is None:
            return root
        models = root.value.get("models")
        merged = dict(models.value) if models is not None and models.is_map else {}
        for name, node in more.value.items():
            if not sectioned and (ROOT.row(name) or name in LEGACY_SECTIONS):
                continue
            if name in merged:
                first = merged[name].key or merged[name].where
                say = self.findings.warn if yields else self.findings.complain
                say(node.key or node.where, f"models.{name}", f"this model is configured already in {first}")
            merged.setdefault(name, node)
        return root.with_value({**root.value, "models": (models or more).with_value(merged)})


def environment(env: Mapping[str, str]) -> Node:
    """The settings that environment variables give; an empty variable counts as unset."""
    convert = {row.env: row.convert for row in LEGACY if row.env}
    layer = Node(Where("environment"), {})
    for name, path in variables().items():
        text = env.get(name, "")
        if text:
            node = from_text(text, Where(f"environment {name}"))
            layer = put(layer, path, convert[name](node) if name in convert else node)
    return layer


def command_line(overrides: Mapping[str, object]) -> Node:
    """The settings that flags give, by path."""
    layer = Node(Where("command line"), {})
    for path, value in overrides.items():
        layer = put(layer, path, from_plain(value, Where(f"command line {flag_of(path)}")))
    return layer


def flag_of(path: str) -> str:
    """The flag of a setting, or its path."""
    return next((flag for flag, leaf in flags().items() if leaf.path == path), path)
