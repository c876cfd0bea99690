"""The house rules that hold for every file: who may import whom, style, types, and what the packages say."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllmd

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "vllmd"

# The third column of the map in vllmd/__init__.py, where it is not simply a list of rooms.
SPECIAL = {
    "nothing": "",
    "nothing of ours": "",
    "proxy's HTTP types": "proxy",
    "all but cli and client": "*",
}
# Foreign packages that only one room may know.
ONLY_IN = {"pystemd": "launcher", "pynvml": "gpu", "h11": "proxy", "prometheus_client": "admin", "yaml": "config"}


def house_map() -> dict[str, set[str]]:
    """Room -> what it may import of ours, as vllmd's docstring says: ``{"cli": {"client", "errors", ...}}``."""
    lines = (vllmd.__doc__ or "").splitlines()
    third_column = next(line.index("imports nothing") for line in lines if "imports nothing" in line)
    allowed: dict[str, set[str]] = {}
    room = ""
    for line in lines:
        if found := re.match(r"    (\w+)", line):
            room = found[1]
        if line.startswith("    ") and room and len(line) > third_column:
            allowed.setdefault(room, set()).update(_names(line[third_column:].removeprefix("imports ")))
    return allowed


def _names(column: str) -> Iterator[str]:
    for name in (part.strip() for part in column.split(",")):
        if name := SPECIAL.get(name, name):
            yield name


def test_the_map_is_read_as_it_is_written() -> None:
    """The layering test is only as good as what it takes from the docstring."""
    allowed = house_map()
    assert allowed["errors"] == set()
    assert allowed["core"] == {"core", "frozen", "sizes"}
    assert allowed["gpu"] >= {"core.types", "config", "errors"}
    assert allowed["launcher"] >= {"systemd", "errors"}
    assert allowed["admin"] >= {"proxy", "core.types", "errors"}
    assert allowed["daemon"] == {"*"}


def rooms() -> list[str]:
    found = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return sorted(path.stem for path in found if not path.stem.startswith("__"))


def test_every_room_is_on_the_map() -> None:
    """A newcomer finds every room at once."""
    assert set(rooms()) == set(house_map())


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree; kept, for a tree of the whole program takes seconds of processor time."""
    return tuple(ast.walk(ast.parse(path.read_text(), str(path))))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file, relative or not."""
    inside = path.relative_to(REPOSITORY).with_suffix("").parts
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level], node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def may_import(room: str, name: str, allowed: set[str]) -> bool:
    """Whether a file of ``room`` may import ``name``, such as ``vllmd.core.types.Device``."""
    if not name.startswith("vllmd."):
        return name.split(".")[0] not in ONLY_IN or ONLY_IN[name.split(".")[0]] == room
    inner = name.removeprefix("vllmd.")
    if inner.split(".")[0] in (room, "__version__"):
        return True
    if "*" in allowed:
        return inner.split(".")[0] not in ("cli", "client")
    return any(inner == each or inner.startswith(f"{each}.") for each in allowed)


@pytest.mark.parametrize("room", rooms())
def test_imports_stay_within_the_map(room: str) -> None:
    """What a room may know is decided in one place, so that changing one room does not break another."""
    allowed = house_map().get(room, set())
    broken = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}; {room} may import {', '.join(sorted(allowed)) or '-'}"
        for path in files_of(room)
        for line, name in imports(path)
        if not may_import(room, name, allowed)
    ]
    assert broken == [], "\n".join(broken)


