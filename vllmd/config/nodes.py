"""YAML as nodes that know where they stand, so that every complaint can name file and line.

``compose`` reads with libyaml where it is installed; a key is its own text (a
model may be called ``no`` or ``1.5``), duplicate keys and endless anchors are
problems, merge keys (``<<``) work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Where(NamedTuple):
    """A place: a file with line and column (from 1), or a source without lines such as an environment variable."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place. ``value`` is a scalar, a list of nodes, or a dict from key to node.

    ``text`` is a scalar as it was written, ``key`` the place of the mapping key that led here. ``secret``: it may hold
    one, so no complaint quotes it.
    """

    where: Where
    value: Any
    text: str = ""
    key: Where | None = None
    secret: bool = False

    @property
    def is_map(self) -> bool:
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.value, list)

    def plain(self) -> Any:
        """The value as ordinary Python data."""
        if self.is_map:
            return {key: node.plain() for key, node in self.value.items()}
        if self.is_list:
            return [node.plain() for node in self.value]
        return self.value

    def as_secret(self) -> Node:
        """The same, which nobody may quote, nor its entries; what is deeper within is quoted by nobody anyway."""
        value: Any = self.value
        if self.is_map:
            value = {key: replace(node, secret=True) for key, node in self.value.items()}
        elif self.is_list:
            value = [replace(node, secret=True) for node in self.value]
        return replace(self, value=value, secret=True)

    def with_value(self, value: Any) -> Node:
        """The same place with another value."""
        return replace(self, value=value)


TAGS = {
    f"tag:yaml.org,2002:{tag}": what
    for tag, what in (("int", "a number"), ("float", "a number"), ("timestamp", "a date"), ("bool", "a yes or a no"))
}
QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"(?:[^\"\\]|\\.)*\"")
MARK = re.compile(r"[^\w\s]{1,3}|<[a-z ]+>|\\[a-z]")  # of PyYAML's own: ',' or '<block end>'
Complain = Callable[[Where, str], None]


def compose(text: str, source: str, complain: Complain) -> Node | None:
    """The root of a YAML document; None if it is empty or broken (which is complained of)."""
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        return None if root is None else _Builder(loader, source, complain).build(root)
    except yaml.YAMLError as error:
        complain(*_broken(error, source))
    except RecursionError:
        complain(Where(source), "this is nested too deeply")
    finally:
        loader.dispose()
    return None


def _broken(error: yaml.YAMLError, source: str) -> tuple[Where, str]:
    mark = getattr(error, "problem_mark", None)
    place = Where(source, mark.line + 1, mark.column + 1) if mark else Where(source)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    context = getattr(error, "context", None)
    return place, f"this is not valid YAML: {_unquoted(problem)}" + (f" ({_unquoted(context)})" if context else "")


def _unquoted(said: str) -> str:
    """What the reader says without what it quotes of the file, which may be a secret."""
    return QUOTED.sub(lambda quote: quote[0] if MARK.fullmatch(quote[1] or "") else "what stands here", said)


class _Builder:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, loader: Any, source: str, complain: Complain) -> None:
        self.loader, self.source, self.complain = loader, source, complain
        self.open: list[Any] = []
        self.built: dict[int, Node] = {}

    def build(self, node: Any, key: Where | None = None) -> Node:
        """Each YAML node once, however often it is referred to."""
        if id(node) not in self.built:
            self.built[id(node)] = self.convert_once(node, key)
        known = self.built[id(node)]
        return known if known.key is key else replace(known, key=key)

    def convert_once(self, node: Any, key: Where | None) -> Node:
        where = self.place(node)
        if any(node is other for other in self.open):
            self.complain(where, "this anchor contains itself")
            return Node(where, None, key=key)
        self.open.append(node)
        try:
            return self.convert(node, where, key)
        finally:
            self.open.pop()

    def convert(self, node: Any, where: Where, key: Where | None) -> Node:
        if isinstance(node, yaml.MappingNode):
            return Node(where, self.mapping(node), key=key)
        if isinstance(node, yaml.SequenceNode):
            return Node(where, [self.build(item) for item in node.value], key=key)
        return Node(where, self.scalar(node, where), node.value, key)

    def scalar(self, node: Any, where: Where) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self.complain(where, f"this cannot be read as {TAGS.get(node.tag, 'what its tag says')}")
            return None

    def mapping(self, node: Any) -> dict[str, Node]:
        self.find_duplicates(node)
        self.loader.flatten_mapping(node)
        entries = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                entries[key.value] = self.build(value, self.place(key))
            else:
                self.complain(self.place(key), "a key must be plain text")
        return entries

    def find_duplicates(self, node: Any) -> None:
        seen: dict[str, Where] = {}
        for key, _ in node.value:
            name, place = str(key.value), self.place(key)
            if name in seen and name != "<<":
                self.complain(place, f"{name!r} is given twice, first on line {seen[name].line}; keep one of them")
            seen.setdefault(name, place)

    def place(self, node: Any) -> Where:
        return Where(self.source, node.start_mark.line + 1, node.start_mark.column + 1)


def from_text(text: str, where: Where) -> Node:
    """A value from an environment variable or a flag, read as YAML would read it in a file."""
    node = compose(text, where.source, lambda place, problem: None)
    return Node(where, text, text) if node is None else _moved(node, where)


def _moved(node: Node, where: Where) -> Node:
    value: Any = node.value
    if node.is_map:
        value = {key: _moved(child, where) for key, child in node.value.items()}
    elif node.is_list:
        value = [_moved(child, where) for child in node.value]
    return Node(where, value, node.text)


def from_plain(value: object, where: Where) -> Node:
    """Ordinary Python data as a node."""
    if isinstance(value, str):
        return from_text(value, where)
    if isinstance(value, Mapping):
        return Node(where, {str(key): from_plain(child, where) for key, child in value.items()})
    if isinstance(value, Sequence):
        return Node(where, [from_plain(child, where) for child in value])
    return Node(where, value, "" if value is None else str(value))


def overlay(under: Node, over: Node, depth: Callable[[str], bool]) -> Node:
    """``over``'s entries before ``under``'s; keys for which ``depth`` holds are overlaid entry by entry."""
    merged = dict(under.value)
    for key, node in over.value.items():
        below = merged.get(key)
        if below is not None and depth(key) and below.is_map and node.is_map:
            node = overlay(below, node, lambda _: False)
        merged[key] = node
    return over.with_value(merged)
