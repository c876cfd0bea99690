"""The table's shape put upon a tree: other systems' names replaced by ours, unknown keys found, groups checked."""

from __future__ import annotations

from vllmd.config.engine_kinds import ENGINE_KINDS, is_engine_kind, one_name
from vllmd.config.findings import Findings
from vllmd.config.nodes import Node
from vllmd.config.settings import DEFAULTS, DEFAULTS_OF_KIND, LEGACY, LEGACY_SECTIONS, MODEL, ROOT, Group, Setting
from vllmd.config.trees import find, join, put
from vllmd.config.value_types import what_it_is

MANY = 16  # names that a message lists; of more the manual has the list


class Shape:
    """Complains of what has no place in the table."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def mapping(self, node: Node, path: str, accepts: str) -> Node | None:
        if node.is_map:
            return node
        self.findings.complain(node.where, path, f"{what_it_is(node)} is not a mapping", accepts)
        return None

    def adopt_legacy(self, tree: Node) -> Node:
        """Moves the sections ``gpu`` and ``proxy`` of other systems to where their settings live here."""
        sections = {name: tree.value[name] for name in LEGACY_SECTIONS if name in tree.value}
        tree = tree.with_value({name: node for name, node in tree.value.items() if name not in sections})
        for section, node in sections.items():
            known = {row.key.split(".")[1]: row for row in LEGACY if row.key.startswith(section + ".")}
            if node.value is None or self.mapping(node, section, ", ".join(known)) is None:
                continue
            for name, value in node.value.items():
                if name not in known:
                    self.unknown(value, f"{section}.{name}", name, tuple(known))
                    continue
                row = known[name]
                if row.path == "auth.keys":
                    tree = self.add_key(tree, value)
                elif self.taken(tree, row.path, value, f"{section}.{name}"):
                    tree = put(tree, row.path, row.convert(value))
        return tree

    def add_key(self, tree: Node, value: Node) -> Node:
        word = Node(value.where, "proxy", "proxy")
        both = Node(value.where, [Node(value.where, scope, scope) for scope in ("models", "admin")])
        key = Node(value.where, {"name": word, "key": value, "scopes": both})
        auth = tree.value.get("auth")
        have = auth.value.get("keys") if auth is not None and auth.is_map else None
        keys = list(have.value) if have is not None and have.is_list else []
        return put(tree, "auth.keys", Node(value.where, [*keys, key]))

    def taken(self, tree: Node, path: str, value: Node, legacy: str) -> bool:
        """Whether the legacy setting may take the place, that is, unless ours is given too."""
        ours = find(tree, path)
        if ours is not None:
            self.findings.complain(
                value.key or value.where, legacy, f"{path} is the same setting, given in {ours.where}"
            )
        return ours is None

    def canonical(self, group: Group, node: Node, path: str) -> Node:
        """Unknown keys complained of and dropped, other spellings renamed, groups within likewise."""
        entries: dict[str, Node] = {}
        for name, value in node.value.items():
            row, full = group.row(name), join(path, name)
            if group is DEFAULTS and is_of_kind(row, name, value):
                if self.mapping(value, full, group.accepts) is not None:
                    entries[one_name(name)] = self.canonical(DEFAULTS_OF_KIND, value, full)
            elif row is None:
                kinds = ENGINE_KINDS if group is DEFAULTS and value.is_map else ()
                self.unknown(value, full, name, (*spellings(group), *kinds), advice(group, name, value))
            elif row.name in entries:
                other = entries[row.name].where
                what = f"{row.name} is the same setting, given in {other}"
                self.findings.complain(value.key or value.where, full, what)
            elif value.value is not None:  # null is as if it were not written
                entries[row.name] = self.canonical_value(row, value, join(path, row.name))
        return node.with_value(entries)

    def canonical_value(self, row: Setting, value: Node, path: str) -> Node:
        group = row.kind
        if not isinstance(group, Group):
            return value
        if row.many == "map":
            return self.canonical_map(group, value, path)
        if row.many == "list":
            return self.canonical_list(group, value, path)
        value = group.short(value) or value
        if group.optional and value.value is False:
            return value
        checked = self.mapping(value, path, group.accepts)
        return value.with_value({}) if checked is None else self.canonical(group, value, path)

    def canonical_map(self, group: Group, value: Node, path: str) -> Node:
        if self.mapping(value, path, f"{path.rpartition('.')[2]} by name") is None:
            return value.with_value({})
        entries = {}
        for name, node in value.value.items():
            node = node.with_value({}) if node.value is None else group.short(node) or node
            if self.mapping(node, f"{path}.{name}", group.accepts) is not None:
                entries[name] = self.canonical(group, node, f"{path}.{name}")
        return value.with_value(entries)

    def canonical_list(self, group: Group, value: Node, path: str) -> Node:
        if not value.is_list:
            what = f"{what_it_is(value)} is not a list"
            self.findings.complain(value.where, path, what, f"a list of mappings with {', '.join(group.names())}")
            return value.with_value([])
        accepts = f"a mapping with {', '.join(group.names())}"
        good = [
            self.canonical(group, node, f"{path}[{index}]")
            for index, node in enumerate(value.value)
            if self.mapping(node, f"{path}[{index}]", accepts) is not None
        ]
        return value.with_value(good)

    def unknown(self, value: Node, path: str, name: str, known: tuple[str, ...], advice: str = "") -> None:
        import difflib

        near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.6)
        what = "there is no such setting" + (f"; {advice}" if advice and not near else "")
        accepted = ", ".join(known)
        if len(known) > MANY:
            accepted = "" if near else f"{', '.join(known[:MANY])} and others, see vllmd.yaml(5)"
        self.findings.complain(value.key or value.where, path, what, accepted, near[0] if near else "")


def is_of_kind(row: Setting | None, name: str, value: Node) -> bool:
    """Whether an entry of ``defaults`` is for one kind of engine. A kind and a setting may be called the same."""
    if row is not None:
        return value.is_map and name in ENGINE_KINDS
    return value.value is not None and is_engine_kind(name)


def advice(group: Group, name: str, value: Node) -> str:
    if group in (MODEL, DEFAULTS, DEFAULTS_OF_KIND):
        return "flags of the engine belong in extra_args"
    return "models belong beneath models:" if group is ROOT and "/" in name and value.is_map else ""


def spellings(group: Group) -> tuple[str, ...]:
    """Every spelling that a key of the group may have."""
    return tuple(name for row in group.rows for name in (row.name, *row.also))