def module_of(path: Path) -> str:
    """``vllmd.daemon.service`` of its file; a package's of its ``__init__.py``."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(room: str) -> list[list[str]]:
    """Files of the room that import each other, directly or by way of others; each circle by its modules' names."""
    files = {module_of(path): path for path in files_of(room)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = (name for _, name in imports(path))
        found = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = found & files.keys() - {module}
    reachable = {module: _reachable(module, graph) for module in graph}
    together = {tuple(sorted(m for m in reachable[module] if module in reachable[m])) for module in graph}
    return [list(circle) for circle in sorted(together) if len(circle) > 1]


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found, todo = set[str](), [start]
    while todo:
        for each in graph[todo.pop()] - found:
            found.add(each)
            todo.append(each)
    return found


@pytest.mark.parametrize("room", rooms())
def test_no_files_import_each_other(room: str) -> None:
    """Neither can be read, tested or replaced without the other; an import for types alone is one as well."""
    assert circles(room) == []


def untyped(path: Path) -> Iterator[str]:
    """Where a container of ``Any`` is annotated: whoever reads such a value can write every key wrong unnoticed."""
    for node in nodes_of(path):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("dict", "list", "Mapping"):
            held = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
            if ast.unparse(held) == "Any":
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("room", ["admin", "daemon", "cli"])
def test_what_is_told_has_a_type(room: str) -> None:
    """An answer is a dataclass of ``api.answers``; an object whose form others decide is a ``ForeignJson``."""
    assert [each for path in files_of(room) for each in untyped(path)] == []


# What is not made whole: a connection's transport comes with asyncio's ``connection_made``, before anything else. An
# answer's relay follows the client's pauses while it lasts. A listener without keys denies all, until there are some.
MADE_LATER = {"_transport", "transport", "on_pause", "authenticator"}


def late(paths: list[Path]) -> Iterator[str]:
    """Attributes that are announced and have no value, and callables put into an object that was made elsewhere."""
    nodes = [(path, node) for path in paths for node in nodes_of(path)]
    protocols = {n.name for _, n in nodes if isinstance(n, ast.ClassDef) and "Protocol" in map(ast.unparse, n.bases)}
    callables = set[str]()
    for path, node in nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            if {"Callable", *protocols} & set(re.findall(r"\w+", ast.unparse(node.annotation))):
                callables.add(node.target.attr)
            if node.value is None and node.target.attr not in MADE_LATER:
                yield f"{path}:{node.lineno} {ast.unparse(node)}"
    for path, node in nodes:
        if not isinstance(node, ast.Assign):
            continue
        for target, value in pairs(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) not in ("self", "cls"):
                is_function = isinstance(value, ast.Lambda)
                is_function |= isinstance(value, ast.Name | ast.Attribute) and target.attr in callables
                if is_function and target.attr not in MADE_LATER:
                    yield f"{path}:{node.lineno} {ast.unparse(target)} = {ast.unparse(value)}"


def pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target of an assignment with its value."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def test_what_is_made_is_whole() -> None:
    """Whoever reads where an object is made sees all that it can do; a part that is put in later may be missing."""
    assert list(late(sorted(PACKAGE.rglob("*.py")))) == []


def test_a_part_that_is_put_in_later_is_found(tmp_path: Path) -> None:
    """The forms in which this was done here once."""
    (tmp_path / "made.py").write_text(
        "class Recorder(Protocol): ...\n"
        "class Relay:\n"
        "    def __init__(self):\n"
        "        self.pool: Pool\n"
        "        self.live: Callable[[], int] = lambda: 0\n"
        "        self.recorder: Recorder | None = None\n"
        "relay.live, relay.size = listeners.exchanges, 3\n"
        "relay.recorder = records\n"
        "relay.ended = lambda: None\n"
    )
    assert [each.partition(" ")[2] for each in late([tmp_path / "made.py"])] == [
        "self.pool: Pool", "relay.live = listeners.exchanges", "relay.recorder = records", "relay.ended = lambda: None",
    ]  # fmt: skip


def run_tool(*argv: str) -> str:
    """What a checker complains of; empty when it is content."""
    done = subprocess.run([sys.executable, "-m", *argv], cwd=REPOSITORY, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_docstrings_say_something() -> None:
    """Four words repeat a name; a docstring tells what a name cannot: the subject, shapes, units, errors."""
    short = []
    for path in PACKAGE.rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                told = ast.get_docstring(node)
                if told and len(told.split()) <= 4 and not told.startswith("Implements ``"):
                    short.append(f"{path.relative_to(PACKAGE)} {node.name}: {told}")
    assert short == []


def test_docstrings_name_their_subject() -> None:
    """A reader who looks up one function does not know what "it" is; "One request" and "These units" name a noun."""
    riddles = []
    for path in PACKAGE.rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                told = ast.get_docstring(node) or ""
                if re.match(r"(It|Its|They|Their|Them|Those|Who|Whom|Whoever|He|His)\b", told):
                    riddles.append(f"{path.relative_to(PACKAGE)} {node.name}: {told.splitlines()[0]}")
    assert riddles == []


@pytest.mark.parametrize("room", ["daemon", "engines", "records", "systemd"])
def test_docstrings_speak_of_processes_by_their_nouns(room: str) -> None:
    """A caller, a client, a process, a user: "whoever" and "somebody" leave the reader to find out which is meant."""
    vague = [
        f"{path.relative_to(PACKAGE)} {node.name}"
        for path in files_of(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if re.search(r"\b(whoever|whom|somebody|anybody)\b", ast.get_docstring(node) or "", re.IGNORECASE)
    ]
    assert vague == []


# What tests still do that they should not, by kind; each number goes down, none goes up.
PRIVATE_IN_TESTS, SLEEPS_IN_TESTS = 35, 22
NOT_TESTS = ("bench", "check", "rehearsal", "fake", "soak", "clients")  # below tests/, but what tests are held against


def attributes_and_sleeps(path: Path) -> tuple[list[str], list[str]]:
    """Uses of another object's private attributes, and sleeps of a fixed time outside a loop that waits."""
    private, sleeps, todo = list[str](), list[str](), [(ast.parse(path.read_text(), str(path)), False)]
    file = path.relative_to(REPOSITORY)
    while todo:
        node, waits = todo.pop()
        waits = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (waits or isinstance(node, ast.While))
        todo += [(child, waits) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Attribute) and re.match("_(?!replace|fields|exit)[a-z]", node.attr):
            ours = ast.unparse(node.value) in ("self", "cls")
            private += [f"{file}:{node.lineno} {ast.unparse(node)}"] * (not ours)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sleep":
            seconds = node.args[0] if ast.unparse(node.func.value) in ("time", "asyncio") else None
            fixed = isinstance(seconds, ast.Constant) and seconds.value and not waits
            sleeps += [f"{file}:{node.lineno} {ast.unparse(node)}"] * bool(fixed)
    return private, sleeps


def test_tests_use_what_users_use_and_wait_for_what_they_mean() -> None:
    """A private attribute breaks with every change of the inside; a fixed sleep proves nothing on a busy machine.

    A test that is listed here waits for an event, or goes by a public name. Where fewer are left, lower the number.
    """
    files = [path for path in (REPOSITORY / "tests").rglob("*.py") if not set(path.parts) & set(NOT_TESTS)]
    found = [attributes_and_sleeps(path) for path in sorted(files)]
    private, sleeps = [each for one, _ in found for each in one], [each for _, one in found for each in one]
    assert len(private) <= PRIVATE_IN_TESTS, "\n".join(private)
    assert len(sleeps) <= SLEEPS_IN_TESTS, "\n".join(sleeps)


def test_nothing_is_defined_that_nobody_names() -> None:
    """What neither the program nor a table of it names cannot be reached: a test alone does not keep it."""
    words = Counter(word for path in PACKAGE.rglob("*.py") for word in re.findall(r"\w+", path.read_text()))
    idle = [
        f"{path.relative_to(PACKAGE)} {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if words[node.name] == 1 and not node.name.startswith("__")
    ]
    assert idle == []


def test_ruff_finds_nothing() -> None:
    """One style, so that differences mean something."""
    assert run_tool("ruff", "check", ".") == ""


def test_formatted_by_ruff() -> None:
    """Nobody's diff is about white space."""
    assert run_tool("ruff", "format", "--check", ".") == ""


def test_mypy_strict_finds_nothing() -> None:
    """Types are checked as strictly as mypy can."""
    assert run_tool("mypy", "--strict", "vllmd") == ""


def test_packages_have_the_programs_version() -> None:
    """An upgrade is told by its version, which stands in three places."""
    changelog = (REPOSITORY / "packaging/debian/changelog").read_text()
    spec = (REPOSITORY / "packaging/rpm/vllmd.spec").read_text()
    assert re.match(r"vllmd \((.*)\)", changelog).group(1) == vllmd.__version__  # type: ignore[union-attr]
    assert re.search(r"^Version:\s*(\S+)", spec, re.M).group(1) == vllmd.__version__  # type: ignore[union-attr]


def test_debian_package_depends_on_what_the_python_package_does() -> None:
    """pyproject.toml is the source; debian/control repeats it with the same lower bounds."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    control = (REPOSITORY / "packaging/debian/control").read_text()
    names = {"pyyaml": "yaml"}
    for name, bound in (dependency.split(">=") for dependency in project["dependencies"]):
        assert f"python3-{names.get(name, name)} (>= {bound})" in control


def test_the_top_level_is_known() -> None:
    """A newcomer reads these first; another file beside them needs a reason."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = {name.split("/")[0] for name in tracked.stdout.splitlines() if not name.startswith(".")}
    folders = {"docs", "man", "packaging", "tests", "units", "vllmd"}
    prose = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    assert names == folders | prose | {"Makefile", "pyproject.toml"}


def test_every_folder_of_the_program_is_packaged() -> None:
    """setuptools leaves out a folder that has no __init__.py, and only the installed program would notice."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def shell_scripts() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True)
    paths = [REPOSITORY / name for name in tracked.stdout.decode().splitlines()]
    return [path for path in paths if path.is_file() and re.match(rb"#!/bin/(ba)?sh\b", path.read_bytes()[:20])]


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shell_scripts_parse(script: Path) -> None:
    """A script that is rarely run is not found broken on the day it is needed."""
    shell = script.read_text().split("\n", 1)[0].removeprefix("#!").split()[0]
    assert subprocess.run([shell, "-n", script], capture_output=True, text=True).stderr == ""
