"""YAML as nodes that know where they stand, so that every complaint can name file and line.

``compose`` reads with libyaml where it is installed; a key is its own text (a
model may be called ``no`` or ``1.5``), duplicate keys and endless anchors are
problems, merge keys (``<<``) work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from sys import intern
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Where(NamedTuple):
    """A place: a file with line and column (from 1), or a source without lines such as an environment variable."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Node:
    """A value and its place, which nobody changes. ``value`` is a scalar, a list of nodes, or a dict from key to node.

    ``text`` is a scalar as it was written, ``key`` the place of the mapping key that led here, in the same file.
    ``secret``: it may hold one, so no complaint quotes it.

    Places are kept as numbers, and become a ``Where`` when one is asked for: a file of ten thousand models has eighty
    thousand. What stays of a model while its nodes go is of a ``Where``'s size, and all their memory would stay, too.
    """

    __slots__ = ("_column", "_key_column", "_key_line", "_line", "_source", "secret", "text", "value")

    def __init__(
        self, where: Where, value: Any, text: str = "", key: Where | None = None, secret: bool = False
    ) -> None:
        self._source, self._line, self._column = where
        self.value, self.text, self.secret = value, text, secret
        self._key_line, self._key_column = (NOT_KEYED, 0) if key is None else (key.line, key.column)

    @property
    def where(self) -> Where:
        return Where(self._source, self._line, self._column)

    @property
    def key(self) -> Where | None:
        return None if self._key_line == NOT_KEYED else Where(self._source, self._key_line, self._key_column)

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
        """The same node, which no message may quote, nor its entries; no message quotes what is deeper within."""

        def hidden(node: Node, value: Any) -> Node:
            return Node(node.where, value, node.text, node.key, secret=True)

        if self.is_map:
            return hidden(self, {key: hidden(node, node.value) for key, node in self.value.items()})
        if self.is_list:
            return hidden(self, [hidden(node, node.value) for node in self.value])
        return hidden(self, self.value)

    def with_value(self, value: Any, text: str | None = None) -> Node:
        """The same place with another value, and perhaps as another text."""
        node = _blank(Node)
        node._source, node._line, node._column = self._source, self._line, self._column
        node._key_line, node._key_column = self._key_line, self._key_column
        node.value, node.text, node.secret = value, self.text if text is None else text, self.secret
        return node


_blank = object.__new__
NOT_KEYED = -1  # as the line of a key: no key has led here
STRING = "tag:yaml.org,2002:str"
LONGEST_KNOWN_CHARS, MOST_KNOWN = 64, 1000  # of plain scalars that are remembered: length, and how many
_new = tuple.__new__  # past the constructor, which costs as much again
TAGS = {
    f"tag:yaml.org,2002:{tag}": what
    for tag, what in (("int", "a number"), ("float", "a number"), ("timestamp", "a date"), ("bool", "a yes or a no"))
}
QUOTED = r"'((?:[^'\\]|\\.)*)'|\"(?:[^\"\\]|\\.)*\""
MARK = r"[^\w\s]{1,3}|<[a-z ]+>|\\[a-z]"  # of PyYAML's own: ',' or '<block end>'
Complain = Callable[[Where, str], None]


def compose(text: str, source: str, complain: Complain) -> Node | None:
    """The root of a YAML document; None if it is empty or broken (which is complained of)."""
    loader, problems = Loader(text), list[tuple[Where, str]]()
    try:
        root = _Composer(loader, source, lambda where, what: problems.append((where, what))).document()
        for problem in problems:
            complain(*problem)
        return root
    except yaml.YAMLError as error:  # a file that is not YAML has this one problem, whatever was found in it before
        complain(*syntax_error(error, source, text))
    except RecursionError:
        complain(Where(source), "this is nested too deeply")
    finally:
        loader.dispose()
    return None


