"""How the code stands, in figures, beside others': ``python -m tests.bench.figures [WHAT ...]``, as a table.

WHAT is a revision of this repository, or an installed package such as ``h11``; nothing: the code as it lies here.
Counted are lines and functions and how long these are, private functions and those of them that are called in one place
only, comment lines per line of code, ``Any`` in annotations, circles of files that import each other, and duplicates:
runs of six or more lines (blank ones, comments and imports left out) that stand in two places to the letter.
``--request`` adds what one warm chat goes through (``request_path``) in the code as it lies here.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.bench.proxy import chat
from tests.bench.proxy_servers import running
from tests.bench.request_path import counted

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "vllmd"
RUN = 6  # lines of a duplicate


def circles(trees: dict[str, ast.Module]) -> int:
    """How many groups of files import each other, directly or by way of others."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        ]
        found = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = found & trees.keys() - {module}
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        reached[start] = seen
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return len([group for group in groups if len(group) > 1])


def duplicates(texts: dict[Path, str]) -> int:
    """How many runs of lines stand in two places, each counted once however long it is."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, text in texts.items():
        lines = [line.strip() for line in text.splitlines()]
        kept = [line for line in lines if re.search(r"\w", line) and not re.match(r"#|import |from ", line)]
        for at in range(len(kept) - RUN + 1):
            places[tuple(kept[at : at + RUN])].append((path, at))
    twice = {place for found in places.values() if len(found) > 1 for place in found}
    return sum((path, at - 1) not in twice for path, at in twice) // 2


def called_once(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Private functions, and those of them whose name is used in one place of their file."""
    private = once = 0
    for tree in trees.values():
        nodes = list(ast.walk(tree))
        used = Counter(node.id if isinstance(node, ast.Name) else node.attr for node in nodes
                       if isinstance(node, ast.Name | ast.Attribute))  # fmt: skip
        names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        names = [name for name in names if name.startswith("_") and not name.startswith("__")]
        private, once = private + len(names), once + sum(used[name] == 1 for name in names)
    return private, once


def docstring_lines(node: ast.AST) -> int:
    """The lines of the docstring of a module, a class or a function."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    text = ast.get_docstring(node, clean=False)
    return len(text.splitlines()) if text else 0


def figures(root: Path) -> dict[str, str]:
    """The figures of the package in ``root``, by their names."""
    texts = {
        path: path.read_text() for path in sorted(root.rglob("*.py")) if "tests" not in path.relative_to(root).parts
    }
    trees = {}
    for path, text in texts.items():
        parts = path.relative_to(root.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(text)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    lines = [line.strip() for text in texts.values() for line in text.splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    trailing = sum("  # " in line and not line.startswith("#") for line in lines)
    code = sum(bool(line) and not line.startswith("#") for line in lines)
    prose = sum(docstring_lines(node) for node in nodes)
    anything = sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    private, once = called_once(trees)
    return {
        "lines": f"{len(lines):,}",
        "files": f"{len(texts)}",
        "functions": f"{len(lengths):,}",
        "lines of a function: median, 90th percentile, longest":
            f"{lengths[len(lengths) // 2]}, {lengths[len(lengths) * 9 // 10]}, {lengths[-1]}",
        "private functions; called in one place": f"{private:,}; {once:,} ({once / max(1, private):.0%})",
        "comment lines; comments behind code; lines of docstrings, per line of code":
            f"{comments / code:.1%}; {trailing / code:.1%}; {prose / code:.1%}",
        "`Any` per 1,000 lines": f"{1000 * anything / len(lines):.1f}",
        "circles of imports": f"{circles(trees)}",
        "duplicates": f"{duplicates(texts)}",
    }  # fmt: skip


def of(what: str) -> dict[str, str]:
    """The figures of a revision, of an installed package, or ("") of the code as it lies here."""
    if not what:
        return figures(REPOSITORY / PACKAGE)
    if (found := importlib.util.find_spec(what)) and found.origin:
        return figures(Path(found.origin).parent)
    archive = subprocess.run(["git", "archive", what, PACKAGE], cwd=REPOSITORY, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
        return figures(Path(folder) / PACKAGE)


def of_a_request() -> str:
    """What one warm chat goes through: calls, how deep they stand on each other, and in how many classes."""
    with tempfile.TemporaryDirectory() as folder, running("upstream", 0, Path(folder), chat(stream=False)) as upstream:
        if upstream is None:
            raise SystemExit("the upstream does not start")
        calls = counted(upstream.port)
    return f"{len(calls['functions'])} calls, {calls['deepest']} deep, {len(calls['classes'])} classes"


def main() -> None:
    """Print the table."""
    asked = [each for each in sys.argv[1:] if each != "--request"] or [""]
    found = {what or "as it lies here": of(what) for what in asked}
    print(f"| | {' | '.join(found)} |")
    print("|---" * (len(found) + 1) + "|")
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(each[name] for each in found.values())} |")
    if "--request" in sys.argv:
        print("\none warm chat, as it lies here:", of_a_request())


if __name__ == "__main__":
    main()
