"""The canonical form of a tree: other systems' names replaced by ours, unknown keys complained of, groups checked."""

from __future__ import annotations

from vllmd.config.engine_kinds import ENGINE_KINDS, is_engine_kind, one_name
from vllmd.config.findings import Findings
from vllmd.config.nodes import Node
from vllmd.config.settings import DEFAULTS, DEFAULTS_OF_KIND, LEGACY, LEGACY_SECTIONS, MODEL, ROOT, Group, Setting
from vllmd.config.trees import find, join, put
from vllmd.config.value_types import what_it_is

MOST_LISTED = 16  # names in a message; of more the manual has the list


class Shape:
    """Makes a tree canonical, and complains of what has no place in the table of settings."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def adopt_legacy(self, tree: Node) -> Node:
        """The tree with what stands in other systems' sections, ``gpu`` and ``proxy``, in the places it has here."""
        sections = {name: tree.value[name] for name in LEGACY_SECTIONS if name in tree.value}
        tree = tree.with_value({name: node for name, node in tree.value.items() if name not in sections})
        for section, node in sections.items():
            known = {row.key.split(".")[1]: row for row in LEGACY if row.key.startswith(section + ".")}
            if node.value is None or self.findings.mapping(node, section, ", ".join(known)) is None:
                continue
            for name, value in node.value.items():
                if name not in known:
                    self.unknown(value, f"{section}.{name}", name, tuple(known))
                    continue
                row = known[name]
                if row.path == "auth.keys":
                    tree = self.add_key(tree, value)
                elif (ours := find(tree, row.path)) is not None:
                    what = f"{row.path} is the same setting, given in {ours.where}"
                    self.findings.complain(value.key or value.where, f"{section}.{name}", what)
                else:
                    tree = put(tree, row.path, row.convert(value))
        return tree

    def add_key(self, tree: Node, value: Node) -> Node:
        """The tree with one more entry of ``auth.keys``: ``proxy.api_key``, which opens models and administration."""
        word = Node(value.where, "proxy", "proxy")
        both = Node(value.where, [Node(value.where, scope, scope) for scope in ("models", "admin")])
        key = Node(value.where, {"name": word, "key": value, "scopes": both})
        present = find(tree, "auth.keys")
        keys = present.value if present is not None and present.is_list else []
        return put(tree, "auth.keys", Node(value.where, [*keys, key]))

    def canonical(self, group: Group, node: Node, path: str) -> Node:
        """A mapping with its other spellings renamed and its unknown keys complained of and dropped."""
        entries: dict[str, Node] = {}
        for name, value in node.value.items():
            row = group.row(name)
            if group is DEFAULTS and is_of_kind(row, name, value):
                if self.findings.mapping(value, full := join(path, name), group.accepts) is not None:
                    entries[one_name(name)] = self.canonical(DEFAULTS_OF_KIND, value, full)
            elif row is None:
                kinds = ENGINE_KINDS if group is DEFAULTS and value.is_map else ()
                known = (*spellings(group), *kinds)
                self.unknown(value, join(path, name), name, known, advice(group, name, value))
            elif row.name in entries:
                other = entries[row.name].where
                what = f"{row.name} is the same setting, given in {other}"
                self.findings.complain(value.key or value.where, join(path, name), what)
            elif isinstance(row.kind, Group):
                if value.value is not None:
                    entries[row.name] = self.canonical_group(row, row.kind, value, join(path, row.name))
            elif value.value is not None:  # null is as if it were not written
                entries[row.name] = value
        return node.with_value(entries)

    def canonical_group(self, row: Setting, group: Group, value: Node, path: str) -> Node:
        """A group, or a map or list of groups, with its short forms."""
        if row.many == "map":
            if self.findings.mapping(value, path, f"{path.rpartition('.')[2]} by name") is None:
                return value.with_value({})
            entries = {}
            for name, node in value.value.items():
                node = node.with_value({}) if node.value is None else group.short(node) or node
                if self.findings.mapping(node, at := f"{path}.{name}", group.accepts) is not None:
                    entries[name] = self.canonical(group, node, at)
            return value.with_value(entries)
        if row.many == "list":
            return self.canonical_list(group, value, path)
        value = group.short(value) or value
        if group.optional and value.value is False:
            return value
        is_map = self.findings.mapping(value, path, group.accepts) is not None
        return self.canonical(group, value, path) if is_map else value.with_value({})

    def canonical_list(self, group: Group, value: Node, path: str) -> Node:
        """A list of groups; entries that are no mappings are complained of and left out."""
        accepts = f"mapping with {', '.join(group.names())}"
        if not value.is_list:
            what = f"{what_it_is(value)} is not a list"
            self.findings.complain(value.where, path, what, f"a list of {accepts.replace('mapping', 'mappings', 1)}")
            return value.with_value([])
        nodes = [(f"{path}[{index}]", node) for index, node in enumerate(value.value)]
        good = [(at, node) for at, node in nodes if self.findings.mapping(node, at, f"a {accepts}") is not None]
        return value.with_value([self.canonical(group, node, at) for at, node in good])

    def unknown(self, value: Node, path: str, name: str, known: tuple[str, ...], advice: str = "") -> None:
        """Complain of a key that no row has, with the nearest known one, else with those there are."""
        import difflib  # for mistakes only

        near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.6)
        what = "there is no such setting" + (f"; {advice}" if advice and not near else "")
        accepted = ", ".join(known)
        if len(known) > MOST_LISTED:
            accepted = "" if near else f"{', '.join(known[:MOST_LISTED])} and others, see vllmd.yaml(5)"
        self.findings.complain(value.key or value.where, path, what, accepted, near[0] if near else "")


def is_of_kind(row: Setting | None, name: str, value: Node) -> bool:
    """Whether an entry of ``defaults`` is for one kind of engine. A kind and a setting may be called the same."""
    if row is not None:
        return value.is_map and name in ENGINE_KINDS
    return value.value is not None and is_engine_kind(name)


def advice(group: Group, name: str, value: Node) -> str:
    """Where an unknown key probably belongs, "" where nothing tells."""
    if group in (MODEL, DEFAULTS, DEFAULTS_OF_KIND):
        return "flags of the engine belong in extra_args"
    return "models belong beneath models:" if group is ROOT and "/" in name and value.is_map else ""


def spellings(group: Group) -> tuple[str, ...]:
    """Every spelling that a key of the group may have."""
    return tuple(name for row in group.rows for name in (row.name, *row.also))