def syntax_error(error: yaml.YAMLError, source: str, text: str) -> tuple[Where, str]:
    """PyYAML's error as a place and a sentence, without what it quotes of the file, which may be a secret."""
    mark, lines = getattr(error, "problem_mark", None), text.splitlines()
    place = Where(source, mark.line + 1, mark.column + 1) if mark else Where(source)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    context = getattr(error, "context", None)
    began = getattr(error, "context_mark", None) or mark
    if mark and mark.line < len(lines) and re.match(r"\s*\t", lines[mark.line]):
        return place, "this is not valid YAML: a tab stands before its first word; indent by spaces"
    if mark and mark.line >= len(lines) and "end" not in problem:
        problem += ", at the end of the file"
    if context and mark and began and began.line < mark.line:
        context += f" that begins on line {began.line + 1}"
    sentence = problem + (f" ({context})" if context else "")
    hidden = re.sub(
        QUOTED, lambda quote: quote[0] if re.fullmatch(MARK, quote[1] or "") else "what stands here", sentence
    )
    return place, f"this is not valid YAML: {hidden}"


class _Composer:
    """Makes nodes of PyYAML's events as they come.

    PyYAML's own nodes are three times as large as ours, and what they leave in memory is never given back: ten thousand
    models would cost 40 MB that nobody uses any more.
    """

    def __init__(self, loader: Any, source: str, complain: Complain) -> None:
        self.loader, self.source, self.complain = loader, source, complain
        self.next: Callable[[], Any] = loader.get_event
        self.anchors: dict[str, Node] = {}
        self.open: dict[str, Where] = {}  # anchors of what is being composed
        # One object for all that are equal: plain scalars (text and value), quoted ones, keys, the number of a line.
        self.known: dict[str, tuple[str, Any]] = {}
        self.quoted: dict[str, tuple[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.line = 0

    def document(self) -> Node | None:
        """The only document's root; None if there is none. Raises YAMLError."""
        self.next()  # the stream's start
        event = self.next()
        if type(event) is yaml.StreamEndEvent:
            return None
        root = self.node(self.next())
        self.next()  # the document's end
        event = self.next()
        if type(event) is not yaml.StreamEndEvent:
            what = "expected a single document in the stream"
            raise ComposerError(what, None, "but found another document", event.start_mark)
        return root

    def node(self, event: Any, key: Where | None = None) -> Node:
        """What begins with ``event``; ``key``: the place of the mapping key that led here."""
        kind, anchor = type(event), event.anchor
        if kind is yaml.ScalarEvent and anchor is None:  # nearly all of a file
            where = self.place(event)
            text, value = self.scalar(event, where)
            return Node(where, value, text, key)
        if kind is yaml.AliasEvent:
            return self.alias(event, key)
        where = self.place(event)
        if anchor is not None:
            if anchor in self.anchors or anchor in self.open:
                what = "found duplicate anchor; first occurrence"
                raise ComposerError(what, None, "second occurrence", event.start_mark)
            self.open[anchor] = where
        if kind is yaml.ScalarEvent:
            text, value = self.scalar(event, where)
            node = Node(where, value, text, key)
        elif kind is yaml.MappingStartEvent:
            node = Node(where, self.mapping(), "", key)
        else:
            node = Node(where, self.sequence(), "", key)
        if anchor is not None:
            del self.open[anchor]
            self.anchors[anchor] = node
        return node

    def alias(self, event: Any, key: Where | None) -> Node:
        """The node of an anchor: one value in memory, however often it is referred to. Raises YAMLError."""
        if event.anchor in self.open:
            where = self.open[event.anchor]
            self.complain(where, "this anchor contains itself")
            return Node(where, None, key=key)
        known = self.anchors.get(event.anchor)
        if known is None:
            raise ComposerError(None, None, "found undefined alias", event.start_mark)
        return known if known.key == key else Node(known.where, known.value, known.text, key)

    def scalar(self, event: Any, where: Where) -> tuple[str, Any]:
        """A scalar's text, and the value that YAML reads from it."""
        text, (plain, quoted) = event.value, event.implicit
        if plain or quoted:
            known = self.known if plain else self.quoted
            if text in known:
                return known[text]
        tag = event.tag
        if tag is None or tag == "!":
            tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit)
        value = text
        if tag != STRING:
            try:
                value = self.loader.construct_object(yaml.ScalarNode(tag, text, event.start_mark, event.end_mark))
                str(value)  # raises ValueError for a number of thousands of digits, as hexadecimal ones can be
            except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # PyYAML's own trust what a tag says
                self.complain(where, f"this cannot be read as {TAGS.get(tag, 'what its tag says')}")
                return text, None
        if (plain or quoted) and len(text) <= LONGEST_KNOWN_CHARS and len(known) < MOST_KNOWN:
            known[text] = text, value
        return text, value

    def sequence(self) -> list[Node]:
        items = []
        while type(event := self.next()) is not yaml.SequenceEndEvent:
            items.append(self.node(event))
        return items

    def mapping(self) -> dict[str, Node]:
        """The entries of a mapping, those of ``<<`` beneath its own; a key that stands twice is a problem."""
        entries: dict[str, Node] = {}
        repeated: dict[str, Where] = {}  # where a key that stands twice stood first
        merged: list[Node] = []
        while type(event := self.next()) is not yaml.MappingEndEvent:
            key, where = self.key(event)
            value_event = self.next()
            of_itself = type(value_event) is yaml.AliasEvent and value_event.anchor in self.open
            value = self.node(value_event, where)
            if key is None:
                self.complain(where, "a key must be plain text")
            elif key == "<<" and type(event) is yaml.ScalarEvent and event.implicit[0]:
                merged += [] if of_itself else self.to_be_merged(value)
            else:
                if key in entries:
                    first = repeated.setdefault(key, entries[key].key or where)
                    self.complain(where, f"{key!r} is given twice, first on line {first.line}; keep one of them")
                entries[key] = value
        if not merged:
            return entries
        under = {name: node for each in merged for name, node in each.value.items()}
        return {**under, **entries}

    def key(self, event: Any) -> tuple[str | None, Where]:
        """A mapping's key with its place: its own text, whatever YAML would take that for; None if it has no text."""
        where = self.place(event)
        if type(event) is yaml.ScalarEvent and event.anchor is None:
            text: str = event.value
            if (known := self.keys.get(text)) is None:
                known = text
                if len(self.keys) < MOST_KNOWN:  # settings are often met again, models are not
                    known = self.keys[text] = intern(text)
            return known, where
        key = self.node(event)
        return (None if key.is_map or key.is_list else key.text), where

    def to_be_merged(self, value: Node) -> list[Node]:
        """The mappings that ``<<`` names, the one that wins last. Raises YAMLError."""
        if value.is_map:
            return [value]
        wrong = next((item for item in value.value if not item.is_map), None) if value.is_list else value
        if wrong is not None:
            kind = "sequence" if wrong.is_list else "scalar"
            expected = "a mapping" if value.is_list else "a mapping or list of mappings"
            mark = yaml.Mark(self.source, 0, wrong.where.line - 1, wrong.where.column - 1, None, 0)
            what = f"expected {expected} for merging, but found {kind}"
            raise ConstructorError("while constructing a mapping", None, what, mark)
        return list(reversed(value.value))

    def place(self, event: Any) -> Where:
        mark = event.start_mark
        if (line := mark.line + 1) != self.line:
            self.line = line
        return _new(Where, (self.source, self.line, mark.column + 1))


def from_text(text: str, where: Where) -> Node:
    """A value from an environment variable or a flag, read as YAML would read it in a file."""
    node = compose(text, where.source, lambda place, problem: None)
    return Node(where, text, text) if node is None else _moved(node, where)


def _moved(node: Node, where: Where) -> Node:
    """The same tree, all of it at ``where``."""
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
