"""How the code stands, in figures: ``python -m tests.bench.figures [REVISION ...]``, without one: as it lies here.

Lines of the package, functions and how long they are (median, 90th percentile, longest), comment lines per line of
code, how often ``Any`` stands in an annotation, and circles of files that import each other.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "vllmd"


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


def figures(root: Path) -> str:
    """One line about the package below ``root``."""
    texts = {path: path.read_text() for path in sorted((root / PACKAGE).rglob("*.py"))}
    trees = {}
    for path, text in texts.items():
        parts = path.relative_to(root).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(text)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    lines = [line.strip() for text in texts.values() for line in text.splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    code = sum(bool(line) and not line.startswith("#") for line in lines)
    anything = sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    return (
        f"{len(lines)} lines, {len(texts)} files, {len(lengths)} functions (median {lengths[len(lengths) // 2]}, "
        f"90th percentile {lengths[len(lengths) * 9 // 10]}, longest {lengths[-1]}), "
        f"comments {comments / code:.1%}, Any {anything}, circles {circles(trees)}"
    )


def main() -> None:
    """Print one line for each revision."""
    for revision in sys.argv[1:]:
        archive = subprocess.run(["git", "archive", revision, PACKAGE], cwd=REPOSITORY, capture_output=True, check=True)
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
            print(f"{revision}: {figures(Path(folder))}")
    if not sys.argv[1:]:
        print(figures(REPOSITORY))


if __name__ == "__main__":
    main()
