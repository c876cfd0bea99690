"""``core/design.md`` and the code say the same: each numbered rule is in both, and so is each word that is recorded."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import vllmd.core

CORE = Path(vllmd.core.__file__).parent
DESIGN = (CORE / "design.md").read_text()
FILES = [path.read_text() for path in sorted(CORE.glob("*.py"))]


def rules_in_prose() -> set[str]:
    """``1.1`` to ``9.3``: the items of the decision tree."""
    rules, section = set(), ""
    for line in DESIGN.partition("## The decision tree")[2].partition("## What is recorded")[0].splitlines():
        if heading := re.match(r"\*\*(\d)\. ", line):
            section = heading[1]
        elif item := re.match(r"(\d+)\. ", line):
            rules.add(f"{section}.{item[1]}")
    return rules


def rules_in_code() -> set[str]:
    """The numbers in comments and docstrings: ``5.2``, and ``1.3 to 1.7`` for each of them; no times, no sizes."""
    rules = set()
    for text in FILES:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or token.string.startswith('"""'):
                numbers = r"(?<![\w.])([1-9]\.\d+)(?![\w.%]| (?:s|ms|GiB|seconds|W)\b)"
                rules.update(re.findall(numbers, token.string))
                for section, first, last in re.findall(r"(?<![\w.])([1-9])\.(\d) to \1\.(\d)", token.string):
                    rules.update(f"{section}.{number}" for number in range(int(first), int(last) + 1))
    return rules


def test_each_rule_is_in_the_prose_and_in_the_code() -> None:
    """A rule that only one of them has is a decision that nobody wrote down, or one that is not made any more."""
    assert rules_in_prose() == rules_in_code()


def constants(node: ast.expr, function: ast.FunctionDef) -> Iterator[str]:
    """The words that an expression may be: constants in it, and those that the function gives its variables."""
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value
        elif isinstance(each, ast.Name):
            for assign in [a for a in ast.walk(function) if isinstance(a, ast.Assign)]:
                target, value = assign.targets[0], assign.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                for name, given in pairs:
                    if isinstance(name, ast.Name) and name.id == each.id:
                        yield from (value for branch in branches(given) for value in constants(branch, function))


def branches(node: ast.expr) -> list[ast.expr]:
    """What a conditional expression may be."""
    return [*branches(node.body), *branches(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def recorded() -> set[str]:
    """The words of all ``record(what, ...)`` and ``Decision(at, what, ...)`` of the core."""
    words = set()
    for text in FILES:
        for function in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]:
            for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
                what = None
                if isinstance(call.func, ast.Attribute) and call.func.attr == "record":
                    what = call.args[0]
                elif isinstance(call.func, ast.Name) and call.func.id == "Decision":
                    what = call.args[1]
                for branch in branches(what) if what else ():
                    words.update(constants(branch, function))
    return words


def test_each_recorded_word_is_explained() -> None:
    """Operators read them in the journal and count them in the metrics."""
    table = DESIGN.partition("## What is recorded")[2].partition("## The policy")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    assert {word for words, _, _ in rows for word in re.findall("`(.+?)`", words)} == recorded()
    sections = {rule.partition(".")[0] for rule in rules_in_prose()}
    for words, _, rules in rows:
        assert {rule.strip() for rule in rules.split(",")} <= rules_in_prose() | sections, words
